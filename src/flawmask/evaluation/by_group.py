"""95 % intervals where images come in groups: several images of one part, which are not independent of each other.

Each interval follows from sums over groups: only the variation between groups tells how certain a metric is. The
variance between them is an estimate. So Student's quantile replaces the normal one, with the degrees of freedom that
this estimate has (Pan and Wall, Statistics in Medicine 2002). docs/metrics.md has the formulas, and how often each
interval holds the truth.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask.evaluation import uncertainty
from flawmask.evaluation.ranking import auroc, rank
from flawmask.evaluation.uncertainty import LEVEL, Groups, Interval, Z
from flawmask.launch import usable_cores
from flawmask.progress import track

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MIN_SPREAD = 1e-6
"""A smaller standard deviation counts as 0: it comes from rounding."""

MAX_LOGIT_SPREAD = 2
"""The largest standard deviation on the logit scale for which an interval on that scale means something. The interval
of a figure of 10 % reaches from about 0.2 % to 85 % there."""


def numbered(names: Sequence[str] | None) -> Groups | None:
    """Return the group numbers of N images, (N,), from the names of their groups; None where groups are unknown."""
    return None if names is None else np.unique(np.array(names, dtype=str), return_inverse=True)[1].astype(np.int64)


def wilson(part: Floats, whole: Floats, defective: Flags) -> Interval | None:
    """Return the 95 % interval of a proportion of images: Wilson's, for the effective number of independent images.

    Args:
        part: (k,) the numerator of each group: how many of its images count.
        whole: (k,) the denominator of each group: of how many images, 0 or more.
        defective: (k,) whether each group has a defective image.

    Returns:
        The bounds; None where the sum of `whole` is 0. If no group has two images, they are those of
        `uncertainty.wilson`.
    """
    images = float(whole.sum())
    if not images:
        return None
    effective = images / design_effect(part, whole, defective)
    return uncertainty.wilson(float(part.sum()) / images * effective, effective)


def design_effect(part: Floats, whole: Floats, defective: Flags) -> float:
    """Return the design effect: how many images carry as much information as one independent image, 1 or more.

    It is the linearised variance of the ratio, divided by the variance of a proportion of independent images (Rao and
    Scott, Biometrics 1992), times the squared ratio of Student's quantile to the normal one. There are two strata,
    groups with and without a defective image, because somebody chose the numbers of both. So the variance is taken
    about the mean of each stratum.

    The result is 1 if images of a group differ as much as any images. It is `sum(whole ** 2) / sum(whole)` if the
    images of a group all agree. It is the latter, too, if nothing can be estimated: where all images count, or none, or
    each stratum is a single group.

    Args:
        part: (k,) the numerator of each group: how many of its images count.
        whole: (k,) the denominator of each group; at least one is not 0. It may be 0 by chance: the number of rejected
            images, for example.
        defective: (k,) whether each group has a defective image.
    """
    images = whole.sum()
    share = part.sum() / images
    all_agree = float((whole**2).sum() / images)
    strata = [stratum for stratum in (defective, ~defective) if whole[stratum].any()]
    if sum(map(np.count_nonzero, strata)) <= len(strata) or share in (0, 1):
        return all_agree
    deviations = np.concatenate([_about_mean((part - share * whole)[stratum]) for stratum in strata])
    quantile = student(deviations, len(strata))
    estimated = (deviations**2).sum() / (images * share * (1 - share)) * (quantile / Z) ** 2
    return min(max(1.0, float(estimated)), all_agree)


def _about_mean(deviations: Floats) -> Floats:
    """Return the deviations of a stratum's groups about their mean, scaled so that their squares add up to the variance
    of the stratum's sum. The deviation of a single group stays as it is."""
    count = len(deviations)
    return deviations if count == 1 else (deviations - deviations.mean()) * math.sqrt(count / (count - 1))


