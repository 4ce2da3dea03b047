"""What the models of a comparison share, and what is known of each: a file, so that what is finished stays finished."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flawmask.coco import CocoSplit, groups_of, read_split
from flawmask.errors import FlawmaskError
from flawmask.files import read_json
from flawmask.runs import POOLED
from flawmask.settings import Reading


class NotThereError(FlawmaskError):
    """What a model lives by is not there: it takes no part, and that is no failure."""


@dataclass(frozen=True)
class Ground:
    """What all models of a comparison are trained and judged on.

    Attributes:
        prepared: the COCO folder, or that of each fold.
        trained: the one to train on, with variants, for each of them.
        splits: which splits are judged, in their order; the last one's figures count.
        pooled: whether all folds are judged together.
        reading: how the records of their files are read; None as by default.
    """

    prepared: tuple[Path, ...]
    trained: tuple[Path, ...]
    splits: tuple[str, ...]
    pooled: bool
    reading: Reading | None = None

    @property
    def results(self) -> str:
        """The name of the results folder whose figures count."""
        return f"inference_{POOLED if self.pooled else self.splits[-1]}"

    def judged(self, folder: Path) -> CocoSplit:
        """Return the images whose figures count.

        Args:
            folder: of a detector, which holds those of all folds together.
        """
        folder, name = (folder, POOLED) if self.pooled else (self.prepared[0], self.splits[-1])
        return read_split(folder, name, self.reading)

    @property
    def groups(self) -> list[str] | None:
        """The group of each image whose figures count, in the order of the results; None where nothing is known of
        groups."""
        folders = self.prepared if self.pooled else self.prepared[:1]
        splits = (read_split(folder, self.splits[-1], self.reading) for folder in folders)
        return groups_of([image for split in splits for image in split.images])


@dataclass(frozen=True)
class Scored:
    """What a baseline says of an image.

    Attributes:
        score: 0 to 1, high for a defect.
        map: (h, w) float32, 0 to 1, the same of each place of the image; None where it does not say where.
    """

    score: float
    map: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Learned:
    """What it took to train a model.

    Attributes:
        seconds: of training.
        epochs: how often it saw every image.
        image_size: the shorter side of what it saw, in pixels.
        parameters: how many numbers it has.
        protocol: what it learnt from, as a clause.
        peak_bytes: the most memory meanwhile; None where the system does not say.
    """

    seconds: float
    epochs: int
    image_size: int
    parameters: int
    protocol: str
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Entry:
    """A model of a comparison.

    Attributes:
        name: the model's.
        results: its results folder, relative to the comparison's; None where it has none.
        checkpoint: its file, relative to the comparison's folder.
        checkpoint_bytes: that file's size.
        learned: what its training took; of several folds, of the longest one.
        reason: why there are no results; None where there are some.
        failed: whether that is a failure, and not something that was left out.
    """

    name: str
    results: str | None = None
    checkpoint: str | None = None
    checkpoint_bytes: int | None = None
    learned: Learned | None = None
    reason: str | None = None
    failed: bool = False


def entry_file(folder: Path, name: str) -> Path:
    """Return where a model's entry is in a comparison's folder."""
    return folder / f"{name}.json"


def read_entry(folder: Path, name: str) -> Entry | None:
    """Return a model's entry; None where there is none."""
    path = entry_file(folder, name)
    if not path.is_file():
        return None
    found = read_json(path)
    learned = Learned(**found["learned"]) if found["learned"] else None
    return Entry(**{**found, "learned": learned})
