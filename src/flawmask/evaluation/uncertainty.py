"""How far a figure may be from the truth: 95 % intervals, and whether two models differ.

Proportions have Wilson's interval, and so has F1, which is a function of one; the AUROC of images has Newcombe's. All
else is bootstrapped over images, defective and good ones apart: an image is the unit that was sampled, its instances
and pixels are not independent of each other. Where everything went right, a bootstrap has nothing to vary and gives an
interval of no width; the formulas do not. docs/metrics.md says how often each interval holds the truth, measured.

Where groups are known, images of one part, the group is that unit: whole groups are drawn, and `by_group` has the
formulas.
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Interval = tuple[float, float]
Groups = npt.NDArray[np.int64]
"""(N,) the number of each image's group, from 0 on, each of which has an image."""

LEVEL = 0.95
Z = 1.959963984540054
"""How many standard deviations of a normal distribution hold `LEVEL` of it: `scipy.stats.norm.ppf((1 + LEVEL) / 2)`,
written out since importing SciPy takes longer than printing a summary."""


def wilson(part: float, whole: float) -> Interval | None:
    """Return the 95 % interval of a proportion (Wilson, JASA 1927); None where there is nothing to divide by."""
    if whole == 0:
        return None
    share, spread = part / whole, Z * Z / whole
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / whole + spread / (4 * whole)) / (1 + spread)
    # At 0 of n and n of n the bounds are 0 and 1 exactly; rounding would put them a hair beside.
    return 0.0 if part == 0 else centre - half, 1.0 if part == whole else centre + half


def f1_interval(tp: int, fp: int, fn: int) -> Interval | None:
    """Return the 95 % interval of F1 = 2 tp / (2 tp + fp + fn); None where there is nothing to divide by.

    With J = tp / (tp + fp + fn), a proportion, F1 = 2 J / (1 + J): Wilson's bounds of J, carried over.
    """
    bounds = wilson(tp, tp + fp + fn)
    return None if bounds is None else (2 * bounds[0] / (1 + bounds[0]), 2 * bounds[1] / (1 + bounds[1]))


def auroc_interval(auroc: float, positives: float, negatives: float) -> Interval:
    """Return the 95 % interval of an area under the ROC curve (Newcombe, Statistics in Medicine 2006, method 5).

    Its variance is Hanley's and McNeil's (Radiology 1982) with the groups' sizes averaged, taken not at the area that
    was seen but at the bound itself, as Wilson does: so the interval has a width even where the area is 1.
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
    """Return bootstrap weights, (resamples, N): how often each image is drawn, as many defective and good ones as there
    are, with replacement.

    Where groups are known, whole groups are drawn, with all of their images: as many that hold a defective image, and
    as many that hold none, as there are.
    """
    units = np.arange(len(truth)) if groups is None else groups
    draw = np.random.default_rng(seed)
    defective = holds_defect(truth, units)
    weights = np.zeros((resamples, len(defective)))
    for stratum in (defective, ~defective):
        if count := int(stratum.sum()):
            weights[:, stratum] = draw.multinomial(count, np.full(count, 1 / count), size=resamples)
    return weights if groups is None else weights[:, groups]


def holds_defect(truth: Flags, groups: Groups) -> Flags:
    """Return whether each group has a defective image, (k,)."""
    return np.asarray(np.bincount(groups, truth) > 0)


def widened(truth: Flags, groups: Groups | None, level: float = LEVEL) -> float | None:
    """Return which share of the bootstrapped values makes an interval of a level: more than the level where groups are
    few. None where they are too few for any interval.

    Resampled groups vary too little by a factor of (k - 1) / k, and the variance itself is an estimate (Hesterberg, The
    American Statistician 2015). So the bounds are where a normal distribution has Student's quantile of
    k - s degrees of freedom, times the root of k / (k - s), s being the strata that k groups are drawn from.
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
    """Return the middle 95 %, or another share, of the bootstrapped values, (B,); None where more than one in twenty is
    undefined, or there is no such share."""
    known = values[~np.isnan(values)]
    if level is None or not len(known) or len(known) < LEVEL * len(values):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(right: Flags, other_right: Flags, groups: Groups | None = None) -> float:
    """Return McNemar's exact, two-sided p for two models' verdicts on the same images, each (N,) whether right.

    Only images that exactly one of them gets right count: were the models equally good, either would be as likely
    (McNemar, Psychometrika 1947). 1 where there is no such image.

    Where groups are known, it is the same of whole groups: were the models equally good, the lead of one over the other
    in a group, in images, would be as likely that of the other. p is the share of all ways to give the leads their
    signs that end at least as far from 0 (Fisher's randomisation test). Of groups of one image it is McNemar's.
    """
    if groups is not None:
        return _sign_flips(np.bincount(groups, right.astype(float) - other_right).astype(int))
    from scipy.stats import binomtest

    only_one, only_other = int((right & ~other_right).sum()), int((other_right & ~right).sum())
    if only_one + only_other == 0:
        return 1.0
    return float(binomtest(only_one, only_one + only_other, 0.5).pvalue)


def _sign_flips(leads: npt.NDArray[np.int_]) -> float:
    """Return how likely a sum of these numbers is at least as far from 0, each with either sign at even odds."""
    most = int(np.abs(leads).sum())
    likely = np.zeros(2 * most + 1)  # of each sum from -most to most
    likely[most] = 1.0
    for lead in np.abs(leads[leads != 0]):
        likely = (np.roll(likely, lead) + np.roll(likely, -lead)) / 2  # no sum is beyond an end, so none comes round
    sums = np.arange(-most, most + 1)
    return min(1.0, float(likely[np.abs(sums) >= abs(leads.sum())].sum()))
