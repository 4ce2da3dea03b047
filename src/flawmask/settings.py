"""Settings that several stages share: one flag, one meaning, one help text."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from flawmask.errors import FlawmaskError
from flawmask.joining import Join
from flawmask.tiles import MAX_TILE, TileChoice, Tiling, default_overlap

T = TypeVar("T")

LEGACY_VALUES: Mapping[str, Any] = {
    "layout": "mvtec",
    "images": None,
    "masks": None,
    "mask_suffix": None,
    "good_name": None,
    "keep_split": False,
    "crowds": "ignore",
    "on_error": "stop",
    "intensity": "auto",
    "mask_values": "auto",
    "mask_classes": None,
    "exif_masks": None,
    "join": "off",
    "tile": None,
    "overlap": "auto",
    "tile_from": "all",
}
"""The fixed values that were in force before these settings existed. A file without the setting was written then."""

Precision = Literal["fp32", "bf16", "fp16", "auto"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The base of all settings classes. Each class checks its own fields and then calls the next class."""

    FORMER_NAMES: ClassVar[Mapping[str, str]] = {}
    """Names that settings had in earlier versions, each with today's name. They still work as flags and arguments."""

    def __post_init__(self) -> None:
        """End the chain of checks."""


@dataclass(frozen=True, kw_only=True)
class Seed(Settings):
    """The seed of everything random."""

    seed: int = 42
    """Seed of everything random; 0 is a seed like any other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.seed < 2**63, f"--seed is {self.seed}: it must be 0 or more, and less than 2**63")


@dataclass(frozen=True, kw_only=True)
class Overwrite(Settings):
    """Whether an existing output folder may be replaced."""

    overwrite: bool = False
    """Replace the whole output folder if the same command made it. No other folder is ever replaced."""


@dataclass(frozen=True, kw_only=True)
class Strict(Settings):
    """Whether unused images or labels are an error."""

    strict: bool = False
    """Stop with exit status 3, before writing anything, if an image or a label was found but is not used."""


@dataclass(frozen=True, kw_only=True)
class BadInput(Settings):
    """What to do about unusable input."""

    on_error: Literal["stop", "skip"] = "stop"
    """What to do about a bad image, mask or record: stop before writing anything, or skip the image and report it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.on_error in ("stop", "skip"), f"--on_error is {self.on_error}: it must be stop or skip")


@dataclass(frozen=True, kw_only=True)
class Crowds(Settings):
    """How crowds are treated."""

    crowds: Literal["ignore", "instances"] = "ignore"
    """Ignore annotations with iscrowd: 1, or use them as instances. Brush tools often write iscrowd: 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.crowds in ("ignore", "instances")
        require(known, f"--crowds is {self.crowds}: it must be ignore or instances")


@dataclass(frozen=True, kw_only=True)
class GoodName(Settings):
    """The name of good images."""

    good_name: str | None = None
    """Your name for good images (a type, folder or category), such as OK; several as OK,gut. good always counts."""

    @property
    def good_names(self) -> frozenset[str]:
        """The set of names in `good_name`."""
        return frozenset(name.strip() for name in (self.good_name or "").split(",") if name.strip())


@dataclass(frozen=True, kw_only=True)
class Reading(Crowds, BadInput, GoodName):
    """How the records of a COCO file are read."""


@dataclass(frozen=True, kw_only=True)
class Device(Settings):
    """Where the network runs, and how precisely."""

    device: str | None = None
    """cuda, cuda:1, mps or cpu. The default is the first of cuda, mps and cpu that the machine has."""
    precision: Precision = "auto"
    """Number format of the layers; auto is bf16 if the hardware supports it. Boxes and scores are always float32."""


@dataclass(frozen=True, kw_only=True)
class Joining(Settings):
    """Whether predictions of one defect are joined."""

    join: Join | None = None
    """touching: predictions of a class whose masks touch are one defect. off: join none. Default: the checkpoint's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_known = self.join is None or self.join in get_args(Join)
        require(is_known, f"--join is {self.join}: it must be one of {', '.join(get_args(Join))}")


