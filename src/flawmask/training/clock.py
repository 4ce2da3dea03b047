"""How far a training is: by its steps, or by the time where it has a budget."""

import time
from dataclasses import dataclass, field
from functools import partial

from flawmask.distributed import Processes


@dataclass
class Clock:
    """How far the training is: by its steps, or by the time where it has a budget.

    Attributes:
        steps: how many there are to be; None where the budget decides.
        budget: seconds that it may take; None where the steps decide.
        before: seconds that it took before it was interrupted.
        before_steps: seconds that it took before its first step: a budget's share is of what was left then.
        begun: when it was begun or went on, by `time.perf_counter`.
    """

    steps: int | None
    budget: float | None
    before: float = 0.0
    before_steps: float = 0.0
    begun: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """How long the training has taken."""
        return self.before + time.perf_counter() - self.begun

    def progress(self, taken: int, team: Processes) -> float:
        """Return the share of the training that is done, the same in all processes.

        Args:
            taken: steps so far.
            team: all processes, whose clocks differ: the main one's counts.
        """
        if self.budget is None:
            return taken / max(1, self.steps or 1)
        return team.from_main(partial(self._spent, self.budget, taken))

    def _spent(self, budget: float, taken: int) -> float:
        """Return the share of the time for steps that has gone by; the first step begins it."""
        seconds = self.seconds
        if taken == 0:
            self.before_steps = seconds
        return (seconds - self.before_steps) / max(budget - self.before_steps, 1e-9)
