"""The content of label files, in a form that is the same for all formats."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flawmask import masks
from flawmask.coco import Record
from flawmask.coco_files import FileIndex
from flawmask.errors import FlawmaskError
from flawmask.files import walk
from flawmask.good_names import GOOD, looks_good
from flawmask.masks import Crop, Mask, Segmentation
from flawmask.settings import Reading
from flawmask.tally import Tally

CORNERS = 64
"""Corners of the polygon that approximates an ellipse. The error is below a thousandth of the longer radius."""


MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""The errors that Python raises if a file does not have the expected form."""


@dataclass(frozen=True)
class Box:
    """A box around a defect, in pixels of the image. It is not the defect's outline."""

    x: float
    y: float
    width: float
    height: float


Shape = Callable[[int, int], Segmentation | Box]
"""A function of the image's height and width that returns a COCO `segmentation` or a box."""


@dataclass(frozen=True)
class Region:
    """One object that was marked on an image.

    Attributes:
        label: the name of the class.
        shape: its shape and position.
        name: its name in messages.
        facts: further entries of its COCO record.
    """

    label: str
    shape: Shape
    name: str
    facts: Record = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledImage:
    """An image that was labelled. Without a region it is good.

    Attributes:
        path: its file.
        original_file: its name in messages: its POSIX path relative to the source.
        regions: the objects that were marked on it.
        size: its (width, height) in pixels according to the label file; None if the file does not say it.
        parts: the names of its part; see `groups.keys`.
        defect_type: its defect type; None to take it from its regions.
    """

    path: Path
    original_file: str
    regions: Sequence[Region]
    size: tuple[int, int] | None = None
    parts: tuple[str, ...] = ()
    defect_type: str | None = None


@dataclass
class Labels:
    """The content of a source's label files. Each format's module fills it.

    Attributes:
        source: the file or folder that the user named.
        root: the folder with the images, in it or below.
        reading: for COCO files, how to treat crowds and bad records.
        images: the images that were labelled.
        classes: the class names in the tool's order. Other classes follow in alphabetical order.
        categories: the category records, if the source has them.
        unlabelled_is_good: whether, in this format, an image without a label file is good.
        unlabelled: images in a label file that says that they were not labelled.
        unused_images: the tally of unused images.
        unused_annotations: the tally of unused annotations.
        bad: label files, or records in them, that cannot be used, each with `file` and `reason`.
    """

    source: Path
    root: Path
    reading: Reading = field(default_factory=Reading)
    images: list[LabelledImage] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    categories: list[Record] | None = None
    unlabelled_is_good: bool = False
    unlabelled: list[Path] = field(default_factory=list)
    unused_images: Tally = field(default_factory=lambda: Tally("images"))
    unused_annotations: Tally = field(default_factory=lambda: Tally("annotations"))
    bad: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._below = FileIndex(self.root)
        self._named: set[Path] = set()
        self._current: Path | None = None
        self._unclear: set[Path] = set()
        self._counted, self._expected = 0, 0

    @contextmanager
    def noting_errors(self, what: str, tool: str) -> Iterator[None]:
        """Note an error in the block as a bad label, and continue after the block.

        If the block has named an image before the error, the note names this image.

        Args:
            what: the label file, or a record in it, for messages.
            tool: the tool that wrote it.
        """
        self._current = None
        self._counted, self._expected = self.unused_annotations.found, 0
        try:
            yield
        except FlawmaskError as error:
            self._note(what, str(error))
        except MALFORMED as error:
            self._note(what, f"{what} is not as {tool} writes it ({type(error).__name__}: {error}): export it anew")

    def expect_annotations(self, number: int) -> None:
        """Note how many annotations the current label file or record has. All are counted, even after an error."""
        self._expected = number

    def leave_out_annotation(self, name: str, reason: str, classes: Collection[str] = ()) -> None:
        """Count an annotation of the current image that is not used.

        If the image has no other annotation, nobody knows what it shows. It is good only if the classes of all unused
        annotations say so.

        Args:
            name: its name in messages.
            reason: why it is not used, in one or two words.
            classes: the classes that it gives to the whole image.
        """
        self.unused_annotations.leave_out(name, reason)
        good = {GOOD, *self.reading.good_names}
        says_good = bool(classes) and all(label in good or looks_good(label) for label in classes)
        if self._current is not None and not says_good:
            self._unclear.add(self._current.resolve())

    def is_unclear(self, image: LabelledImage) -> bool:
        """Return whether an image has annotations, but none that can be used."""
        return not image.regions and image.path.resolve() in self._unclear

    def _note(self, what: str, reason: str) -> None:
        for number in range(self._expected - (self.unused_annotations.found - self._counted)):
            self.unused_annotations.leave_out(f"annotation {number} of {what}", "image not used")
        self.bad.append({"file": what if self._current is None else self.name_of(self._current), "reason": reason})

    def note_named(self, image: Path) -> None:
        """Note that an image is in a label file, whether it can be used or not."""
        self._current = image
        self._named.add(image.resolve())

    def is_named(self, image: Path) -> bool:
        """Return whether an image is in a label file."""
        return image.resolve() in self._named

    def image_file(self, name: str, where: Path, beside: Path | None = None) -> Path:
        """Return the image that a label file names.

        If the name was written on another machine, the image is returned whose path has the longest suffix in common
        with it.

        Args:
            name: the name in the label file.
            where: the label file, for the message.
            beside: a folder that the name may be relative to.

        Raises:
            FlawmaskError: there is no such image, or several match equally well.
        """
        for folder in (beside, self.root):
            path = None if folder is None or not name else Path(folder, name.replace("\\", "/"))
            if path is not None and path.is_file() and self.root.resolve() in path.resolve().parents:
                break
        else:
            parts = self._below.find(name, str(where))
            if parts is None:
                raise FlawmaskError(
                    f"{where} names {name}, which is not in {self.root}: put it there, or give --image_dir"
                )
            path = self.root.joinpath(*parts)
        self.note_named(path)
        return path

    def name_of(self, path: Path) -> str:
        """Return an image's name for messages: its path relative to the folder of the images."""
        return path.resolve().relative_to(self.root.resolve()).as_posix()