@dataclass(frozen=True, kw_only=True)
class Tiles(Settings):
    """Whether the network sees images whole or in tiles."""

    tile: int | TileChoice | None = None
    """Side of tiles that images are seen in, in pixels. auto: by the defects' sizes. Default: as trained, or off."""
    overlap: int | Literal["auto"] = "auto"
    """Pixels that neighbouring tiles share, at most half of a tile. auto: as many as most defects are long."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = (None, *get_args(TileChoice))
        require(
            isinstance(self.tile, int) or self.tile in choices,
            f"--tile is {self.tile}: it must be off, auto or a number of pixels",
        )
        known = self.overlap == "auto" or (isinstance(self.overlap, int) and 1 <= self.overlap <= MAX_TILE // 2)
        require(known, f"--overlap is {self.overlap}: it must be auto or a number of pixels, 1 to {MAX_TILE // 2}")
        require(self.overlap == "auto" or self.tile != "off", "--overlap is for tiles: leave it out with --tile off")
        if isinstance(self.tile, int):  # a tiling checks itself
            Tiling(self.tile, default_overlap(self.tile) if self.overlap == "auto" else self.overlap)

    def check_tiles_of_training(self) -> None:
        """Refuse an overlap for a training that sees images whole."""
        whole = self.tile is None and self.overlap != "auto"
        require(not whole, "--overlap is for tiles: give their side with --tile, or --tile auto")


@dataclass(frozen=True, kw_only=True)
class Classes(Settings):
    """A check that model and data fit together."""

    num_classes: int | None = None
    """Number of classes without background, 2 for good and defect. If given, it is checked against the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_classes is None or self.num_classes >= 1,
            f"--num_classes is {self.num_classes}: it must be 1 or more",
        )


def require(condition: bool, message: str) -> None:
    """Raise a FlawmaskError with this message unless the condition holds."""
    if not condition:
        raise FlawmaskError(message)


def as_json(config: Any, only: type | None = None) -> dict[str, Any]:
    """Return a settings dataclass as JSON values.

    Args:
        config: the dataclass.
        only: a base class of `config`; then only its fields are returned.
    """
    names = {field.name for field in fields(only or config)}
    return {name: _plain(value) for name, value in asdict(config).items() if name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def has_origin(content: Any, origin: Mapping[str, Any]) -> bool:
    """Return whether a JSON file's content has exactly this origin: stage, settings and source.

    Other keys of the content are ignored. If it was written before a setting existed, `LEGACY_VALUES` gives its value.
    """
    if not isinstance(content, dict):
        return False
    stored = content.get("settings")
    if isinstance(stored, dict):
        before = {name: value for name, value in LEGACY_VALUES.items() if name in origin.get("settings", {})}
        content = content | {"settings": before | stored}
    return all(content.get(key) == value for key, value in origin.items())


def from_json(kind: type[T], stored: Mapping[str, Any]) -> T:
    """Return the settings that `as_json` gave. A setting may have its former name.

    Raises:
        FlawmaskError: a value is not allowed.
        TypeError: there is a field that `kind` does not have, or a setting is given under both of its names.
    """
    types = get_type_hints(kind)
    for former, name in getattr(kind, "FORMER_NAMES", {}).items():
        if former in stored:
            if name in stored:
                raise TypeError(f"{former} is the former name of {name}: give one of them")
            stored = {name if key == former else key: value for key, value in stored.items()}

    def typed(name: str, value: Any) -> Any:
        allowed = str(types.get(name))
        if isinstance(value, str) and "Path" in allowed:
            return Path(value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: typed(name, value) for name, value in stored.items()})


def stage(kind: type[T], config: Settings, **changes: Any) -> T:
    """Return the settings of one stage, copied from a run's settings of the same names and then changed."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    shared = {field.name: getattr(config, field.name) for field in fields(config) if field.name in names}
    return kind(**{**shared, **changes})
