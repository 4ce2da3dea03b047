"""The calibration of images' scores: fitted to a validation split, and measured on images that it was not fitted to."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flawmask.evaluation.uncertainty import Groups, holds_defect
from flawmask.inference.calibration import Calibration, expit, logit

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

FOLDS = 5

PRIOR_MEAN, PRIOR_SD = np.array([1.0, 0.0]), np.array([1.0, 2.0])
"""Of slope and intercept: that the scores are probabilities as they are."""


def fit(truth: Flags, scores: Floats, split: str, min_area: int) -> Calibration | None:
    """Return the calibration that suits these images best; None without good or without defective ones.

    It is a logistic regression on the logits of the scores, with normal priors: so it is finite where a threshold tells
    all images apart, and on few images it stays near the scores as they are. Platt's own remedy, targets short of 0
    and 1, makes scores that are right too timid (docs/metrics.md has both measured).

    Args:
        truth: (N,) whether each image is defective.
        scores: (N,) its score, 0 to 1.
        split: the split's name.
        min_area: what the scores were made with.
    """
    from scipy.optimize import minimize

    if truth.all() or not truth.any():
        return None
    at = logit(scores)

    def loss(line: Floats) -> tuple[float, Floats]:
        """Return the negative log posterior and its gradient."""
        height, away = line[0] * at + line[1], (line - PRIOR_MEAN) / PRIOR_SD
        value = np.sum(np.logaddexp(0, height) - truth * height) + away @ away / 2
        rest = expit(height) - truth
        return float(value), np.array([rest @ at, rest.sum()]) + away / PRIOR_SD

    found = minimize(loss, PRIOR_MEAN, jac=True, method="L-BFGS-B", bounds=[(0, None), (None, None)])
    slope, intercept = (float(one) for one in found.x)
    return Calibration(slope, intercept, split, len(truth), int(truth.sum()), min_area)


def out_of_fold(
    truth: Flags, scores: Floats, groups: Groups | None, seed: int, split: str, min_area: int
) -> Sequence[Calibration | None]:
    """Return for each image a calibration that was fitted to other images, of other groups: one for each fifth of the
    groups, those with a defective image and those without dealt out apart.

    Args:
        truth: (N,) whether each image is defective.
        scores: (N,) its score, 0 to 1.
        groups: (N,) the number of each image's group; None where nothing is known of groups.
        seed: decides which groups are in which fifth.
        split: the split's name.
        min_area: what the scores were made with.
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
