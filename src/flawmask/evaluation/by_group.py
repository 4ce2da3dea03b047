"""95 % intervals where images come in groups, several of one part, and are not independent of each other.

Each follows from sums over groups: what varies between groups is all that tells how sure a figure is. The variance that
is taken from them is an estimate; so Student's quantile takes the place of the normal one, with as many degrees of
freedom as that variance seems to have (Pan and Wall, Statistics in Medicine 2002). docs/metrics.md has the formulas,
and how often each interval holds the truth.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from flawmask.evaluation import uncertainty
from flawmask.evaluation.ranking import auroc, rank
from flawmask.evaluation.uncertainty import LEVEL, Groups, Interval, Z

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

LEAST_SPREAD = 1e-6
"""A smaller standard deviation is none, but for rounding."""


def numbered(names: Sequence[str] | None) -> Groups | None:
    """Return the groups of N images by number, (N,), from their names; None where nothing is known of groups."""
    return None if names is None else np.unique(np.array(names, dtype=str), return_inverse=True)[1].astype(np.int64)


def wilson(part: Floats, whole: Floats, defective: Flags) -> Interval | None:
    """Return the 95 % interval of a proportion of images: Wilson's, of as many images as tell as much.

    Args:
        part: (k,) the images of each group that count.
        whole: (k,) the images of each group that they are a part of, 0 or more.
        defective: (k,) whether each group has a defective image.

    Returns:
        The bounds; None where there is no image to divide by. Where no group has two images, those of
        `uncertainty.wilson`.
    """
    images = float(whole.sum())
    if not images:
        return None
    told = images / design_effect(part, whole, defective)
    return uncertainty.wilson(float(part.sum()) / images * told, told)


def design_effect(part: Floats, whole: Floats, defective: Flags) -> float:
    """Return how many images tell as much as one that is independent of all others, from 1 on.

    It is the variance of the ratio, linearised, over that of a proportion of independent images (Rao and Scott,
    Biometrics 1992), times the square of Student's quantile over the normal one. Groups vary about the mean of their
    stratum: those with a defective image and those without are there in numbers that somebody chose. It lies between 1,
    where images of a group are as different as any, and `sum(whole ** 2) / sum(whole)`, where all of them agree. It is
    the latter where nothing can be estimated: where every image counts, or none, or each stratum is one group.

    Args:
        part: (k,) the images of each group that count.
        whole: (k,) the images of each group that they are a part of; of some group at least one. That a group has none
            may be chance, as where they are the rejected ones.
        defective: (k,) whether each group has a defective image.
    """
    images = whole.sum()
    share = part.sum() / images
    all_agree = float((whole**2).sum() / images)
    strata = [stratum for stratum in (defective, ~defective) if whole[stratum].any()]
    if sum(map(np.count_nonzero, strata)) <= len(strata) or share in (0, 1):
        return all_agree
    apart = np.concatenate([_about_mean((part - share * whole)[stratum]) for stratum in strata])
    quantile = student(apart, len(strata))
    estimated = (apart**2).sum() / (images * share * (1 - share)) * (quantile / Z) ** 2
    return min(max(1.0, float(estimated)), all_agree)


def _about_mean(apart: Floats) -> Floats:
    """Return how far each group of a stratum is from their mean, scaled so that the squares add up to the variance of
    the stratum's sum. A single group stays as far as it is from what is expected of it."""
    count = len(apart)
    return apart if count == 1 else (apart - apart.mean()) * math.sqrt(count / (count - 1))


def student(apart: Floats, strata: int = 1) -> float:
    """Return Student's quantile for a variance that is the sum of k groups' squares.

    Its degrees of freedom are 2 / (sum(square ** 2) / sum(square) ** 2 - 1 / k), from 1 to k less the strata: about k
    where groups vary as a normal distribution does, and few where few groups make up most of the variance.

    Args:
        apart: (k,) how far each group is from what is expected of it.
        strata: how many kinds of groups there are, fewer than groups.
    """
    from scipy.special import stdtrit

    squares = apart**2
    freedom = most = len(squares) - strata
    if total := squares.sum():
        uneven = (squares**2).sum() / total**2 - 1 / len(squares)
        freedom = most if uneven * most <= 2 else max(1.0, 2 / uneven)
    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def bootstrap(
    figures: Callable[[Floats], Mapping[str, Floats]],
    truth: Flags,
    groups: Groups | None,
    resamples: int,
    seed: int,
) -> dict[str, Interval | None]:
    """Return the bootstrapped 95 % interval of each figure, by its key: over groups where these are known.

    Args:
        figures: returns each figure, (B,), of weights, (B, N).
        truth: (N,) whether each image is defective.
        groups: (N,) its group; None where nothing is known of groups.
        resamples: how many samples are drawn; without any there is no interval.
        seed: decides them.
    """
    if not resamples:
        return {}
    weights = uncertainty.resample(truth, resamples, seed, groups)
    if groups is None:
        return {key: uncertainty.percentiles(drawn) for key, drawn in figures(weights).items()}
    weights = np.vstack((np.ones(len(truth)), weights))
    return {key: bootstrap_interval(drawn, weights, truth, groups) for key, drawn in figures(weights).items()}


