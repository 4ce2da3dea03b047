"""How the files of masks are read: by one rule for all of a category, and turned where their images are.

Tools write a defect as white, as 1, as the number of its class, as a colour, as a number of a palette, or as what is
not transparent. One mask alone does not say which; all masks of a category together do.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flawmask import images
from flawmask.data.layouts import MaskFile, Part, Sample
from flawmask.errors import FlawmaskError, ImageError
from flawmask.good_names import GOOD
from flawmask.images import Parts, Pixels
from flawmask.launch import usable_cores
from flawmask.masks import Mask
from flawmask.progress import track
from flawmask.settings import Settings, require

log = logging.getLogger(__name__)

MaskValues = Literal["auto", "white", "nonzero", "alpha", "palette"]
Rule = Literal["white", "nonzero", "alpha", "palette", "classes"]

RULES: Mapping[Rule, tuple[Part, Callable[[Pixels], Mask]]] = {
    "white": ("colour", images.white),
    "nonzero": ("colour", images.nonzero),
    "alpha": ("alpha", images.white),
    "palette": ("palette", images.nonzero),
}
"""What of a file each rule looks at, and what it takes for the defect."""

MEANING = {
    "white": "what is above half of white",
    "nonzero": "what is not 0",
    "alpha": "what the alpha channel leaves opaque",
    "palette": "what has another number than 0 in the palette",
}

FEW = 32
"""More values than these are no classes: smoothing or JPEG's noise leaves them."""


JPEG = b"\xff\xd8\xff"
"""What a JPEG begins with (ITU-T T.81, annex B)."""


@dataclass(frozen=True, kw_only=True)
class MaskSettings(Settings):
    """How masks are read."""

    mask_values: MaskValues = "auto"
    """What of a mask is the defect, the same in all masks of a category: white (above half), nonzero, what is opaque in
    its alpha channel, or its palette's numbers but 0. auto: what suits all of them; a line says which."""
    mask_classes: Path | None = None
    """A JSON file that says which defect type a value or a colour of the masks stands for: {"1": "hole", "2": "crack"},
    or {"#ff0000": "hole"}; null is no defect."""
    exif_masks: Literal["with_image", "as_stored"] | None = None
    """Where Exif turns an image, its mask says nothing of it, and both fit: turn the mask with_image, or take it
    as_stored. Left out, prepare stops there and asks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = self.mask_classes is None or self.mask_values == "auto"
        require(alone, "--mask_classes says what each value is: leave out --mask_values")


# Which rule


@dataclass(frozen=True)
class Reading:
    """How the masks of a category are read.

    Attributes:
        rule: one of `RULES`, or `classes` where a file maps values.
        reason: why, and what is in the masks; reads on from what the rule is.
        several: what to warn of: which values the masks have where one was expected; empty where there is nothing.
    """

    rule: Rule
    reason: str
    several: str = ""

    def __str__(self) -> str:
        """Return it in words."""
        meaning = MEANING.get(self.rule)
        return f"{meaning} is the defect (--mask_values {self.rule}): {self.reason}" if meaning else self.reason


def with_rule(samples: Sequence[Sample], settings: MaskSettings) -> tuple[list[Sample], Reading | None]:
    """Return the samples with masks that are read by one rule, and which it is; None without a mask to read so.

    Masks for which the layout has a rule of its own stay as they are.

    Args:
        samples: of one category.
        settings: what is wanted.

    Raises:
        FlawmaskError: some masks have their defect in the alpha channel, and others have it elsewhere.
    """
    paths = dict.fromkeys(file.path for sample in samples for file in sample.masks if _is_usual(file))
    if not paths:
        return list(samples), None
    if settings.mask_classes is not None:
        classes = classes_in(settings.mask_classes)
        return _with_files(samples, partial(_by_class, classes, settings.mask_classes)), Reading(
            "classes", f"values of masks are types as {settings.mask_classes} says"
        )
    seen = _look_at(list(paths))
    reading = _chosen(seen, settings.mask_values)
    part, rule = RULES[reading.rule]
    return _with_files(samples, lambda file: [replace(file, part=part, rule=rule)]), reading


def _is_usual(file: MaskFile) -> bool:
    return file.rule is images.to_mask


def _with_files(samples: Sequence[Sample], changed: Callable[[MaskFile], Iterable[MaskFile]]) -> list[Sample]:
    return [
        replace(
            sample,
            masks=tuple(one for file in sample.masks for one in (changed(file) if _is_usual(file) else [file])),
        )
        for sample in samples
    ]


@dataclass(frozen=True)
class _Seen:
    """What a mask holds.

    Attributes:
        path: its file.
        values: its grey values but 0, or its colours but black as `#rrggbb`; of more than `FEW` the first ones.
        has_black: whether anything in it is 0.
        has_white: whether anything in it is above half.
        fits: the parts of the file in which its defect may be.
        needs: those of them that say something else than what is white.
        is_jpeg: whether it is a JPEG, whose small values are noise.
    """

    path: Path
    values: tuple[str, ...]
    has_black: bool
    has_white: bool
    fits: frozenset[str]
    needs: frozenset[str]
    is_jpeg: bool


def _look_at(paths: Sequence[Path]) -> list[_Seen]:
    """Return what is in the masks; those that cannot be read are left to whoever reads them for good."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        seen = track(pool.map(_see, paths), "masks", total=len(paths))
        return [one for one in seen if one is not None]


