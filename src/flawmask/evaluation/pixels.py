"""Pixel-level metrics: how well the score of each pixel tells defect from good, over all pixels of a split.

All metrics follow from three counts for each score: its good pixels, its defect pixels, and its defect pixels weighted
by 1 / area of their region. So images are counted one by one, and none is kept in memory.

Sources: AUROC is the trapezoidal area, and AP the step-wise sum of precision over recall, both as in scikit-learn.
AUPRO is the area under the per-region-overlap curve up to a false-positive rate, divided by that rate: Bergmann et al.,
"MVTec AD: A Comprehensive Real-World Dataset for Unsupervised Anomaly Detection", CVPR 2019, and International Journal
of Computer Vision 129, 2021. Regions are 8-connected, as in the authors' published evaluation.
"""

from array import array
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from flawmask.errors import FlawmaskError
from flawmask.masks import Mask

Floats = npt.NDArray[np.float64]
Keys = npt.NDArray[np.uint32]

PRO_LIMIT = 0.3
"""The usual limit of the false-positive rate for AUPRO."""

STRICT_PRO_LIMIT = 0.05
"""The limit for a production line that tolerates few false alarms."""

EXACT_SCORES = 2**21
"""Counts are exact for up to this many different scores."""

COARSE_BITS = 9
"""For more scores, this many of their last bits are dropped. This leaves 14 bits, relative to the nearer of 0 and 1."""

CURVE_POINTS = 200
"""The number of points of a curve that are kept for drawing."""

SCORE_BINS = 2048
"""For resampling, the scores of each image are kept in about this many bins."""

ROWS = 64
"""The number of resamples that are computed at once, to limit memory."""

HALF = np.uint32(np.float32(0.5).view(np.uint32))
"""The key of 0.5, see `_keys`."""

ZERO = np.uint32(2) * HALF
"""The key of 0, the last of all."""


class _Counts(NamedTuple):
    """The number of pixels with each score.

    Attributes:
        keys: (K,) the keys of the scores (see `_keys`), ascending, without duplicates: the highest score comes first.
        counts: (3, K): good pixels, defect pixels, and defect pixels weighted by 1 / area of their region.
    """

    keys: Keys
    counts: Floats


