"""The data that the models of a comparison share, and the entry of each model. Entries are files: a finished model
stays finished when a comparison is interrupted."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flawmask.coco import CocoSplit, groups_of, read_split
from flawmask.errors import FlawmaskError
from flawmask.files import read_json
from flawmask.runs import POOLED
from flawmask.settings import Reading


class MissingRequirementError(FlawmaskError):
    """A model lacks a package, weights or images that it needs. It is left out; this is not a failure."""


@dataclass(frozen=True)
class SharedData:
    """The images on which all models of a comparison are trained and evaluated.

    Attributes:
        prepared_dirs: the COCO folder; of a cross-validation, the folder of each fold.
        training_dirs: for each of these, the COCO folder to train on, augmented variants included.
        splits: the splits to evaluate, in this order. The metrics of the last one count.
        pooled: whether the images of all folds are evaluated together.
        reading: how the records of COCO files are read; None for the default.
    """

    prepared_dirs: tuple[Path, ...]
    training_dirs: tuple[Path, ...]
    splits: tuple[str, ...]
    pooled: bool
    reading: Reading | None = None

    @property
    def results_name(self) -> str:
        """The name of the results folder whose metrics count."""
        return f"inference_{POOLED if self.pooled else self.splits[-1]}"

    def evaluated_split(self, run_dir: Path) -> CocoSplit:
        """Return the split whose metrics count.

        Args:
            run_dir: the run folder of a detector. Of a cross-validation, it holds the images of all folds as one split.
        """
        folder, name = (run_dir, POOLED) if self.pooled else (self.prepared_dirs[0], self.splits[-1])
        return read_split(folder, name, self.reading)

    @property
    def groups(self) -> list[str] | None:
        """The group of each image whose metrics count, in the order of the results; None where groups are unknown."""
        folders = self.prepared_dirs if self.pooled else self.prepared_dirs[:1]
        splits = (read_split(folder, self.splits[-1], self.reading) for folder in folders)
        return groups_of([image for split in splits for image in split.images])


@dataclass(frozen=True)
class ImageScore:
    """The score that a baseline gives an image.

    Attributes:
        score: 0 to 1, high for a defect.
        map: (h, w) float32, 0 to 1: the score of each place of the image; None for a baseline without such a map.
    """

    score: float
    map: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class TrainingSummary:
    """What training a model took.

    Attributes:
        seconds: training time.
        epochs: how often each image was shown.
        image_size: the shorter side of the network's input, in pixels.
        parameters: number of weights.
        protocol: what the model was trained on, as a clause.
        peak_bytes: peak memory during training; None where the system does not report it.
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
        name: the model's name.
        results: its results folder, relative to the comparison's folder; None where there are no results.
        checkpoint: its checkpoint file, relative to the comparison's folder.
        checkpoint_bytes: the size of that file.
        learned: what its training took; of a cross-validation, the fold that took longest.
        reason: why there are no results; None where there are results.
        failed: whether `reason` is a failure; False where the model was left out.
    """

    name: str
    results: str | None = None
    checkpoint: str | None = None
    checkpoint_bytes: int | None = None
    learned: TrainingSummary | None = None
    reason: str | None = None
    failed: bool = False


def entry_file(folder: Path, name: str) -> Path:
    """Return the path of a model's entry in a comparison's folder."""
    return folder / f"{name}.json"


def read_entry(folder: Path, name: str) -> Entry | None:
    """Return a model's entry; None where there is none."""
    path = entry_file(folder, name)
    if not path.is_file():
        return None
    content = read_json(path)
    learned = TrainingSummary(**content["learned"]) if content["learned"] else None
    return Entry(**{**content, "learned": learned})
