"""The calibration of images' scores as probabilities of a defect. It is stored in a file beside its checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask.errors import FlawmaskError
from flawmask.files import read_json, write_json
from flawmask.tiles import TileFrom

Floats = npt.NDArray[np.float64]

LOWEST, HIGHEST = 0.01, 1 - 1e-6
"""Scores outside these limits count as the nearer limit. An image without a predicted defect has the score 0, whose
logit is infinite."""


@dataclass(frozen=True)
class Calibration:
    """A logistic curve from an image's score to the probability of a defect.

    The probability is 1 / (1 + exp(-(slope * logit(score) + intercept))), after Platt, "Probabilistic outputs for
    support vector machines", 1999. It never falls as the score rises. It is valid where defects are as frequent as on
    the images that it was fitted to.

    Attributes:
        slope: 0 or more.
        intercept: the logit of the probability at a score of 0.5.
        fitted_on: the split to which it was fitted.
        images: the number of images of that split.
        defective: the number of its defective images.
        min_area: --min_area when it was fitted. The curve is valid for no other value.
        fitted_by: the digests of that split's images (`images.content_digest`).
        tile, overlap, tile_from: the tiles that the network saw, as in `ModelSpec`. The curve is valid for no others.
    """

    slope: float
    intercept: float
    fitted_on: str
    images: int
    defective: int
    min_area: int = 0
    fitted_by: tuple[str, ...] = ()
    tile: int | None = None
    overlap: int = 0
    tile_from: TileFrom = "all"

    def probability(self, scores: npt.ArrayLike) -> Floats:
        """Return the probability of a defect for images with these scores, 0 to 1: float64, 0 to 1, same shape."""
        return expit(self.slope * logit(scores) + self.intercept)


def logit(scores: npt.ArrayLike) -> Floats:
    """Return ln(score / (1 - score)) of scores, 0 to 1, clipped to `LOWEST` and `HIGHEST`."""
    clipped = np.clip(np.asarray(scores, dtype=np.float64), LOWEST, HIGHEST)
    return np.asarray(np.log(clipped / (1 - clipped)))


def expit(logits: Floats) -> Floats:
    """Return 1 / (1 + exp(-logit)), 0 to 1."""
    return np.asarray(np.exp(-np.logaddexp(0, -logits)))


def _beside(model: Path) -> Path:
    return model.with_name(f"{model.stem}.calibration.json")


def save(calibration: Calibration, model: Path) -> None:
    """Write the calibration beside its checkpoint, as `best.calibration.json`."""
    from flawmask.inference import exported

    write_json(_beside(model), {"model_sha256": exported.digest_of(model), **asdict(calibration)})


def _exported(model: Path) -> Calibration | None:
    """Return the calibration inside an exported model."""
    from flawmask.inference import exported

    return exported.manifest_of(model).calibration if exported.is_export(model) else None


def load(model: Path, min_area: int, tiles: Mapping[str, Any]) -> Calibration | None:
    """Return the calibration that was fitted for a checkpoint; None where there is none for it and these settings.

    Args:
        model: the checkpoint.
        min_area: the smallest area, in pixels, of a defect that counts.
        tiles: what the network sees: `ModelSpec.tiles_as_json`.

    Raises:
        FlawmaskError: the file beside the checkpoint is damaged.
    """
    stored = _stored(model)
    if stored is None or stored.min_area != min_area:
        return None
    return stored if all(getattr(stored, name) == value for name, value in tiles.items()) else None


def _stored(model: Path) -> Calibration | None:
    """Return the calibration beside a checkpoint, or inside an exported model, whatever it holds for."""
    path = _beside(model)
    if not path.is_file():
        return _exported(model)
    from flawmask.inference import exported

    content: Any = read_json(path)
    try:
        is_its_own = content.pop("model_sha256") == exported.digest_of(model)
        stored = Calibration(**content | {"fitted_by": tuple(content["fitted_by"])})
        is_valid = stored.slope >= 0 and np.isfinite(stored.slope + stored.intercept)
    except (AttributeError, KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise FlawmaskError(f"{path} is damaged: delete it, and evaluate the split val again")
    return stored if is_its_own else _exported(model)
