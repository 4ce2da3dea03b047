"""What was found, what of it is used, and what is not and why: nothing is lost in silence."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from flawmask.errors import UnusedError

log = logging.getLogger(__name__)

NAMED = 3
"""So many names of what is not used stand in a warning; files have them all."""


@dataclass
class Tally:
    """The count of images or annotations that somebody pointed at. Found is always used and not used together.

    Attributes:
        what: which of the two is counted.
        used: how many are used.
        not_used: the names of those that are not, by the reason; a reason is one or two words, such as `crowd`.
    """

    what: Literal["images", "annotations"]
    used: int = 0
    not_used: dict[str, list[str]] = field(default_factory=dict)

    @property
    def found(self) -> int:
        """How many were found."""
        return self.used + sum(len(names) for names in self.not_used.values())

    @property
    def is_whole(self) -> bool:
        """Whether all that was found is used."""
        return not self.not_used

    def leave_out(self, name: str, reason: str) -> None:
        """Count one that is not used.

        Args:
            name: what people know it by: a file, or an annotation's id with its image's file.
            reason: why, in one or two words.
        """
        self.not_used.setdefault(reason, []).append(name)

    def add(self, other: "Tally") -> None:
        """Count what another tally of the same kind has too."""
        self.used += other.used
        for reason, names in other.not_used.items():
            self.not_used.setdefault(reason, []).extend(names)

    @property
    def is_as_asked(self) -> bool:
        """Whether all is used but what a setting leaves aside: a reason such as `--good_images test` is one."""
        return all(reason.startswith("--") for reason in self.not_used)

    def line(self) -> str:
        """Return it in a line: `22 annotations: 11 used, 11 not used: crowd`."""
        left = self.found - self.used
        if not left:
            return f"{self.found} {self.what}: all used"
        counts = [(f"{len(names)} " if len(self.not_used) > 1 else "") + why for why, names in self.not_used.items()]
        return f"{self.found} {self.what}: {self.used} used, {left} not used: {', '.join(counts)}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values: `found`, `used` and, by reason, `not_used`, whose names are all there."""
        return {"found": self.found, "used": self.used, "not_used": self.not_used}


def tallied(tallies: Iterable[Tally]) -> dict[str, Any]:
    """Return the tallies as JSON values, each under what it counts: `images`, `annotations`."""
    return {tally.what: tally.to_dict() for tally in tallies}


def warn_of_unused(tallies: Iterable[Tally], where: str, *, strict: bool = False) -> None:
    """Warn with a line for each tally that holds something unused, and name the first few; where a setting alone leaves
    it aside, say so.

    Args:
        tallies: what was counted.
        where: what it was counted in, for the message: a folder or a split of one.
        strict: whether anything unused is an error, but for what a setting leaves aside.

    Raises:
        UnusedError: something is not used, and `strict` is on.
    """
    lines = []
    for tally in tallies:
        if tally.is_whole:
            continue
        names = [name for of_reason in tally.not_used.values() for name in of_reason]
        shown = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
        line = f"{where}: {tally.line()} ({shown})"
        if tally.is_as_asked:
            log.info("%s", line)
        else:
            lines.append(line)
    if lines and strict:
        raise UnusedError("; ".join(lines))
    for line in lines:
        log.warning("%s", line)
