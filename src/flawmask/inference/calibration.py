"""From an image's score to how likely the image is defective, and how that is kept beside the checkpoint."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask.errors import FlawmaskError
from flawmask.files import read_json, sha256, write_json

Floats = npt.NDArray[np.float64]

LOWEST, HIGHEST = 0.01, 1 - 1e-6
"""Scores beyond them count as these. An image on which nothing was found scores 0, whose logit is infinite."""


@dataclass(frozen=True)
class Calibration:
    """A logistic curve from an image's score to the probability of a defect (Platt, "Probabilistic outputs for support
    vector machines", 1999), here of the score's logit.

    The probability is 1 / (1 + exp(-(slope * logit(score) + intercept))). It never falls as the score rises. It holds
    where defects are as frequent as on the images that it was fitted to.

    Attributes:
        slope: 0 or more.
        intercept: the curve's height at a score of 0.5, as a logit.
        fitted_on: the split that it was fitted to.
        images: how many images that split has.
        defective: how many of these are defective.
        min_area: what --min_area was then: the curve holds for no other.
        fitted_by: the digests of that split's images (`images.content_digest`).
    """

    slope: float
    intercept: float
    fitted_on: str
    images: int
    defective: int
    min_area: int = 0
    fitted_by: tuple[str, ...] = ()

    def probability(self, scores: npt.ArrayLike) -> Floats:
        """Return how likely images with these scores, 0 to 1, are defective: float64, 0 to 1, of the same shape."""
        return expit(self.slope * logit(scores) + self.intercept)


def logit(scores: npt.ArrayLike) -> Floats:
    """Return ln(score / (1 - score)) of scores, 0 to 1, kept within `LOWEST` and `HIGHEST`."""
    kept = np.clip(np.asarray(scores, dtype=np.float64), LOWEST, HIGHEST)
    return np.asarray(np.log(kept / (1 - kept)))


def expit(logits: Floats) -> Floats:
    """Return 1 / (1 + exp(-logit)), 0 to 1."""
    return np.asarray(np.exp(-np.logaddexp(0, -logits)))


def _beside(model: Path) -> Path:
    return model.with_name(f"{model.stem}.calibration.json")


def save(calibration: Calibration, model: Path) -> None:
    """Write the curve beside the checkpoint that it was fitted for, as `best.calibration.json`."""
    write_json(_beside(model), {"model_sha256": sha256(model.read_bytes()), **asdict(calibration)})


def load(model: Path, min_area: int) -> Calibration | None:
    """Return the curve that was fitted for a checkpoint; None where there is none for it and this `min_area`.

    Raises:
        FlawmaskError: the file beside the checkpoint is damaged.
    """
    path = _beside(model)
    if not path.is_file():
        return None
    content: Any = read_json(path)
    try:
        is_its_own = content.pop("model_sha256") == sha256(model.read_bytes())
        found = Calibration(**content | {"fitted_by": tuple(content["fitted_by"])})
        is_valid = found.slope >= 0 and np.isfinite(found.slope + found.intercept)
    except (AttributeError, KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise FlawmaskError(f"{path} is damaged: delete it, and evaluate the split val again")
    return found if is_its_own and found.min_area == min_area else None
