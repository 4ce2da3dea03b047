"""Count the images and annotations that were found, how many are used, and why the others are not."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from flawmask.errors import UnusedError

log = logging.getLogger(__name__)

MAX_NAMES = 3
"""How many unused names a warning shows. JSON files list all of them."""


@dataclass
class Tally:
    """Counts of the images or annotations in a data set. `found` is always the sum of used and unused.

    Attributes:
        what: whether images or annotations are counted.
        used: how many are used.
        not_used: the names of the unused ones by reason. A reason is one or two words, such as `crowd`.
    """

    what: Literal["images", "annotations"]
    used: int = 0
    not_used: dict[str, list[str]] = field(default_factory=dict)

    @property
    def found(self) -> int:
        """How many were found."""
        return self.used + sum(len(names) for names in self.not_used.values())

    @property
    def all_used(self) -> bool:
        """Whether everything that was found is used."""
        return not self.not_used

    def leave_out(self, name: str, reason: str) -> None:
        """Count an unused image or annotation.

        Args:
            name: its name for people: the file, or the annotation's id with the image's file.
            reason: why it is not used, in one or two words.
        """
        self.not_used.setdefault(reason, []).append(name)

    def add(self, other: "Tally") -> None:
        """Add another tally of the same kind."""
        self.used += other.used
        for reason, names in other.not_used.items():
            self.not_used.setdefault(reason, []).extend(names)

    @property
    def unused_by_settings_only(self) -> bool:
        """Whether all is used except what the user's settings leave out (reasons such as `--good_images test`)."""
        return all(reason.startswith("--") for reason in self.not_used)

    def line(self) -> str:
        """Return one line of text: `22 annotations: 11 used, 11 not used: crowd`."""
        unused = self.found - self.used
        if not unused:
            return f"{self.found} {self.what}: all used"
        counts = [(f"{len(names)} " if len(self.not_used) > 1 else "") + why for why, names in self.not_used.items()]
        return f"{self.found} {self.what}: {self.used} used, {unused} not used: {', '.join(counts)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the tally as JSON values: `found`, `used`, and `not_used` with all names by reason."""
        return {"found": self.found, "used": self.used, "not_used": self.not_used}


def tallies_to_dict(tallies: Iterable[Tally]) -> dict[str, Any]:
    """Return the tallies as JSON values under the keys `images` and `annotations`."""
    return {tally.what: tally.to_dict() for tally in tallies}


def warn_of_unused(tallies: Iterable[Tally], where: str, *, strict: bool = False) -> None:
    """Log a line for each tally with something unused, and name the first few.

    The line is a warning, or only an information if the user's settings leave everything unused that is unused.

    Args:
        tallies: the counts.
        where: the folder or split that was counted, for the message.
        strict: whether something unused is an error. What the user's settings leave unused never is.

    Raises:
        UnusedError: something is not used, and `strict` is on.
    """
    lines = []
    for tally in tallies:
        if tally.all_used:
            continue
        names = [name for of_reason in tally.not_used.values() for name in of_reason]
        shown = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
        line = f"{where}: {tally.line()} ({shown})"
        if tally.unused_by_settings_only:
            log.info("%s", line)
        else:
            lines.append(line)
    if lines and strict:
        raise UnusedError("; ".join(lines))
    for line in lines:
        log.warning("%s", line)
