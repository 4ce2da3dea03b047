"""Predictions of any number of images, of which only one is in memory at a time."""

import pickle
from collections.abc import Sequence
from threading import Lock
from typing import BinaryIO, overload

import numpy as np

from flawmask.inference.calibration import Calibration
from flawmask.prediction import Instance, Prediction


class StoredPredictions(Sequence[Prediction]):
    """One prediction for each image of a split, in a temporary file.

    Stored predictions come in any order, and metrics read them in the split's order, several times. So each is copied
    to a file once, and its place there is kept: 8 bytes for each image.

    They hold masks, not score maps: `Prediction.score_map` would be another one than the network's.
    """

    def __init__(self, file: BinaryIO, count: int) -> None:
        """Make room for the predictions of so many images in an empty file, which must stay open."""
        self._file, self._lock = file, Lock()
        self._starts = np.full(count, -1, dtype=np.int64)
        self._calibrations: Sequence[Calibration | None] | None = None

    def put(self, at: int, prediction: Prediction) -> None:
        """Store the prediction of the image at a place of the split."""
        self._starts[at] = self._file.seek(0, 2)
        instances = [(one.label, one.score, one.box, one.rle, one.area) for one in prediction.instances]
        content = (prediction.height, prediction.width, instances, prediction.has_masks, prediction.classes)
        pickle.dump(content, self._file, pickle.HIGHEST_PROTOCOL)

    def has(self, at: int) -> bool:
        """Return whether there is a prediction for the image at this place."""
        return bool(self._starts[at] >= 0)

    def kept(self, places: Sequence[int]) -> "StoredPredictions":
        """Return the predictions of some images."""
        some = StoredPredictions(self._file, 0)
        some._lock, some._starts = self._lock, self._starts[list(places)]
        return some

    def calibrated(self, calibrations: Sequence[Calibration | None]) -> "StoredPredictions":
        """Return the same predictions with a calibration for each image."""
        same = self.kept(range(len(self)))
        same._calibrations = calibrations
        return same

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._starts)

    @overload
    def __getitem__(self, at: int) -> Prediction: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Prediction]: ...
    def __getitem__(self, at: int | slice) -> Prediction | Sequence[Prediction]:
        """Return the prediction for an image."""
        if isinstance(at, slice):
            return [self[one] for one in range(len(self))[at]]
        with self._lock:
            self._file.seek(self._starts[at])
            height, width, instances, has_masks, classes = pickle.load(self._file)
        calibration = None if self._calibrations is None else self._calibrations[at]
        return Prediction(
            height,
            width,
            tuple(Instance(*one) for one in instances),
            has_masks=has_masks,
            classes=classes,
            calibration=calibration,
        )
