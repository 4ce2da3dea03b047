"""95 % intervals of metrics, and a test of whether two models differ.

Proportions have Wilson's interval. So has F1, which is a function of a proportion. The AUROC of images has Newcombe's.
All other intervals are bootstrapped over images, with defective and good images drawn separately. The images are the
sampling units, because instances and pixels of an image are not independent. If all verdicts are right, a bootstrapped
interval would have no width, but the formulas' intervals have one. docs/metrics.md shows how often each interval holds
the truth, as measured.

Where groups are known, that is, images of one part, the groups are the sampling units: whole groups are drawn, and
`by_group` has the formulas.
"""

import copy
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Interval = tuple[float, float]
Groups = npt.NDArray[np.int64]
"""(N,) the number of each image's group. Numbers start at 0, and each has an image."""

BLOCK = 2**22
"""The most numbers in a block of weights: 32 MB. With more images than that has room for, a block is one sample."""

LEVEL = 0.95
Z = 1.959963984540054
"""The normal quantile `scipy.stats.norm.ppf((1 + LEVEL) / 2)`. It is written out because importing SciPy takes longer
than printing a summary."""


def wilson(part: float, whole: float) -> Interval | None:
    """Return the 95 % interval of a proportion (Wilson, JASA 1927); None where `whole` is 0."""
    if whole == 0:
        return None
    share, spread = part / whole, Z * Z / whole
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / whole + spread / (4 * whole)) / (1 + spread)
    # For 0 of n and n of n, one bound is exactly 0 or 1. Rounding errors would move it a little.
    return 0.0 if part == 0 else centre - half, 1.0 if part == whole else centre + half


def f1_interval(tp: int, fp: int, fn: int) -> Interval | None:
    """Return the 95 % interval of F1 = 2 tp / (2 tp + fp + fn); None where the denominator is 0.

    F1 = 2 J / (1 + J), with the proportion J = tp / (tp + fp + fn). So the bounds of F1 follow from Wilson's bounds of
    J.
    """
    bounds = wilson(tp, tp + fp + fn)
    return None if bounds is None else (2 * bounds[0] / (1 + bounds[0]), 2 * bounds[1] / (1 + bounds[1]))


def auroc_interval(auroc: float, positives: float, negatives: float) -> Interval:
    """Return the 95 % interval of an area under the ROC curve (Newcombe, Statistics in Medicine 2006, method 5).

    Its variance is Hanley's and McNeil's (Radiology 1982) with the mean of the two sample sizes. It is computed at the
    bound, not at the observed area, as in Wilson's interval. So the interval has a width even for an area of 1.
    """
    from scipy.optimize import brentq

    spare = (positives + negatives) / 2 - 1

    def beyond(area: float) -> float:
        factor = 1 + spare * (1 - area) / (2 - area) + spare * area / (1 + area)
        return abs(area - auroc) - Z * math.sqrt(max(0.0, area * (1 - area) * factor) / (positives * negatives))

    inside = min(max(auroc, 1e-9), 1 - 1e-9)  # at 0 and 1 the variance is 0: these are roots, but not the bound
    low = 0.0 if beyond(0.0) <= 0 else float(brentq(beyond, 0.0, inside))
    high = 1.0 if beyond(1.0) <= 0 else float(brentq(beyond, inside, 1.0))
    return low, high


def resample(truth: Flags, resamples: int, seed: int, groups: Groups | None = None) -> Floats:
    """Return bootstrap weights, (resamples, N): how often each image is drawn.

    Images are drawn with replacement, separately from the defective and the good ones; the numbers of both stay the
    same. Where groups are known, whole groups are drawn in this way, separately from those with and those without a
    defective image.
    """
    return np.concatenate([*resample_blocks(truth, resamples, seed, groups), np.zeros((0, len(truth)))])


