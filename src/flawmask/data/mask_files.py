"""Read mask files: with one rule for all masks of a category, and turned like their images.

Tools mark a defect with white, with 1, with the number of its class, with a colour, with a palette index, or with
opaque pixels. A single mask does not tell which. All masks of a category together do.
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
from flawmask.images import DecodedImage, Pixels
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
"""The part of a file that each rule reads, and the function that finds the defect in it."""

MEANING = {
    "white": "what is above half of white",
    "nonzero": "what is not 0",
    "alpha": "what the alpha channel leaves opaque",
    "palette": "what has another number than 0 in the palette",
}

MAX_CLASSES = 32
"""More values than this are not classes, but come from smoothing or JPEG noise."""


JPEG = b"\xff\xd8\xff"
"""The first bytes of a JPEG (ITU-T T.81, annex B)."""


@dataclass(frozen=True, kw_only=True)
class MaskSettings(Settings):
    """How masks are read."""

    mask_values: MaskValues = "auto"
    """What marks the defect: white (above half), nonzero, opaque alpha, or a palette index above 0; auto detects it."""
    mask_classes: Path | None = None
    """JSON file with the defect type of each mask value or colour: {"1": "hole", "2": null}; null is no defect."""
    exif_masks: Literal["with_image", "as_stored"] | None = None
    """If Exif rotates only the image: rotate the mask with_image, or use it as_stored. By default, prepare stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = self.mask_classes is None or self.mask_values == "auto"
        require(alone, "--mask_classes says what each value is: leave out --mask_values")


# Choosing the rule


@dataclass(frozen=True)
class ChosenRule:
    """The rule for the masks of a category.

    Attributes:
        rule: one of `RULES`, or `classes` if a file maps values to types.
        reason: why this rule was chosen. It continues after the rule's description.
        warning: a warning about masks with several values where one was expected, or "".
    """

    rule: Rule
    reason: str
    warning: str = ""

    def __str__(self) -> str:
        """Return the rule and the reason in words."""
        meaning = MEANING.get(self.rule)
        return f"{meaning} is the defect (--mask_values {self.rule}): {self.reason}" if meaning else self.reason


def choose_rule(samples: Sequence[Sample], settings: MaskSettings) -> tuple[list[Sample], ChosenRule | None]:
    """Choose one rule for all masks, and return the samples with this rule, and the rule itself.

    Masks for which the layout has its own rule stay as they are. If there are no other masks, the rule is None.

    Args:
        samples: the samples of one category.
        settings: the settings.

    Raises:
        FlawmaskError: some masks have their defect in the alpha channel, and others have it elsewhere.
    """
    paths = dict.fromkeys(file.path for sample in samples for file in sample.masks if _is_usual(file))
    if not paths:
        return list(samples), None
    if settings.mask_classes is not None:
        classes = classes_in(settings.mask_classes)
        return _with_files(samples, partial(_by_class, classes, settings.mask_classes)), ChosenRule(
            "classes", f"values of masks are types as {settings.mask_classes} says"
        )
    contents = _inspect_all(list(paths))
    chosen = _choose(contents, settings.mask_values)
    part, rule = RULES[chosen.rule]
    return _with_files(samples, lambda file: [replace(file, part=part, rule=rule)]), chosen


def _is_usual(file: MaskFile) -> bool:
    return file.rule is images.to_mask


def _with_files(samples: Sequence[Sample], changed: Callable[[MaskFile], Iterable[MaskFile]]) -> list[Sample]:
    return [
        replace(
            sample,
            masks=tuple(mask for file in sample.masks for mask in (changed(file) if _is_usual(file) else [file])),
        )
        for sample in samples
    ]


@dataclass(frozen=True)
class _Contents:
    """The content of a mask file.

    Attributes:
        path: the file.
        values: its grey values without 0, or its colours without black as `#rrggbb`; at most `MAX_CLASSES` + 1 of them.
        has_black: whether a pixel is 0.
        has_white: whether a pixel is above half.
        fits: the parts of the file that may mark the defect.
        needs: those of these parts that mark other pixels than the white ones.
        is_jpeg: whether it is a JPEG. Small values in a JPEG are noise.
    """

    path: Path
    values: tuple[str, ...]
    has_black: bool
    has_white: bool
    fits: frozenset[str]
    needs: frozenset[str]
    is_jpeg: bool


