"""The threshold of the verdict. A chosen threshold is stored in a file beside its checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flawmask.errors import FlawmaskError
from flawmask.files import read_json, write_json
from flawmask.tiles import TileFrom

DEFAULT = 0.5
MADE_BY = "flawmask evaluate"


@dataclass(frozen=True)
class Threshold:
    """The threshold of the verdict, and how it was chosen.

    Attributes:
        value: an image is rejected where a defect on it has at least this score, 0 to 1.
        how: `default`, `given` with --conf, or `aim` where it was chosen.
        aim: the aim of the choice; None where it was not chosen.
        chosen_on: the split on which it was chosen.
        images: the number of images of that split.
        interval: the middle 95 % of the thresholds for resampled images of that split.
        min_area: --min_area when it was chosen. The threshold is valid for no other value.
        reached: whether the aim was reached on that split.
        chosen_by: the digests of that split's images (`images.content_digest`).
        groups: the number of that split's groups; None where groups are unknown.
        tile, overlap, tile_from: the tiles that the network saw, as in `ModelSpec`. The threshold is valid for no
            others.
    """

    value: float
    how: Literal["default", "given", "aim"]
    aim: str | None = None
    chosen_on: str | None = None
    images: int | None = None
    interval: tuple[float, float] | None = None
    min_area: int = 0
    reached: bool = True
    chosen_by: tuple[str, ...] = ()
    groups: int | None = None
    tile: int | None = None
    overlap: int = 0
    tile_from: TileFrom = "all"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without `groups` where groups are unknown."""
        return {name: value for name, value in asdict(self).items() if name != "groups" or value is not None}

    def holds_for(self, min_area: int, tiles: Mapping[str, Any]) -> bool:
        """Return whether the threshold is valid for a `min_area` and the tiles of a network, see `of`."""
        return self.min_area == min_area and all(getattr(self, name) == value for name, value in tiles.items())


def given(conf: float) -> Threshold:
    """Return the threshold for a number in the settings."""
    return Threshold(conf, "default" if conf == DEFAULT else "given")


def of(conf: float | Literal["auto"], model: Path, min_area: int, tiles: Mapping[str, Any]) -> Threshold:
    """Return the threshold for a checkpoint: the number in `conf` or, for `auto`, the stored one.

    Args:
        conf: a number, or `auto`.
        model: the checkpoint.
        min_area: the smallest area, in pixels, of a defect that counts.
        tiles: what the network sees: `ModelSpec.tiles_as_json`.

    Raises:
        FlawmaskError: `conf` is `auto`, and no threshold was chosen for this checkpoint, `min_area` and these tiles.
    """
    if conf != "auto":
        return given(conf)
    stored = load(model)
    if stored is None or not stored.holds_for(min_area, tiles):
        flags = f"--min_area {min_area}"
        if tiles["tile"] is not None:
            flags += "".join(f" --{name} {value}" for name, value in tiles.items())
        elif stored is not None and stored.tile is not None:
            flags += " --tile off"
        raise FlawmaskError(
            f"{model} has no threshold chosen for {flags}: run flawmask evaluate --conf auto {flags} first"
        )
    return stored


def _beside(model: Path) -> Path:
    return model.with_name(f"{model.stem}.threshold.json")


def save(threshold: Threshold, model: Path) -> None:
    """Write the threshold beside its checkpoint, as `best.threshold.json`."""
    from flawmask.inference import exported

    content = {"made_by": MADE_BY, "model_sha256": exported.digest_of(model), **threshold.to_dict()}
    write_json(_beside(model), content)


def load(model: Path) -> Threshold | None:
    """Return the threshold that was chosen for a checkpoint; None where there is none, or where it belongs to another
    checkpoint. An exported model has one inside, unless another one was chosen for it since.

    Raises:
        FlawmaskError: the file beside the checkpoint is damaged.
    """
    from flawmask.inference import exported

    inside = exported.manifest_of(model).threshold if exported.is_export(model) else None
    path = _beside(model)
    if not path.is_file():
        return inside
    content: Any = read_json(path)
    try:
        if content.pop("model_sha256") != exported.digest_of(model) or content.pop("made_by") != MADE_BY:
            return inside
        interval = content.pop("interval")
        chosen_by = tuple(content.pop("chosen_by"))
        stored = Threshold(
            **content, interval=None if interval is None else (interval[0], interval[1]), chosen_by=chosen_by
        )
        valid = 0 <= stored.value <= 1
    except (AttributeError, KeyError, TypeError, IndexError):
        valid = False
    if not valid:
        raise FlawmaskError(f"{path} is damaged: delete it, and choose the threshold again with evaluate --conf auto")
    return stored