def _see(path: Path) -> _Seen | None:
    try:
        data = images.read_bytes(path)
        parts = images.decode_parts(data, path)
    except ImageError:
        return None
    strongest, is_white = images.strongest(parts.colour), images.white(parts.colour)
    found = [*_in_alpha(parts, is_white), *_in_palette(parts, strongest, is_white)]
    return _Seen(
        path,
        _values(parts.colour, strongest),
        not strongest.all(),
        bool(is_white.any()),
        frozenset(part for part, _ in found),
        frozenset(part for part, is_needed in found if is_needed),
        data.startswith(JPEG),
    )


def _in_alpha(parts: Parts, is_white: Mask) -> list[tuple[str, bool]]:
    """Return the alpha channel where it may hold the defect: where all that it leaves opaque is of one brightness,
    so that the colours say nothing."""
    if parts.alpha is None:
        return []
    opaque = images.white(parts.alpha)
    shown = is_white[opaque]
    if opaque.all() or (shown.any() and not shown.all()):
        return []
    return [("alpha", bool(opaque.any()) and not np.array_equal(opaque, is_white))]


def _in_palette(parts: Parts, strongest: Pixels, is_white: Mask) -> list[tuple[str, bool]]:
    """Return the palette where its number 0 may be the background: where that is black."""
    if parts.palette is None or strongest[parts.palette == 0].any():
        return []
    return [("palette", not np.array_equal(parts.palette > 0, is_white))]


def _values(colour: Pixels, strongest: Pixels) -> tuple[str, ...]:
    """Return a mask's values but 0, up to one more than `FEW`."""
    if colour.ndim == 2 or (colour == colour[:, :, :1]).all():
        found = np.flatnonzero(np.bincount(strongest.ravel()))
        return tuple(str(value) for value in found[found > 0][: FEW + 1])
    eight = images.to_eight_bits(colour[strongest > 0][:, None]).astype(np.uint32)[:, 0]
    packed = np.unique(eight[:, 0] << 16 | eight[:, 1] << 8 | eight[:, 2])
    return tuple(f"#{value:06x}" for value in packed[: FEW + 1])