def _inspect_all(paths: Sequence[Path]) -> list[_Contents]:
    """Return the contents of the masks. Unreadable ones are skipped here; they are reported when they are used."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        contents = track(pool.map(_inspect, paths), "masks", total=len(paths))
        return [mask for mask in contents if mask is not None]


def _inspect(path: Path) -> _Contents | None:
    try:
        data = images.read_bytes(path)
        parts = images.decode_parts(data, path)
    except ImageError:
        return None
    brightest_channel, is_white = images.brightest_channel(parts.colour), images.white(parts.colour)
    candidates = [*_in_alpha(parts, is_white), *_in_palette(parts, brightest_channel, is_white)]
    return _Contents(
        path,
        _values(parts.colour, brightest_channel),
        not brightest_channel.all(),
        bool(is_white.any()),
        frozenset(part for part, _ in candidates),
        frozenset(part for part, is_needed in candidates if is_needed),
        data.startswith(JPEG),
    )


def _in_alpha(parts: DecodedImage, is_white: Mask) -> list[tuple[str, bool]]:
    """Return the alpha channel if it may mark the defect, and whether it differs from the white pixels.

    It may mark the defect if all opaque pixels are equally bright, so that the colours tell nothing.
    """
    if parts.alpha is None:
        return []
    opaque = images.white(parts.alpha)
    shown = is_white[opaque]
    if opaque.all() or (shown.any() and not shown.all()):
        return []
    return [("alpha", bool(opaque.any()) and not np.array_equal(opaque, is_white))]


def _in_palette(parts: DecodedImage, brightest_channel: Pixels, is_white: Mask) -> list[tuple[str, bool]]:
    """Return the palette if its index 0 may be the background, that is if it is black; and whether it differs from the
    white pixels."""
    if parts.palette is None or brightest_channel[parts.palette == 0].any():
        return []
    return [("palette", not np.array_equal(parts.palette > 0, is_white))]


def _values(colour: Pixels, brightest_channel: Pixels) -> tuple[str, ...]:
    """Return a mask's values without 0, at most `MAX_CLASSES` + 1 of them."""
    if colour.ndim == 2 or (colour == colour[:, :, :1]).all():
        values = np.flatnonzero(np.bincount(brightest_channel.ravel()))
        return tuple(str(value) for value in values[values > 0][: MAX_CLASSES + 1])
    eight = images.to_eight_bits(colour[brightest_channel > 0][:, None]).astype(np.uint32)[:, 0]
    packed = np.unique(eight[:, 0] << 16 | eight[:, 1] << 8 | eight[:, 2])
    return tuple(f"#{value:06x}" for value in packed[: MAX_CLASSES + 1])


def _choose(contents: Sequence[_Contents], wanted: MaskValues) -> ChosenRule:
    rule, reason = (wanted, "as you chose") if wanted != "auto" else _best(contents)
    values = sorted({value for mask in contents for value in mask.values}, key=lambda value: (len(value), value))
    several = [mask for mask in contents if len(mask.values) > 1]
    if not several or rule == "alpha":
        return ChosenRule(rule, reason)
    shown = f"{', '.join(values[:5])}{', ...' if len(values) > 5 else ''}"
    which = f"{len(several)} of {len(contents)} masks hold several values ({shown}), for example {several[0].path.name}"
    if len(values) > MAX_CLASSES or all(mask.is_jpeg for mask in several):
        advice = "smoothing or JPEG causes this: export them as PNG, in black and white"
    elif rule == "white":
        advice = "those up to half of white count as no defect: see --mask_values and --mask_classes"
    else:
        advice = "all count as defect: --mask_classes says which type each is"
    return ChosenRule(rule, reason, f"{which}; {advice}")


def _best(contents: Sequence[_Contents]) -> tuple[Rule, str]:
    """Return the rule that fits all masks, and the reason.

    Raises:
        FlawmaskError: no rule fits all masks.
    """
    in_alpha = [mask for mask in contents if "alpha" in mask.needs]
    others = [mask for mask in contents if "alpha" not in mask.fits]
    if in_alpha and others:
        raise FlawmaskError(
            f"{in_alpha[0].path} has its defect in the alpha channel, and {others[0].path} does not: export all masks "
            "in the same way, or give --mask_values"
        )
    if in_alpha:
        return "alpha", f"{len(in_alpha)} of {len(contents)} masks mark it only there"
    in_palette = [mask for mask in contents if "palette" in mask.needs]
    if in_palette and all("palette" in mask.fits for mask in contents):
        return "palette", f"all masks have one, and {len(in_palette)} of {len(contents)} have dark colours in it"
    too_dark = [mask for mask in contents if mask.values and not mask.has_white]
    values = {value for mask in contents for value in mask.values}
    if too_dark and len(values) <= MAX_CLASSES and all(mask.has_black and not mask.is_jpeg for mask in too_dark):
        shown = ", ".join(sorted(values, key=lambda value: (len(value), value))[:5]) + (
            ", ..." if len(values) > 5 else ""
        )
        return "nonzero", f"{len(too_dark)} of {len(contents)} masks have nothing above half of white, but {shown}"
    return "white", f"as in {sum(mask.has_white for mask in contents)} of {len(contents)} masks"


# Values that stand for types


