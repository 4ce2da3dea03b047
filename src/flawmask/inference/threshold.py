"""The threshold of the verdict, and how one that was chosen is kept beside its checkpoint."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flawmask.errors import FlawmaskError
from flawmask.files import read_json, sha256, write_json

DEFAULT = 0.5
MADE_BY = "flawmask evaluate"


@dataclass(frozen=True)
class Threshold:
    """Where the verdict turns, and how that was decided.

    Attributes:
        value: an image is a defect where a defect on it scores at least this much, 0 to 1.
        how: `default`, `given` with --conf, or `aim`.
        aim: what it was chosen for; None where it was not chosen.
        chosen_on: the split that it was chosen on.
        images: how many images that split has.
        interval: the middle 95 % of the thresholds that resampled images of that split would have led to.
        min_area: what --min_area was then: the choice holds for no other.
        reached: whether the aim was reached on that split.
        chosen_by: the digests of that split's images (`images.content_digest`).
        groups: how many groups its images are; None where nothing is known of groups.
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

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it: `groups` only where it is known."""
        return {name: value for name, value in asdict(self).items() if name != "groups" or value is not None}


def given(conf: float) -> Threshold:
    """Return the threshold that the settings name."""
    return Threshold(conf, "default" if conf == DEFAULT else "given")


def of(conf: float | Literal["auto"], model: Path, min_area: int) -> Threshold:
    """Return the threshold that `--conf` means for a checkpoint: the number, or the one that was chosen for it.

    Raises:
        FlawmaskError: `auto`, and none was chosen for this checkpoint and this `min_area`.
    """
    if conf != "auto":
        return given(conf)
    found = load(model)
    if found is None or found.min_area != min_area:
        raise FlawmaskError(
            f"{model} has no threshold chosen for --min_area {min_area}: "
            f"run flawmask evaluate --conf auto --min_area {min_area} first"
        )
    return found


def _beside(model: Path) -> Path:
    return model.with_name(f"{model.stem}.threshold.json")


def save(threshold: Threshold, model: Path) -> None:
    """Write the threshold beside the checkpoint that it was chosen for, as `best.threshold.json`."""
    content = {"made_by": MADE_BY, "model_sha256": sha256(model.read_bytes()), **threshold.to_dict()}
    write_json(_beside(model), content)


def load(model: Path) -> Threshold | None:
    """Return the threshold that was chosen for a checkpoint; None where there is none, or it is another file's.

    Raises:
        FlawmaskError: the file beside the checkpoint is damaged.
    """
    path = _beside(model)
    if not path.is_file():
        return None
    content: Any = read_json(path)
    try:
        if content.pop("model_sha256") != sha256(model.read_bytes()) or content.pop("made_by") != MADE_BY:
            return None
        interval = content.pop("interval")
        chosen_by = tuple(content.pop("chosen_by"))
        found = Threshold(
            **content, interval=None if interval is None else (interval[0], interval[1]), chosen_by=chosen_by
        )
        valid = 0 <= found.value <= 1
    except (AttributeError, KeyError, TypeError, IndexError):
        valid = False
    if not valid:
        raise FlawmaskError(f"{path} is damaged: delete it, and choose the threshold again with evaluate --conf auto")
    return found