class PixelTally:
    """Counts the pixels of a split, image by image, in limited memory.

    The score of a pixel is between 0 and 1, usually 0 outside all detections.

    Metrics are exact for up to `EXACT_SCORES` different scores. With more, scores that agree in 14 bits, counted from
    the nearer of 0 and 1, count as equal. The results do not depend on the order of the images, or on computing metrics
    between them. Memory: at most about 600 MB for scores, and about 60 KB for each image.

    >>> tally = PixelTally()
    >>> defect = np.array([[True, False]])
    >>> tally.add("part.png", np.array([[0.9, 0.1]], dtype=np.float32), defect, defect)
    >>> tally.figures()["pixel_auroc"]
    1.0
    """

    def __init__(self) -> None:
        self._exact = [_Counts(np.array([ZERO]), np.zeros((3, 1)))]
        self._table: list[Floats] | None = None
        self._groups: list[_Counts] = []
        self._by_image: Floats | None = None
        self._hits = array("d")

    def add(self, name: str, scores: npt.NDArray[np.float32], truth: Mask, predicted: Mask) -> None:
        """Count an image.

        Args:
            name: the image's name in messages.
            scores: (height, width), 0 to 1: the defect score of each pixel.
            truth: (height, width) bool, the union of the true defects.
            predicted: (height, width) bool, the union of the defects at the verdict's threshold.

        Raises:
            FlawmaskError: a score is outside [0, 1] or not a number, or a mask is of another size than the scores.
        """
        for what, mask in (("true", truth), ("predicted", predicted)):
            if mask.shape != scores.shape:
                raise FlawmaskError(f"{name}: the {what} mask is {_size(mask)} but the score map is {_size(scores)}")
        lowest, highest = scores.min(), scores.max()
        if not (lowest >= 0 and highest <= 1):
            raise FlawmaskError(
                f"{name}: pixel scores reach from {lowest} to {highest}: each must be a number between 0 and 1"
            )
        bits = 0 if self._table is None else COARSE_BITS
        counted = _count(scores, truth, bits)
        self._by_image = None
        self._groups.append(_grouped(_Counts(counted.keys << np.uint32(bits), counted.counts)))
        hits, positives, defects = (int(np.count_nonzero(mask)) for mask in (truth & predicted, predicted, truth))
        self._hits.extend((hits, positives - hits, defects - hits))
        if self._table is not None:
            for row, counts in zip(self._table, counted.counts, strict=True):
                row[counted.keys] += counts
            return
        self._exact.append(counted)
        if sum(len(one.keys) for one in self._exact) > 2 * EXACT_SCORES:
            self._settle()

    def add_masks(self, hits: int, spurious: int, missed: int) -> None:
        """Count an image whose pixels have no scores: only `pixel_iou` and `pixel_dice` follow from it.

        Args:
            hits: the number of defect pixels that the predicted masks cover.
            spurious: the number of good pixels that they cover.
            missed: the number of defect pixels that they do not cover.
        """
        self._hits.extend((hits, spurious, missed))

    def figures(self) -> dict[str, float | None]:
        """Return the metrics over the pixels of all images, 0 to 1; None where one is undefined.

        Keys: pixel_auroc, pixel_ap, pixel_aupro (false-positive rate up to 0.3), pixel_aupro_05 (up to 0.05),
        pixel_iou and pixel_dice (of the predicted masks), pixel_f1_max, and pixel_f1_max_threshold: the highest
        threshold with that F1. All need a defect pixel; AUROC and AUPRO also need a good one.
        """
        keys, counts = self._settle()
        rates = _rates(counts) | _overlaps(np.array(self._hits).reshape(-1, 3).sum(0))
        values = {name: None if np.isnan(value) else float(value) for name, value in rates.items()}
        threshold = None if values["pixel_f1_max"] is None else _score(keys[int(np.argmax(_f1(counts)))])
        return {**values, "pixel_f1_max_threshold": threshold}

    def curves(self) -> dict[str, dict[str, list[float]]]:
        """Return `x` and `y` of each curve, at most 200 points; an undefined curve is missing.

        Keys: pixel_roc (true-positive over false-positive rate), pixel_pr (precision over recall; for AP, its points
        are joined by steps), pro (mean overlap of regions over the false-positive rate, up to 0.3).
        """
        good, defect, overlap = _cumulative(self._settle().counts)
        curves = {}
        if defect[-1]:
            recall, precision = defect[1:] / defect[-1], defect[1:] / np.maximum(good + defect, 1)[1:]
            curves["pixel_pr"] = _thinned(recall, precision, recall)
        if defect[-1] and good[-1]:
            rate, recall, pro = good / good[-1], defect / defect[-1], overlap / overlap[-1]
            curves["pixel_roc"] = _thinned(rate, recall, rate + recall)
            inside = int(np.searchsorted(rate, PRO_LIMIT))
            x = np.append(rate[:inside], PRO_LIMIT)
            y = np.append(pro[:inside], np.interp(PRO_LIMIT, rate, pro))
            curves["pro"] = _thinned(x, y, x / PRO_LIMIT + y)
        return curves

    def resampled(self, weights: npt.NDArray[Any]) -> dict[str, Floats]:
        """Return the metrics of `figures`, except the threshold, for weighted images. They serve bootstrap intervals.

        They are computed from about 2048 score bins for each image. With all weights 1, they differ from `figures` by
        less than 0.001.

        Args:
            weights: (B, N), how often each of the N images counts in each of B resamples, in the order of `add`.

        Returns:
            (B,) float64 for each metric, NaN where it is undefined.
        """
        weights = np.asarray(weights, dtype=np.float64)
        hits = np.array(self._hits).reshape(-1, 3)
        if not self._groups:  # no image has scores
            return _overlaps(weights @ hits)
        self._by_image = by_image = self._binned() if self._by_image is None else self._by_image
        parts = []
        for first in range(0, len(weights), ROWS):
            rows = weights[first : first + ROWS]
            parts.append(_rates(np.stack([rows @ counts for counts in by_image])) | _overlaps(rows @ hits))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _settle(self) -> _Counts:
        """Return the counts over all images. If there are too many different scores, switch to coarse ones."""
        if self._table is None:
            self._exact = [_merged(self._exact)]
            if len(self._exact[0].keys) <= EXACT_SCORES:
                return self._exact[0]
            exact = self._exact.pop()
            coarse, size = exact.keys >> np.uint32(COARSE_BITS), (int(ZERO) >> COARSE_BITS) + 1
            self._table = [
                np.bincount(coarse, row, minlength=size).astype(np.float64, copy=False) for row in exact.counts
            ]
        keys = np.flatnonzero((self._table[0] > 0) | (self._table[1] > 0))
        lowest_scores = np.minimum(((keys + 1) << COARSE_BITS) - 1, ZERO).astype(np.uint32)
        return _Counts(lowest_scores, np.stack([row[keys] for row in self._table]))

    def _binned(self) -> Floats:
        """Return the counts of each image in common score bins, (3, N, K), the bin with the highest scores first."""
        bins = _grouped(_merged(self._groups)).keys
        binned = np.zeros((3, len(self._groups), len(bins)))
        middles = bins[:-1] + (bins[1:] - bins[:-1] + 1) // 2
        for at, (keys, counts) in enumerate(self._groups):
            column = np.searchsorted(middles, keys, side="right")
            for row in range(3):
                binned[row, at] = np.bincount(column, counts[row], minlength=len(bins))
        return binned