def classes_in(path: Path) -> dict[str, str | None]:
    """Return the defect type of each value, such as `17`, or colour, such as `#ff0000`; None means no defect.

    Raises:
        FlawmaskError: the file is missing or has another form.
    """
    form = 'it must say {"1": "hole", "2": "crack"}, or {"#ff0000": "hole"}; null is no defect'
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise FlawmaskError(f"--mask_classes {path} cannot be read ({error}): {form}") from None
    if not isinstance(content, dict) or not content:
        raise FlawmaskError(f"--mask_classes {path}: {form}")
    classes = {str(value).strip().lower(): name for value, name in content.items()}
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


def _by_class(classes: Mapping[str, str | None], classes_file: Path, file: MaskFile) -> list[MaskFile]:
    """Return the mask once for each defect type in the file. (Most masks hold only one or two types.)"""
    part: Part = "colour" if any(map(_is_colour, classes)) else "values"
    types = sorted({name for name in classes.values() if name})
    return [
        replace(file, part=part, rule=_OfType(kind, classes, file.path, classes_file), defect_type=kind)
        for kind in types
    ]


@dataclass(frozen=True)
class _OfType:
    """A rule that finds the pixels of one defect type in a mask."""

    kind: str
    classes: Mapping[str, str | None]
    path: Path
    classes_file: Path

    def __call__(self, pixels: Pixels) -> Mask:
        """Return (height, width) bool.

        Raises:
            FlawmaskError: the mask has a value that is not in the file.
        """
        numbers = {_number(value): kind for value, kind in self.classes.items()}
        values = self._numbered(pixels, is_coloured=any(map(_is_colour, self.classes)))
        unknown = [value for value in np.unique(values).tolist() if value and value not in numbers]
        if unknown:
            shown = f"#{unknown[0]:06x}" if any(map(_is_colour, self.classes)) else unknown[0]
            raise FlawmaskError(
                f"{self.path} holds {shown}, which {self.classes_file} does not list: add its type, "
                "or null for no defect"
            )
        return np.asarray(np.isin(values, [value for value, kind in numbers.items() if kind == self.kind]), bool)

    def _numbered(self, pixels: Pixels, *, is_coloured: bool) -> npt.NDArray[Any]:
        """Return a number for each pixel: its value, or its colour as a number."""
        if is_coloured:
            red, green, blue = images.to_rgb(pixels).astype(np.uint32).transpose(2, 0, 1)
            return np.asarray(red << 16 | green << 8 | blue)
        if pixels.ndim == 3:
            if (pixels != pixels[:, :, :1]).any():
                raise FlawmaskError(
                    f"{self.path} holds colours, and {self.classes_file} names values: name '#rrggbb' there"
                )
            return pixels[:, :, 0]
        return pixels


def _number(value: str) -> int:
    return int(value[1:], 16) if _is_colour(value) else int(value)


# ChosenRule


@dataclass(frozen=True)
class ImageGeometry:
    """An image's upright height and width in pixels, and its Exif orientation; None if the file has none."""

    height: int
    width: int
    orientation: int | None


class OrientationError(FlawmaskError):
    """A mask may be turned with its image or not, and both fit."""


def pixels_of(data: bytes, file: MaskFile, image: ImageGeometry, settings: MaskSettings) -> Pixels:
    """Return the pixels of a mask file that its rule reads, turned upright like its image.

    Args:
        data: the content of the file.
        file: the mask file, with the part that its rule reads.
        image: the image that the mask belongs to.
        settings: what to do if a mask may be turned with its image or not.

    Raises:
        ImageError: the file cannot be read, or lacks the part that its rule reads.
        OrientationError: the image is turned, and it is not known whether the mask is too.
    """
    parts = images.decode_parts(data, file.path)
    pixels = _part_of(parts, file)
    if (image.orientation or 1) == 1 or parts.orientation is not None:
        return pixels
    with_image: Pixels = np.ascontiguousarray(images.turn_upright(pixels, image.orientation or 1))
    fits = [candidate for candidate in (pixels, with_image) if candidate.shape[:2] == (image.height, image.width)]
    if len(fits) < 2:
        return fits[0] if fits else pixels
    if settings.exif_masks is None and not np.array_equal(pixels, with_image):
        raise OrientationError(
            f"{file.path} has no Exif orientation, but its image has one: give --exif_masks with_image if the mask has "
            "to be rotated like the image, or --exif_masks as_stored if it is upright already"
        )
    return with_image if settings.exif_masks == "with_image" else pixels


def _part_of(parts: DecodedImage, file: MaskFile) -> Pixels:
    if file.part == "colour":
        return parts.colour
    if file.part == "values":
        return parts.colour if parts.palette is None else parts.palette
    part = parts.alpha if file.part == "alpha" else parts.palette
    if part is None:
        lacking = "alpha channel" if file.part == "alpha" else "palette"
        raise ImageError(
            f"{file.path} has no {lacking}, where --mask_values looks for the defect: export it like the other masks"
        )
    return part