def resample_blocks(truth: Flags, resamples: int, seed: int, groups: Groups | None = None) -> Iterator[Floats]:
    """Yield the weights of `resample`, a few rows at a time, because all those of a million images take 8 GB."""
    units = np.arange(len(truth)) if groups is None else groups
    draw = np.random.default_rng(seed)
    defective = holds_defect(truth, units)
    blocks = block_sizes(resamples, len(truth))
    drawers = []
    for stratum in (defective, ~defective):
        if count := int(stratum.sum()):
            drawers.append((stratum, np.full(count, 1 / count), copy.deepcopy(draw)))
            if stratum is defective:  # the good ones are drawn with the numbers that follow
                for size in blocks:
                    draw.multinomial(count, drawers[0][1], size=size)
    for size in blocks:
        weights = np.zeros((size, len(defective)))
        for stratum, shares, generator in drawers:
            weights[:, stratum] = generator.multinomial(len(shares), shares, size=size)
        yield weights if groups is None else weights[:, groups]


def block_sizes(resamples: int, images: int) -> list[int]:
    """Return the number of rows in each block of weights. It depends on nothing else, so figures are reproducible."""
    rows = max(1, BLOCK // max(1, images))
    return [min(rows, resamples - first) for first in range(0, resamples, rows)]


def holds_defect(truth: Flags, groups: Groups) -> Flags:
    """Return whether each group has a defective image, (k,)."""
    return np.asarray(np.bincount(groups, truth) > 0)


def widened(truth: Flags, groups: Groups | None, level: float = LEVEL) -> float | None:
    """Return the share of bootstrapped values that an interval of the given level must hold.

    It is the level itself for independent images, and more than the level for a small number of groups. It is None for
    too few groups.

    The variance of resampled groups is too small by a factor of (k - 1) / k, and it is itself an estimate (Hesterberg,
    The American Statistician 2015). So the share is that of a normal distribution within Student's quantile for k - s
    degrees of freedom, times the square root of k / (k - s). Here k is the number of groups and s that of strata.
    """
    from scipy.special import ndtr, stdtrit

    if groups is None:
        return level
    defective = holds_defect(truth, groups)
    freedom = len(defective) - len(np.unique(defective))
    if freedom < 1:
        return None
    reach = stdtrit(freedom, (1 + level) / 2) * math.sqrt(len(defective) / freedom)
    return float(2 * ndtr(reach) - 1)


def percentiles(values: Floats, level: float | None = LEVEL) -> Interval | None:
    """Return the bounds of the middle 95 %, or of another share, of the bootstrapped values, (B,).

    The result is None if more than one value in twenty is undefined, or if `level` is None.
    """
    defined = values[~np.isnan(values)]
    if level is None or not len(defined) or len(defined) < LEVEL * len(values):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(right: Flags, other_right: Flags, groups: Groups | None = None) -> float:
    """Return McNemar's exact, two-sided p for two models' verdicts on the same images, each (N,) whether right.

    Only images count that exactly one model gets right. If the models were equally good, each of the two would be right
    with the same probability (McNemar, Psychometrika 1947). p is 1 if there is no such image.

    Where groups are known, the test is over whole groups. The lead of a group is the number of images by which the
    first model is ahead. If the models were equally good, each lead would be positive or negative with the same
    probability. p is the share of all combinations of signs whose sum is at least as far from 0 (Fisher's randomisation
    test). For groups of single images, this is McNemar's p.
    """
    if groups is not None:
        return _sign_flips(np.bincount(groups, right.astype(float) - other_right).astype(int))
    from scipy.stats import binomtest

    folder_lock, only_other = int((right & ~other_right).sum()), int((other_right & ~right).sum())
    if folder_lock + only_other == 0:
        return 1.0
    return float(binomtest(folder_lock, folder_lock + only_other, 0.5).pvalue)


def _sign_flips(leads: npt.NDArray[np.int_]) -> float:
    """Return the probability that the sum is at least as far from 0 when each lead gets a random sign."""
    total = int(np.abs(leads).sum())
    probabilities = np.zeros(2 * total + 1)  # of each sum from -total to total
    probabilities[total] = 1.0
    for lead in np.abs(leads[leads != 0]):
        # No sum is beyond either end, so `roll` carries nothing over.
        probabilities = (np.roll(probabilities, lead) + np.roll(probabilities, -lead)) / 2
    sums = np.arange(-total, total + 1)
    return min(1.0, float(probabilities[np.abs(sums) >= abs(leads.sum())].sum()))