def _size(array: npt.NDArray[Any]) -> str:
    return "x".join(str(side) for side in array.shape[::-1])


def _keys(scores: npt.NDArray[np.float32], dropped_bits: int) -> Keys:
    """Return the keys of scores, (K,) to (K,). The key is an integer; higher scores have lower keys.

    The bits of positive floats, read as integers, have the order of the floats, and are finest near 0. So the key of a
    score of 0.5 or more is the bits of 1 - score, which is exact. The key of a lower score is 2 * HALF minus its bits.
    Keys are therefore as fine near 1 as near 0.
    """
    positive = scores + np.float32(0)  # turns -0.0, which has other bits, into 0.0
    keys = np.where(positive >= 0.5, (np.float32(1) - positive).view(np.uint32), ZERO - positive.view(np.uint32))
    return np.asarray(keys >> np.uint32(dropped_bits))


def _score(key: np.uint32) -> float:
    """Return the score of a key."""
    return float(np.float32(1) - key.view(np.float32) if key <= HALF else (ZERO - key).view(np.float32))


def _count(scores: npt.NDArray[np.float32], truth: Mask, dropped_bits: int) -> _Counts:
    """Return the image's counts, with keys without their last bits."""
    flat = scores.astype(np.float32, copy=False).ravel()
    positive = flat[flat > 0]
    distinct, totals = _distinct(_keys(positive, dropped_bits), dense=dropped_bits > 0)
    distinct = np.append(distinct, _keys(np.zeros(1, np.float32), dropped_bits))
    totals = np.append(totals, flat.size - positive.size)
    pixels, overlap = _region_shares(truth)
    counts = np.zeros((3, len(distinct)))
    column = np.searchsorted(distinct, _keys(flat[pixels], dropped_bits))
    counts[1] = np.bincount(column, minlength=len(distinct))
    counts[2] = np.bincount(column, overlap, minlength=len(distinct))
    counts[0] = totals - counts[1]
    return _Counts(distinct, counts)


def _distinct(keys: Keys, dense: bool) -> tuple[Keys, npt.NDArray[np.int64]]:
    """Return the distinct keys, ascending, and how often each occurs.

    Args:
        keys: in any order.
        dense: whether they are so close together that counting is faster than sorting.
    """
    if not keys.size:
        return keys, np.zeros(0, np.int64)
    if dense:
        lowest = keys.min()
        totals = np.bincount(keys - lowest)
        places = np.flatnonzero(totals)
        return places.astype(np.uint32) + lowest, totals[places]
    keys = np.sort(keys)
    first = _first_of_each(keys)
    return keys[first], np.diff(first, append=keys.size)


