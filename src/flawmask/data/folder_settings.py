"""How labelled images become a COCO folder, wherever they come from: who trains, who validates, how files arrive."""

import re
from dataclasses import dataclass
from typing import Literal

from flawmask.errors import FlawmaskError
from flawmask.settings import BadInput, Seed, require


@dataclass(frozen=True, kw_only=True)
class FolderSettings(Seed, BadInput):
    """How labelled images become a COCO folder."""

    train_ratio: float = 0.8
    """Share of the images of each type that goes to training; the others validate. Without those held back for test."""
    test_ratio: float = 0.0
    """Share of the images of each type that is held back first, as a third split that chooses nothing: test."""
    folds: int = 1
    """Divide the images into so many parts; each in turn validates, and the others train. 1: split by train_ratio."""
    fold: int | None = None
    """With --folds, which part validates: 1 to folds. run takes them all in turn by default."""
    group_by: str | None = None
    """Keep photographs of one part on one side: what finds the part in the names, '^(part[0-9]+)' in part0012_a.png."""
    link: Literal["copy", "hardlink", "symlink"] = "copy"
    """How image files arrive, byte for byte in any case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.train_ratio < 1, f"--train_ratio is {self.train_ratio}: it must lie between 0 and 1")
        require(0 <= self.test_ratio < 1, f"--test_ratio is {self.test_ratio}: it must be 0 or more, and below 1")
        require(self.folds >= 1, f"--folds is {self.folds}: it must be 1 or more")
        within = self.fold is None or (self.folds > 1 and 1 <= self.fold <= self.folds)
        require(
            within,
            f"--fold is {self.fold}: with --folds {self.folds} it must be 1 to {self.folds}, and folds 2 or more",
        )
        try:
            re.compile(self.group_by or "")
        except re.error as error:
            raise FlawmaskError(f"--group_by {self.group_by!r} is not a regular expression: {error}") from None
