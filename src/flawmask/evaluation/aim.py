"""Choose the threshold for an aim on a validation split."""

import numpy as np
import numpy.typing as npt

from flawmask.errors import FlawmaskError
from flawmask.evaluation.config import parse_aim
from flawmask.evaluation.ranking import Ranking, rank
from flawmask.evaluation.uncertainty import Groups, percentiles, widened
from flawmask.inference.threshold import DEFAULT, Threshold

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def choose(
    truth: Flags,
    scores: Floats,
    weights: Floats,
    aim: str,
    split: str,
    min_area: int,
    groups: Groups | None = None,
) -> Threshold:
    """Return the best threshold for the aim on these images.

    - `f1` is the threshold with the highest F1.
    - `recall=R` is the highest threshold that finds at least R of the defective images: it has the fewest false alarms.
    - `false_alarms=R` is the lowest threshold that rejects at most R of the good images: it has the fewest misses.

    The threshold lies half-way between the lowest score above it and the highest score below it. An aim may be out of
    reach, if too many defective images have no detection at all or a good image has a score of 1. Then `reached` is
    False, and the threshold is the nearest possible one. Without a detection on any image, it is the default.

    Args:
        truth: (N,) whether each image is defective.
        scores: (N,) the score of each image, 0 where it has no detection.
        weights: (B, N) bootstrap weights for the interval, over whole groups where these are known.
        aim: see above.
        split: the split's name.
        min_area: the `min_area` with which the scores were computed.
        groups: (N,) the number of each image's group; None where groups are unknown.

    Raises:
        FlawmaskError: the split lacks defective or good images.
    """
    name, level = parse_aim(aim)
    if truth.all() or not truth.any():
        lacking = "good" if truth.all() else "defective"
        raise FlawmaskError(f"--conf auto: the split {split} has no {lacking} image to choose a threshold with")
    parts = None if groups is None else len(np.unique(groups))
    if not (scores > 0).any():
        return Threshold(DEFAULT, "aim", aim, split, len(truth), min_area=min_area, reached=False, groups=parts)
    values, reached = _best(rank(truth, scores), name, level)
    spread, _ = _best(rank(truth, scores, weights), name, level)
    interval = percentiles(spread, widened(truth, groups))
    return Threshold(
        float(values[0]), "aim", aim, split, len(truth), interval, min_area, reached=bool(reached[0]), groups=parts
    )


def _best(ranking: Ranking, name: str, level: float) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return the threshold of each sample, (B,), and whether it reaches the aim, (B,)."""
    real = ranking.thresholds > 0  # no threshold rejects an image without detections
    scores, tp, fp = ranking.thresholds[real], ranking.tp[:, real], ranking.fp[:, real]
    ends = np.concatenate(([1.0], scores, [0.0]))  # ends[at + 1] is the score at `at`
    if name == "f1":
        f1 = np.nan_to_num(ranking.f1[:, real])
        at, reached = f1.argmax(axis=1), np.asarray(f1.max(axis=1) > 0)
    elif name == "recall":
        enough = tp >= level * ranking.positives[:, None] - 1e-9
        reached = np.asarray(enough.any(axis=1))
        at = np.where(reached, enough.argmax(axis=1), len(scores) - 1)
    else:  # -1 is a threshold above all scores, where the highest score alone rejects too many
        at = (fp <= level * ranking.negatives[:, None] + 1e-9).sum(axis=1) - 1
        reached = np.asarray((at >= 0) | (scores[0] < 1))
    return (ends[at + 1] + ends[at + 2]) / 2, reached