def files_below(source: Path, *suffixes: str) -> Iterator[Path]:
    """Yield the file, or the files in and below the folder, with one of the suffixes, in a fixed order."""
    paths = [source] if source.is_file() else walk(source)
    yield from (path for path in paths if path.suffix.lower() in suffixes)


def polygon(points: Iterable[Sequence[float]], across: float = 1.0, down: float = 1.0) -> Segmentation:
    """Return COCO polygons with one ring.

    Args:
        points: the corners, each (x, y).
        across: the factor for x.
        down: the factor for y.
    """
    ring = [round(float(value) * scale, 3) for x, y in points for value, scale in ((x, across), (y, down))]
    return [ring]  # type: ignore[list-item]  # COCO also allows fractional coordinates


def rotated_box(box: Box, degrees: float, around: tuple[float, float]) -> Segmentation:
    """Return a rectangle, rotated clockwise around a point, as COCO polygons."""
    right, below = box.x + box.width, box.y + box.height
    return polygon(_rotated([(box.x, box.y), (right, box.y), (right, below), (box.x, below)], degrees, around))


def ellipse(centre: tuple[float, float], radii: tuple[float, float], degrees: float = 0.0) -> Segmentation:
    """Return an ellipse, rotated clockwise around its centre, as COCO polygons with `CORNERS` corners."""
    angles = [2 * math.pi * i / CORNERS for i in range(CORNERS)]
    (x, y), (rx, ry) = centre, radii
    return polygon(
        _rotated([(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles], degrees, centre)
    )


def _rotated(
    points: Iterable[tuple[float, float]], degrees: float, around: tuple[float, float]
) -> list[tuple[float, float]]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x0, y0 = around
    return [
        (x0 + cos * (x - x0) - sin * (y - y0), y0 + sin * (x - x0) + cos * (y - y0))  # the y axis points down
        for x, y in points
    ]


def segmentation_of(part: Mask, x: int, y: int, height: int, width: int) -> Segmentation:
    """Return the COCO `segmentation` of a mask that covers a part of a (height, width) image.

    Args:
        part: (rows, columns) bool. Pixels outside the image are cut off.
        x: the column of the image where the part begins.
        y: the row of the image where the part begins.
        height: the height of the image.
        width: the width of the image.
    """
    left, top = max(0, -x), max(0, -y)
    inside = part[top : max(top, height - y), left : max(left, width - x)]
    if not inside.any():
        return masks.to_rle(np.zeros((height, width), dtype=bool))
    tight = masks.crop_mask(inside)
    return masks.encode_crop(Crop(tight.mask, x + left + tight.x, y + top + tight.y), height, width)