def _first_of_each(keys: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the start of each run of equal keys. There must be at least one key."""
    return np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))


def _region_shares(truth: Mask) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return the flat positions of the defect pixels, and for each pixel 1 / area of its 8-connected region."""
    _, labels = cv2.connectedComponents(truth.astype(np.uint8), connectivity=8)
    pixels = np.flatnonzero(truth)
    region = labels.ravel()[pixels] - 1
    return pixels, 1 / np.bincount(region)[region]


def _merged(parts: list[_Counts]) -> _Counts:
    """Return the sum of counts."""
    keys = np.concatenate([part.keys for part in parts])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = _first_of_each(keys)
    # Row by row: NumPy is half as fast when it gathers and sums columns of a matrix.
    rows = [np.concatenate([part.counts[row] for part in parts])[order] for row in range(3)]
    return _Counts(keys[first], np.stack([np.add.reduceat(row, first) for row in rows]))


def _grouped(counted: _Counts) -> _Counts:
    """Return the counts in about `SCORE_BINS` runs of neighbouring keys. Each run becomes the key in its middle.

    Each run has about the same share of the defect pixels, of the regions, and of the logarithm of the false positives.
    The logarithm is there because precision, and AUPRO at its low limit, depend on the few good pixels with the highest
    scores. A key with more than such a share, such as that of 0, is a run of its own: moved only a little, it would
    change its order with keys of other images.
    """
    keys, counts = counted
    if len(keys) <= SCORE_BINS:
        return counted
    weight = counts[0] / np.maximum(np.cumsum(counts[0]), 1)
    weight = sum((row / max(row.sum(), 1e-9) for row in (weight, counts[1], counts[2])), np.zeros(len(keys)))
    position = np.cumsum(weight) * (SCORE_BINS / weight.sum())
    alone = weight * (SCORE_BINS / weight.sum()) > 1
    run = position.astype(np.int64) + np.cumsum(alone) + np.cumsum(np.append(False, alone[:-1]))
    first = _first_of_each(run)
    middle = (first + np.append(first[1:], len(keys)) - 1) // 2
    return _Counts(keys[middle], np.add.reduceat(counts, first, axis=1))


def _cumulative(counts: Floats) -> Floats:
    """Return, along the last axis, the counts of all scores that are at least as high; the first entry is 0."""
    total = np.zeros((*counts.shape[:-1], counts.shape[-1] + 1))
    np.cumsum(counts, axis=-1, out=total[..., 1:])
    return total


def _rates(counts: Floats) -> dict[str, Floats]:
    """Return AUROC, AP, both AUPRO and the highest F1 for counts (3, ..., K): each (...), NaN where undefined."""
    good, defect, overlap = _cumulative(counts)
    with np.errstate(invalid="ignore"):
        false_positives, recall, pro = (curve / curve[..., -1:] for curve in (good, defect, overlap))
        precision = defect / np.maximum(good + defect, 1)
        return {
            "pixel_auroc": _area(false_positives, recall, 1.0),
            "pixel_ap": (np.diff(recall) * precision[..., 1:]).sum(axis=-1),
            "pixel_aupro": _area(false_positives, pro, PRO_LIMIT),
            "pixel_aupro_05": _area(false_positives, pro, STRICT_PRO_LIMIT),
            "pixel_f1_max": _f1(counts).max(axis=-1),
        }


def _f1(counts: Floats) -> Floats:
    """Return F1 with each score as the threshold, for counts (3, ..., K): (..., K), NaN without a defect pixel."""
    good, defect = np.cumsum(counts[:2], axis=-1)
    truth = defect[..., -1:]
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(truth > 0, 2 * defect / (defect + good + truth), np.nan))


def _area(x: Floats, y: Floats, limit: float) -> Floats:
    """Return the mean height of curves up to x = `limit`. There, they are interpolated linearly.

    Args:
        x: (..., K) ascending from 0 to 1.
        y: (..., K).
        limit: above 0, at most 1.
    """
    whole = np.diff(x)
    width = np.maximum(np.minimum(x[..., 1:], limit) - x[..., :-1], 0)
    part = np.divide(width, whole, out=np.zeros_like(whole), where=whole > 0)
    height = y[..., :-1] + np.diff(y) * part / 2
    return np.asarray((width * height).sum(axis=-1) / limit)


def _overlaps(hits: Floats) -> dict[str, Floats]:
    """Return IoU and Dice for (..., 3) counts of true-positive, false-positive and false-negative pixels.

    They are NaN where there is no defect pixel.
    """
    hit, false, missed = np.moveaxis(hits, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        defined = np.where(hit + missed > 0, 1.0, np.nan)
        return {
            "pixel_iou": defined * (hit / (hit + false + missed)),
            "pixel_dice": defined * (2 * hit / (2 * hit + false + missed)),
        }


def _thinned(x: Floats, y: Floats, along: Floats) -> dict[str, list[float]]:
    """Return at most `CURVE_POINTS` points of a curve, at equal steps of the ascending `along`, with both ends."""
    steps = np.linspace(along[0], along[-1], CURVE_POINTS - 1)
    places = np.unique(np.append(np.searchsorted(along, steps), len(along) - 1))
    return {"x": x[places].tolist(), "y": y[places].tolist()}
