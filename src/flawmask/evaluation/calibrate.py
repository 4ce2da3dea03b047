"""The fit of the calibration to a validation split, and calibrations for images that they were not fitted to."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flawmask.evaluation.uncertainty import Groups, holds_defect
from flawmask.inference.calibration import Calibration, expit, logit

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

FOLDS = 5

PRIOR_MEAN, PRIOR_SD = np.array([1.0, 0.0]), np.array([1.0, 2.0])
"""Mean and standard deviation of the priors of slope and intercept. At the mean, the scores are the probabilities."""


def fit(truth: Flags, scores: Floats, split: str, min_area: int) -> Calibration | None:
    """Return the calibration that fits these images best; None without good or without defective images.

    It is a logistic regression on the logits of the scores, with normal priors. Because of the priors, it is finite
    even if a threshold separates all images, and with few images it changes the scores only a little. Platt's own
    method, targets between 0 and 1, pulls scores that are right too far towards the middle. docs/metrics.md has
    measurements of both.

    Args:
        truth: (N,) whether each image is defective.
        scores: (N,) each image's score, 0 to 1.
        split: the name of the split.
        min_area: the `min_area` of the scores.
    """
    from scipy.optimize import minimize

    if truth.all() or not truth.any():
        return None
    at = logit(scores)

    def loss(line: Floats) -> tuple[float, Floats]:
        """Return the negative log posterior and its gradient."""
        logits, deviation = line[0] * at + line[1], (line - PRIOR_MEAN) / PRIOR_SD
        value = np.sum(np.logaddexp(0, logits) - truth * logits) + deviation @ deviation / 2
        residual = expit(logits) - truth
        return float(value), np.array([residual @ at, residual.sum()]) + deviation / PRIOR_SD

    line = minimize(loss, PRIOR_MEAN, jac=True, method="L-BFGS-B", bounds=[(0, None), (None, None)]).x
    slope, intercept = (float(one) for one in line)
    return Calibration(slope, intercept, split, len(truth), int(truth.sum()), min_area)


def out_of_fold(
    truth: Flags, scores: Floats, groups: Groups | None, seed: int, split: str, min_area: int
) -> Sequence[Calibration | None]:
    """Return a calibration for each image that was fitted to images of other groups only.

    There is one calibration for each of the five folds. Groups with a defective image and groups without one are
    divided among the folds separately.

    Args:
        truth: (N,) whether each image is defective.
        scores: (N,) each image's score, 0 to 1.
        groups: (N,) the number of each image's group; None where groups are unknown.
        seed: decides which groups are in which fold.
        split: the name of the split.
        min_area: the `min_area` of the scores.
    """
    numbers = np.arange(len(truth)) if groups is None else groups
    defective = holds_defect(truth, numbers)
    fold_of = np.empty(len(defective), dtype=np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(defective))
    by_kind = shuffled[np.argsort(defective[shuffled], kind="stable")]
    fold_of[by_kind] = np.arange(len(by_kind)) % FOLDS
    fold = fold_of[numbers]
    fitted = [fit(truth[fold != one], scores[fold != one], split, min_area) for one in range(FOLDS)]
    return [fitted[one] for one in fold]