def _chosen(seen: Sequence[_Seen], wanted: MaskValues) -> Reading:
    rule, reason = (wanted, "as asked for") if wanted != "auto" else _best(seen)
    values = sorted({value for one in seen for value in one.values}, key=lambda value: (len(value), value))
    several = [one for one in seen if len(one.values) > 1]
    if not several or rule == "alpha":
        return Reading(rule, reason)
    shown = f"{', '.join(values[:5])}{', ...' if len(values) > 5 else ''}"
    which = f"{len(several)} of {len(seen)} masks hold several values ({shown}), {several[0].path.name} for one"
    if len(values) > FEW or all(one.is_jpeg for one in several):
        advice = "smoothing or JPEG leaves such: export them as PNG, in black and white"
    elif rule == "white":
        advice = "those up to half of white count as no defect: see --mask_values and --mask_classes"
    else:
        advice = "all count as defect: --mask_classes says which type each is"
    return Reading(rule, reason, f"{which}; {advice}")


def _best(seen: Sequence[_Seen]) -> tuple[Rule, str]:
    """Return the rule that suits all masks, and why.

    Raises:
        FlawmaskError: there is none.
    """
    in_alpha = [one for one in seen if "alpha" in one.needs]
    others = [one for one in seen if "alpha" not in one.fits]
    if in_alpha and others:
        raise FlawmaskError(
            f"{in_alpha[0].path} has its defect in the alpha channel, and {others[0].path} has not: export all masks "
            "in one way, or give --mask_values"
        )
    if in_alpha:
        return "alpha", f"{len(in_alpha)} of {len(seen)} masks say nothing but there"
    in_palette = [one for one in seen if "palette" in one.needs]
    if in_palette and all("palette" in one.fits for one in seen):
        return "palette", f"all masks have one, and {len(in_palette)} of {len(seen)} have dark colours in it"
    lost = [one for one in seen if one.values and not one.has_white]
    values = {value for one in seen for value in one.values}
    if lost and len(values) <= FEW and all(one.has_black and not one.is_jpeg for one in lost):
        shown = ", ".join(sorted(values, key=lambda value: (len(value), value))[:5]) + (
            ", ..." if len(values) > 5 else ""
        )
        return "nonzero", f"{len(lost)} of {len(seen)} masks have nothing above half of white, but {shown}"
    return "white", f"as in {sum(one.has_white for one in seen)} of {len(seen)} masks"


# Values that stand for types


def classes_in(path: Path) -> dict[str, str | None]:
    """Return which defect type each value, `17`, or colour, `#ff0000`, stands for; None for no defect.

    Raises:
        FlawmaskError: the file is not there, or says something else.
    """
    form = 'it must say {"1": "hole", "2": "crack"}, or {"#ff0000": "hole"}; null is no defect'
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise FlawmaskError(f"--mask_classes {path} cannot be read ({error}): {form}") from None
    if not isinstance(found, dict) or not found:
        raise FlawmaskError(f"--mask_classes {path}: {form}")
    classes = {str(value).strip().lower(): name for value, name in found.items()}
    for value, name in classes.items():
        is_value = (value.isdecimal() and int(value) < 65536) or _is_colour(value)
        is_name = name is None or (isinstance(name, str) and name.strip() not in ("", GOOD))
        require(is_value and is_name, f"--mask_classes {path}: {value!r}: {name!r} is not possible: {form}")
    require(
        len({_is_colour(value) for value in classes}) == 1,
        f"--mask_classes {path} names values and colours: give only one of the two",
    )
    require(any(classes.values()), f"--mask_classes {path} names no defect type: {form}")
    return {(value if _is_colour(value) else str(int(value))): name for value, name in classes.items()}


def _is_colour(value: str) -> bool:
    return len(value) == 7 and value[0] == "#" and all(digit in "0123456789abcdef" for digit in value[1:])


def _by_class(classes: Mapping[str, str | None], said_by: Path, file: MaskFile) -> list[MaskFile]:
    """Return the mask once for each type that there is; most masks hold but one or two of them."""
    part: Part = "colour" if any(map(_is_colour, classes)) else "values"
    types = sorted({name for name in classes.values() if name})
    return [
        replace(file, part=part, rule=_OfType(kind, classes, file.path, said_by), defect_type=kind) for kind in types
    ]


