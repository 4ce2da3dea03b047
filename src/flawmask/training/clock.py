"""The progress of a training: measured in steps, or in time where there is a time budget."""

import time
from dataclasses import dataclass, field
from functools import partial

from flawmask.distributed import Processes


@dataclass
class Clock:
    """The progress of a training: in steps, or in time where there is a time budget.

    Attributes:
        steps: the number of steps of the whole training; None where the budget decides.
        budget: the seconds that the training may take; None where the steps decide.
        before: the seconds that earlier sessions of a resumed training took.
        before_steps: the seconds before the first step. Progress is a share of the budget without them.
        begun: when this session began, by `time.perf_counter`.
    """

    steps: int | None
    budget: float | None
    before: float = 0.0
    before_steps: float = 0.0
    begun: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """The seconds that the training has taken, earlier sessions included."""
        return self.before + time.perf_counter() - self.begun

    def progress(self, steps_taken: int, team: Processes) -> float:
        """Return the share of the training that is done, 0 to 1 or more, the same in all processes.

        Args:
            steps_taken: the steps so far.
            team: all processes. Their clocks differ, so the main process decides.
        """
        if self.budget is None:
            return steps_taken / max(1, self.steps or 1)
        return team.from_main(partial(self._spent, self.budget, steps_taken))

    def _spent(self, budget: float, steps_taken: int) -> float:
        """Return the share of the budget that is spent, counted from the first step."""
        seconds = self.seconds
        if steps_taken == 0:
            self.before_steps = seconds
        return (seconds - self.before_steps) / max(budget - self.before_steps, 1e-9)