def student(deviations: Floats, strata: int = 1) -> float:
    """Return Student's quantile for a variance that is the sum of the squared deviations of k groups.

    Its degrees of freedom are 2 / (sum(square ** 2) / sum(square) ** 2 - 1 / k), at least 1 and at most k minus the
    number of strata. They are about k where the deviations are normally distributed, and few where a few groups make up
    most of the variance.

    Args:
        deviations: (k,) the deviation of each group from its expected value.
        strata: the number of strata, less than k.
    """
    from scipy.special import stdtrit

    squares = deviations**2
    freedom = max_freedom = len(squares) - strata
    if total := squares.sum():
        unevenness = (squares**2).sum() / total**2 - 1 / len(squares)
        freedom = max_freedom if unevenness * max_freedom <= 2 else max(1.0, 2 / unevenness)
    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def bootstrap(
    figures: Callable[[Floats], Mapping[str, Floats]],
    truth: Flags,
    groups: Groups | None,
    resamples: int,
    seed: int,
) -> dict[str, Interval | None]:
    """Return the bootstrapped 95 % interval of each metric, by its key: over groups where these are known.

    Args:
        figures: a function that returns each metric, (B,), for weights, (B, N).
        truth: (N,) whether each image is defective.
        groups: (N,) its group; None where groups are unknown.
        resamples: the number of bootstrap samples; 0 for no intervals.
        seed: the seed of the samples.
    """
    from flawmask.inference.stream import map_in_order  # the table of metrics imports this module, and must be quick

    if not resamples:
        return {}
    first = None if groups is None else np.unique(groups, return_index=True)[1]
    blocks = [] if groups is None else [figures(np.ones((1, len(truth))))]
    times_drawn = []

    def of_block(weights: Floats) -> tuple[Mapping[str, Floats], npt.NDArray[np.uint16]]:
        return figures(weights), weights[:, [] if first is None else first].astype(np.uint16)

    drawn, threads = uncertainty.resample_blocks(truth, resamples, seed, groups), usable_cores()
    total = len(uncertainty.block_sizes(resamples, len(truth)))
    with closing(map_in_order(of_block, drawn, threads, threads)) as done:
        for block, times in track(done, "resampling", total=total):
            blocks.append(block)
            times_drawn.append(times)
    values = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    if groups is None:
        return {key: uncertainty.percentiles(of_key) for key, of_key in values.items()}
    drawn_groups = np.concatenate(times_drawn)
    return {key: bootstrap_interval(of_key, drawn_groups, truth, groups) for key, of_key in values.items()}


def bootstrap_interval(values: Floats, times_drawn: npt.NDArray[Any], truth: Flags, groups: Groups) -> Interval | None:
    """Return the 95 % interval of a metric between 0 and 1, from its values for resampled groups.

    The interval is symmetric on the logit scale. Its centre is the metric minus its bias; the bias is the mean of the
    resampled values minus the metric. Its half-width is Student's quantile times the standard deviation of the
    resampled values. Percentiles would count the bias twice, and have no width for a metric near 1.

    If the values do not vary, or the metric is 0 or 1, it is Wilson's interval. Its number of images is the number of
    groups with a defective image or with a good image, whichever is smaller. If the values vary so much that the logit
    says nothing (`MAX_LOGIT_SPREAD`), the interval is the expanded percentiles together with Wilson's interval.

    Args:
        values: (1 + B,) the metric itself, then its value for each sample; NaN where it is undefined.
        times_drawn: (B, k) how often each of the k groups is drawn for each sample.
        truth: (N,) whether each image is defective.
        groups: (N,) its group.

    Returns:
        The bounds; None where the metric is undefined for more than one sample in twenty, or there are too few groups.
    """
    from scipy.special import expit

    value, defined = float(values[0]), ~np.isnan(values[1:])
    drawn = values[1:][defined]
    strata = len(np.unique(uncertainty.holds_defect(truth, groups)))
    count = int(groups.max()) + 1
    if np.isnan(value) or not len(drawn) or len(drawn) < LEVEL * len(defined) or count <= strata:
        return None
    spread = float(drawn.std()) * math.sqrt(count / (count - strata))
    group_count = min(len(np.unique(groups[kind])) for kind in (truth, ~truth) if kind.any())
    wilsons = uncertainty.wilson(min(max(value, 0.0), 1.0) * group_count, group_count)
    if spread < MIN_SPREAD or not MIN_SPREAD < value < 1 - MIN_SPREAD:
        return wilsons
    slope = value * (1 - value)
    if spread > MAX_LOGIT_SPREAD * slope:
        both = [wilsons, uncertainty.percentiles(drawn, uncertainty.widened(truth, groups))]
        bounds = [value, *(bound for interval in both if interval for bound in interval)]
        return min(bounds), max(bounds)
    # The infinitesimal jackknife (Efron, JASA 2014), except for a factor.
    deviations = (drawn - drawn.mean()) @ (times_drawn[defined] - 1.0)
    centre = math.log(value / (1 - value)) - (float(drawn.mean()) - value) / slope
    half = student(deviations, strata) * spread / slope
    low, high = (float(expit(bound)) for bound in (centre - half, centre + half))
    return min(low, value), max(high, value)