@dataclass(frozen=True)
class _OfType:
    """The rule that takes the values of one type out of a mask."""

    kind: str
    classes: Mapping[str, str | None]
    path: Path
    said_by: Path

    def __call__(self, pixels: Pixels) -> Mask:
        """Return (height, width) bool.

        Raises:
            FlawmaskError: there is a value of which nothing is said.
        """
        numbers = {_number(value): kind for value, kind in self.classes.items()}
        values = self._numbered(pixels, is_coloured=any(map(_is_colour, self.classes)))
        unknown = [value for value in np.unique(values).tolist() if value and value not in numbers]
        if unknown:
            shown = f"#{unknown[0]:06x}" if any(map(_is_colour, self.classes)) else unknown[0]
            raise FlawmaskError(
                f"{self.path} holds {shown}, of which {self.said_by} says nothing: add its type, or null for no defect"
            )
        return np.asarray(np.isin(values, [value for value, kind in numbers.items() if kind == self.kind]), bool)

    def _numbered(self, pixels: Pixels, *, is_coloured: bool) -> npt.NDArray[Any]:
        """Return a number for each pixel: its value, or its colour's."""
        if is_coloured:
            red, green, blue = images.to_rgb(pixels).astype(np.uint32).transpose(2, 0, 1)
            return np.asarray(red << 16 | green << 8 | blue)
        if pixels.ndim == 3:
            if (pixels != pixels[:, :, :1]).any():
                raise FlawmaskError(f"{self.path} holds colours, and {self.said_by} names values: name '#rrggbb' there")
            return pixels[:, :, 0]
        return pixels


def _number(value: str) -> int:
    return int(value[1:], 16) if _is_colour(value) else int(value)


# Reading


@dataclass(frozen=True)
class TurnedImage:
    """What is known of an image when its masks are read: height and width in pixels, upright, and its Exif orientation
    as it is stored, None where the file says nothing of it."""

    height: int
    width: int
    orientation: int | None


class TurnedError(FlawmaskError):
    """A mask that fits its image in two ways."""


def pixels_of(data: bytes, file: MaskFile, image: TurnedImage, settings: MaskSettings) -> Pixels:
    """Return what of a mask's file its rule takes, upright as its image is.

    Args:
        data: the file.
        file: says what of it is wanted.
        image: what it is the mask of.
        settings: says what to do where a mask may be turned with its image or not.

    Raises:
        ImageError: it cannot be read, or lacks the part that the rule looks at.
        TurnedError: the image is turned and nothing tells whether the mask is to be.
    """
    parts = images.decode_parts(data, file.path)
    pixels = _part_of(parts, file)
    if (image.orientation or 1) == 1 or parts.orientation is not None:
        return pixels
    with_image: Pixels = np.ascontiguousarray(images.turned(pixels, image.orientation or 1))
    fits = [one for one in (pixels, with_image) if one.shape[:2] == (image.height, image.width)]
    if len(fits) < 2:
        return fits[0] if fits else pixels
    if settings.exif_masks is None and not np.array_equal(pixels, with_image):
        raise TurnedError(
            f"{file.path} says nothing of how it is turned, but Exif turns its image: say whether its pixels lie "
            "as those of the image do (--exif_masks with_image) or are upright already (--exif_masks as_stored)"
        )
    return with_image if settings.exif_masks == "with_image" else pixels


def _part_of(parts: Parts, file: MaskFile) -> Pixels:
    if file.part == "colour":
        return parts.colour
    if file.part == "values":
        return parts.colour if parts.palette is None else parts.palette
    found = parts.alpha if file.part == "alpha" else parts.palette
    if found is None:
        lacking = "alpha channel" if file.part == "alpha" else "palette"
        raise ImageError(f"{file.path} has no {lacking}, where --mask_values looks for the defect: export it as others")
    return found
