"""Settings that several stages share: one flag, one meaning, one help text."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from flawmask.errors import FlawmaskError
from flawmask.joining import Join

T = TypeVar("T")

BEFORE: Mapping[str, Any] = {
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
}
"""What a setting came to before it was one: a file that does not say it was written then."""

Precision = Literal["fp32", "bf16", "fp16", "auto"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every settings class inherits from: each checks its own fields and hands on to the next."""

    def __post_init__(self) -> None:
        """End the chain of checks."""


@dataclass(frozen=True, kw_only=True)
class Seed(Settings):
    """Everything drawn at random."""

    seed: int = 42
    """Seed of everything that is drawn at random; 0 is a seed like any other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.seed < 2**63, f"--seed is {self.seed}: it must be 0 or more, and less than 2**63")


@dataclass(frozen=True, kw_only=True)
class Overwrite(Settings):
    """Whether what is there may go."""

    overwrite: bool = False
    """Replace the output folder, whole, if the same stage made it. No other folder is ever replaced."""


@dataclass(frozen=True, kw_only=True)
class Strict(Settings):
    """Whether everything that was found must be used."""

    strict: bool = False
    """End with status 3, before anything is written, where an image or a label was found and is not used."""


@dataclass(frozen=True, kw_only=True)
class BadInput(Settings):
    """What becomes of what cannot be used."""

    on_error: Literal["stop", "skip"] = "stop"
    """What to do about a bad image, mask or record: stop before anything is written, or leave the image out, named."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.on_error in ("stop", "skip"), f"--on_error is {self.on_error}: it must be stop or skip")


@dataclass(frozen=True, kw_only=True)
class Crowds(Settings):
    """What crowds are."""

    crowds: Literal["ignore", "instances"] = "ignore"
    """What annotations with iscrowd: 1 are, as brushes of tools write them: regions left aside, or instances."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.crowds in ("ignore", "instances")
        require(known, f"--crowds is {self.crowds}: it must be ignore or instances")


@dataclass(frozen=True, kw_only=True)
class GoodName(Settings):
    """What good images are called."""

    good_name: str | None = None
    """What good images are called, as a type, a folder or a category: OK, or several as OK,gut. good always is."""

    @property
    def good_names(self) -> frozenset[str]:
        """The names in `good_name`."""
        return frozenset(name.strip() for name in (self.good_name or "").split(",") if name.strip())


@dataclass(frozen=True, kw_only=True)
class Reading(Crowds, BadInput, GoodName):
    """How the records of a COCO file are read."""


@dataclass(frozen=True, kw_only=True)
class Device(Settings):
    """Where the network runs, and how precisely."""

    device: str | None = None
    """cuda, cuda:1, mps or cpu. By default the first of CUDA, MPS and CPU that is there."""
    precision: Precision = "auto"
    """What the layers compute in; auto is bf16 where the hardware has it. Boxes and scores are float32 in any case."""


@dataclass(frozen=True, kw_only=True)
class Joining(Settings):
    """What becomes of several predictions of one defect."""

    join: Join | None = None
    """touching: predictions of one class whose masks overlap or touch are one defect; off: each is one. By default as
    the model was trained; a training that is not told takes touching."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.join is None or self.join in get_args(Join)
        require(known, f"--join is {self.join}: it must be one of {', '.join(get_args(Join))}")


@dataclass(frozen=True, kw_only=True)
class Classes(Settings):
    """A check that model and data belong together."""

    num_classes: int | None = None
    """How many classes there are besides background, 2 for good and defect; checked against the data where given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_classes is None or self.num_classes >= 1,
            f"--num_classes is {self.num_classes}: it must be 1 or more",
        )


def require(holds: bool, otherwise: str) -> None:
    """Raise a FlawmaskError with the message `otherwise` unless `holds`."""
    if not holds:
        raise FlawmaskError(otherwise)


def as_json(config: Any, only: type | None = None) -> dict[str, Any]:
    """Return a settings dataclass as JSON values.

    Args:
        config: the dataclass.
        only: a dataclass that `config` inherits from: its fields alone are taken.
    """
    names = {field.name for field in fields(only or config)}
    return {name: _plain(value) for name, value in asdict(config).items() if name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def is_of(content: Any, origin: Mapping[str, Any]) -> bool:
    """Return whether what a JSON file holds says this very origin: stage, settings, source. What else it says is left
    aside; of a setting that there was not yet when it was written, it says what `BEFORE` does."""
    if not isinstance(content, dict):
        return False
    found = content.get("settings")
    if isinstance(found, dict):
        before = {name: value for name, value in BEFORE.items() if name in origin.get("settings", {})}
        content = content | {"settings": before | found}
    return all(content.get(key) == value for key, value in origin.items())


def from_json(kind: type[T], found: Mapping[str, Any]) -> T:
    """Return the settings that `as_json` gave.

    Raises:
        FlawmaskError: a value is not allowed.
        TypeError: there is a field that `kind` does not have.
    """
    types = get_type_hints(kind)

    def typed(name: str, value: Any) -> Any:
        allowed = str(types.get(name))
        if isinstance(value, str) and "Path" in allowed:
            return Path(value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: typed(name, value) for name, value in found.items()})


def stage(kind: type[T], config: Settings, **given: Any) -> T:
    """Return the stage's own config: what `given` does not say comes from the run's settings of the same name."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    shared = {field.name: getattr(config, field.name) for field in fields(config) if field.name in names}
    return kind(**{**shared, **given})
