"""The error of calibrated scores on other images than those that the curve was fitted to: `docs/metrics.md`.

    python benchmarks/calibration.py

Scores are drawn at random, so the truth is known. Each fit to 20, 60 or 200 images is measured on 4,000 others. The
program prints a table.
"""

from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression

from flawmask.evaluation import calibrate
from flawmask.inference.calibration import expit, logit

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Curve = Callable[[Floats], Floats]

DEFECTIVE, FITTED, MEASURED, DRAWS, SCORE_FLOOR = 0.4, (20, 60, 200), 4000, 25, 0.05
KINDS = {
    "good, and confident": ((4, 2), (-4, 2)),
    "good, and too moderate": ((-0.5, 0.7), (-3, 1)),
    "poor, and too confident": ((2.5, 3), (-1.5, 3)),
}
"""Mean and standard deviation of the logits, of defective and of good images."""


def draw(rng: np.random.Generator, images: int, kind: str) -> tuple[Flags, Floats]:
    """Return which images are defective, at least one of each kind, and their scores, 0 without a prediction."""
    defective, good = KINDS[kind]
    truth = rng.random(images) < DEFECTIVE
    truth[:2] = True, False
    scores = expit(np.where(truth, rng.normal(*defective, images), rng.normal(*good, images)))
    return truth, np.where(scores > SCORE_FLOOR, scores, 0.0)


def fitted(deviation: tuple[float, float] | None = None) -> Callable[[Flags, Floats], Curve]:
    """Return Flawmask's fit, optionally with other priors."""

    def fit(truth: Flags, scores: Floats) -> Curve:
        with patch.object(calibrate, "PRIOR_SD", calibrate.PRIOR_SD if deviation is None else np.array(deviation)):
            curve = calibrate.fit(truth, scores, "val", 0)
        assert curve is not None
        return curve.probability

    return fit


def targets(truth: Flags) -> Floats:
    """Return Platt's targets."""
    return np.asarray(np.where(truth, (truth.sum() + 1) / (truth.sum() + 2), 1 / ((~truth).sum() + 2)))


def platt(truth: Flags, scores: Floats) -> Curve:
    """Fit a line to the logits, to Platt's targets, without priors."""
    at, target = logit(scores), targets(truth)

    def loss(line: Floats) -> float:
        logits = line[0] * at + line[1]
        return float(np.sum(np.logaddexp(0, logits) - target * logits))

    line = minimize(loss, [1.0, 0.0], method="L-BFGS-B", bounds=[(0, None), (None, None)]).x
    return lambda others: expit(line[0] * logit(others) + line[1])


def isotonic(truth: Flags, scores: Floats) -> Curve:
    """Fit steps to Platt's targets. Without these targets, a step may be at 0 or 1."""
    steps = IsotonicRegression(out_of_bounds="clip").fit(scores, targets(truth))
    return lambda others: np.asarray(steps.predict(others))


METHODS: dict[str, Callable[[Flags, Floats], Curve]] = {
    "as they are": lambda truth, scores: lambda others: others,
    "priors, as used": fitted(),
    "no priors": fitted((1e4, 1e4)),
    "Platt's targets": platt,
    "isotonic": isotonic,
    "intercept alone": fitted((1e-4, 1e4)),
}


def measured(method: Callable[[Flags, Floats], Curve], kind: str, images: int) -> tuple[float, float]:
    """Return the mean Brier score, in hundredths, and the mean cross entropy over draws."""
    truth, scores = draw(np.random.default_rng(0), MEASURED, kind)
    errors = []
    for seed in range(1, DRAWS + 1):
        p = method(*draw(np.random.default_rng(seed), images, kind))(scores)
        of_truth = np.clip(np.where(truth, p, 1 - p), 1e-9, None)
        errors.append((100 * np.mean((p - truth) ** 2), -np.mean(np.log(of_truth))))
    brier, entropy = np.mean(errors, axis=0)
    return float(brier), float(entropy)


if __name__ == "__main__":
    print(f"| scores | n | {' | '.join(METHODS)} |\n| --- | ---: |{' ---: |' * len(METHODS)}")
    for kind in KINDS:
        for images in FITTED:
            pairs = [measured(method, kind, images) for method in METHODS.values()]
            cells = " | ".join(f"{brier:.2f} ({entropy:.2f})" for brier, entropy in pairs)
            print(f"| {kind} | {images} | {cells} |")