def f1_interval(tp: Floats, fp: Floats, fn: Floats, defective: Flags) -> Interval | None:
    """Return the 95 % interval of F1 = 2 J / (1 + J), from the interval of J = tp / (tp + fp + fn).

    Args:
        tp: (k,) the true positives of each group.
        fp: (k,) the false positives.
        fn: (k,) the false negatives.
        defective: (k,) whether the group has a defective image.

    Returns:
        The bounds; None where the denominator of J is 0.
    """
    bounds = wilson(tp, tp + fp + fn, defective)
    return None if bounds is None else (2 * bounds[0] / (1 + bounds[0]), 2 * bounds[1] / (1 + bounds[1]))


def auroc_interval(truth: Flags, scores: Floats, groups: Groups) -> Interval:
    """Return the 95 % interval of the area under the ROC curve, from Obuchowski's variance of its logit.

    If that variance cannot be estimated, as for an area of 0 or 1, it is Newcombe's interval. Its numbers of images are
    the effective ones, as if all images of a group agreed.

    Args:
        truth: (N,) whether each image is defective; there are defective and good ones.
        scores: (N,) its score.
        groups: (N,) its group.
    """
    area = float(auroc(rank(truth, scores))[0])
    from scipy.special import expit

    defective, good = _components(truth, scores, groups)
    variance = auroc_variance(truth, scores, groups)
    if variance < MIN_SPREAD**2:
        effective = (float(kind.sum() ** 2 / (np.bincount(groups, kind) ** 2).sum()) for kind in (truth, ~truth))
        return uncertainty.auroc_interval(area, *effective)
    odds = math.log(area / (1 - area))
    half = student(defective + good) * math.sqrt(variance) / (area * (1 - area))
    return float(expit(odds - half)), float(expit(odds + half))


def auroc_variance(truth: Flags, scores: Floats, groups: Groups) -> float:
    """Return the variance of the area under the ROC curve where images come in groups (Obuchowski, Biometrics 1997).

    If each group is a single image, it is DeLong's variance (Biometrics 1988).

    Args:
        truth: (N,) whether each image is defective; there are defective and good ones.
        scores: (N,) its score.
        groups: (N,) its group.

    Returns:
        The variance; 0 where it cannot be estimated, because the area is 0 or 1, or because all defective or all good
        images belong to one group.
    """
    defective, good = _components(truth, scores, groups)
    group_counts = [int((np.bincount(groups, kind) > 0).sum()) for kind in (truth, ~truth)]
    if min(group_counts) < 2:
        return 0.0
    of_defective, of_good, of_all = (count / (count - 1) for count in (*group_counts, len(defective)))
    variance = of_defective * (defective**2).sum() + of_good * (good**2).sum() + 2 * of_all * (defective * good).sum()
    return max(0.0, float(variance))


def _components(truth: Flags, scores: Floats, groups: Groups) -> tuple[Floats, Floats]:
    """Return the deviations of the area that come from the defective, and from the good, images of each group, (k,)
    each: the sums of DeLong's structural components minus the area."""
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
    """Return the share of the others that lies below each score; ties count half."""
    ordered = np.sort(others)
    below = (np.searchsorted(ordered, scores, side) for side in ("left", "right"))
    return np.asarray(sum(below) / (2 * len(others)))
