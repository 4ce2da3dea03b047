"""Settings that `prepare` and `import` share: how to split the images, and how to place the image files."""

import re
from dataclasses import dataclass
from typing import Literal

from flawmask.errors import FlawmaskError
from flawmask.settings import BadInput, Seed, require


@dataclass(frozen=True, kw_only=True)
class FolderSettings(Seed, BadInput):
    """How labelled images become a COCO folder."""

    train_ratio: float = 0.8
    """Share of each type's images used for training; the others are for validation. Test images are set aside first."""
    test_ratio: float = 0.0
    """Share of each type's images set aside first as the test split. No epoch or threshold is chosen on it."""
    folds: int = 1
    """Number of cross-validation folds: each in turn is for validation, the others for training. 1: use train_ratio."""
    fold: int | None = None
    """With --folds, the fold used for validation: 1 to folds. By default run uses every fold in turn."""
    group_by: str | None = None
    """Regular expression for the part in file names: '^(part[0-9]+)'. Images of a physical part stay in one split."""
    link: Literal["copy", "hardlink", "symlink"] = "copy"
    """Copy the image files or link to them. Their bytes never change."""

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