def bootstrap_interval(values: Floats, weights: Floats, truth: Flags, groups: Groups) -> Interval | None:
    """Return the 95 % interval of a figure from 0 to 1, from what it is where whole groups are drawn.

    It is symmetric on the logit, as far as Student's quantile times the standard deviation of the drawn values, about
    the figure less its bias, which is how far the mean of the drawn values is from it. Percentiles would have that bias
    twice, and no width where the figure is near 1. Where nothing varies, or the figure is 0 or 1, it is Wilson's, of as
    many images as there are groups with a defective, or with a good image, whichever are fewer.

    Args:
        values: (1 + B,) the figure itself, then that of each drawn sample, NaN where it is undefined.
        weights: (1 + B, N) of `resample`, after a row of ones.
        truth: (N,) whether each image is defective.
        groups: (N,) its group.

    Returns:
        The bounds; None where more than one sample in twenty has no such figure, or the groups are too few.
    """
    from scipy.special import expit

    value, known = float(values[0]), ~np.isnan(values[1:])
    drawn = values[1:][known]
    strata = len(np.unique(uncertainty.holds_defect(truth, groups)))
    count = int(groups.max()) + 1
    if np.isnan(value) or not len(drawn) or len(drawn) < LEVEL * len(known) or count <= strata:
        return None
    spread = float(drawn.std()) * math.sqrt(count / (count - strata))
    if spread < LEAST_SPREAD or not LEAST_SPREAD < value < 1 - LEAST_SPREAD:
        held = min(len(np.unique(groups[kind])) for kind in (truth, ~truth) if kind.any())
        return uncertainty.wilson(min(max(value, 0.0), 1.0) * held, held)
    times = weights[1:, np.unique(groups, return_index=True)[1]][known]
    apart = (drawn - drawn.mean()) @ (times - 1)  # the infinitesimal jackknife (Efron, JASA 2014), but for a factor
    slope = value * (1 - value)
    centre = math.log(value / (1 - value)) - (float(drawn.mean()) - value) / slope
    half = student(apart, strata) * spread / slope
    low, high = (float(expit(bound)) for bound in (centre - half, centre + half))
    return min(low, value), max(high, value)


def f1_interval(tp: Floats, fp: Floats, fn: Floats, defective: Flags) -> Interval | None:
    """Return the 95 % interval of F1 = 2 J / (1 + J), from that of J = tp / (tp + fp + fn); None where there is nothing
    to divide by.

    Args:
        tp: (k,) the true positives of each group; `fp` and `fn` likewise.
        fp: the false positives.
        fn: the false negatives.
        defective: whether it has a defective image.
    """
    bounds = wilson(tp, tp + fp + fn, defective)
    return None if bounds is None else (2 * bounds[0] / (1 + bounds[0]), 2 * bounds[1] / (1 + bounds[1]))


def auroc_interval(truth: Flags, scores: Floats, groups: Groups) -> Interval:
    """Return the 95 % interval of the area under the ROC curve, from Obuchowski's variance of its logit.

    Where that variance cannot be had, at an area of 0 or 1 above all, it is Newcombe's, of as many defective and good
    images as if all images of a group agreed.

    Args:
        truth: (N,) whether each image is defective; both kinds are there.
        scores: (N,) its score.
        groups: (N,) its group.
    """
    area = float(auroc(rank(truth, scores))[0])
    from scipy.special import expit

    defective, good = _components(truth, scores, groups)
    variance = auroc_variance(truth, scores, groups)
    if variance < LEAST_SPREAD**2:
        told = (float(kind.sum() ** 2 / (np.bincount(groups, kind) ** 2).sum()) for kind in (truth, ~truth))
        return uncertainty.auroc_interval(area, *told)
    odds = math.log(area / (1 - area))
    half = student(defective + good) * math.sqrt(variance) / (area * (1 - area))
    return float(expit(odds - half)), float(expit(odds + half))


def auroc_variance(truth: Flags, scores: Floats, groups: Groups) -> float:
    """Return the variance of the area under the ROC curve where images come in groups (Obuchowski, Biometrics 1997).

    With single images it is DeLong's (Biometrics 1988).

    Args:
        truth: (N,) whether each image is defective; both kinds are there.
        scores: (N,) its score.
        groups: (N,) its group.

    Returns:
        The variance; 0 where it cannot be estimated: the area is 0 or 1, or all defective or all good images are of one
        group.
    """
    defective, good = _components(truth, scores, groups)
    held = [int((np.bincount(groups, kind) > 0).sum()) for kind in (truth, ~truth)]
    if min(held) < 2:
        return 0.0
    of_defective, of_good, of_all = (count / (count - 1) for count in (*held, len(defective)))
    variance = of_defective * (defective**2).sum() + of_good * (good**2).sum() + 2 * of_all * (defective * good).sum()
    return max(0.0, float(variance))


def _components(truth: Flags, scores: Floats, groups: Groups) -> tuple[Floats, Floats]:
    """Return by how much the defective, and the good, images of each group make the area differ from what it would be
    if they were as all others are, (k,) each: the sums of DeLong's structural components, less the area."""
    count = int(groups.max()) + 1
    high, low = scores[truth], scores[~truth]
    above = _share_below(high, low)
    below = 1 - _share_below(low, high)
    area = above.mean()
    return (
        np.bincount(groups[truth], above - area, count) / len(high),
        np.bincount(groups[~truth], below - area, count) / len(low),
    )


def _share_below(scores: Floats, others: Floats) -> Floats:
    """Return which share of the others is below each score, ties half."""
    ordered = np.sort(others)
    below = (np.searchsorted(ordered, scores, side) for side in ("left", "right"))
    return np.asarray(sum(below) / (2 * len(others)))
