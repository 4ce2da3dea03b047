"""What label files say of images, in whatever format they are written."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flawmask import masks
from flawmask.coco import Record
from flawmask.coco_files import FilesBelow
from flawmask.errors import FlawmaskError
from flawmask.files import walk
from flawmask.good_names import GOOD, looks_good
from flawmask.masks import Cut, Mask, Segmentation
from flawmask.settings import Reading
from flawmask.tally import Tally

CORNERS = 64
"""Of the polygon that stands for an ellipse: it lies within a thousandth of the longer radius of it."""


MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What Python raises where a file is not as it should be."""


@dataclass(frozen=True)
class Box:
    """A rectangle that encloses a defect and does not outline it, in pixels of the image."""

    x: float
    y: float
    width: float
    height: float


Shape = Callable[[int, int], Segmentation | Box]
"""Takes the image's height and width, and returns the outline as COCO's `segmentation`, or the box."""


@dataclass(frozen=True)
class Region:
    """One thing that somebody marked on an image.

    Attributes:
        label: the class's name.
        shape: where it is.
        name: what people know it by, for messages.
        facts: what else its COCO record is to say.
    """

    label: str
    shape: Shape
    name: str
    facts: Record = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledImage:
    """An image that somebody has looked at. Without a region it is good.

    Attributes:
        path: its file.
        original_file: what people know it by: its POSIX path from the source.
        regions: what was marked on it.
        size: its (width, height) in pixels, as the label file says; None where it says none.
        parts: what its part is called, see `groups.keys`.
        defect_type: the type that it counts for; None: its regions say it.
    """

    path: Path
    original_file: str
    regions: Sequence[Region]
    size: tuple[int, int] | None = None
    parts: tuple[str, ...] = ()
    defect_type: str | None = None


@dataclass
class Labels:
    """What the label files of a source say; each format's module fills it.

    Attributes:
        source: the file or folder that was named.
        root: the folder that the images lie in or below.
        reading: of a COCO file, what crowds are and what becomes of bad records.
        images: the images that somebody has looked at.
        classes: the names of classes in the order of the tool; others follow by the alphabet.
        categories: the category records, where the source has some.
        says_good: whether, by the format's own rule, an image of which no file speaks is good.
        unlabelled: images that a file names, and of which it says that nobody has looked at them.
        found: the images that are not used, by the reason.
        marked: the annotations that are not used, by the reason.
        bad: label files, or records of one, that cannot be used, each with `file` and `reason`.
    """

    source: Path
    root: Path
    reading: Reading = field(default_factory=Reading)
    images: list[LabelledImage] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    categories: list[Record] | None = None
    says_good: bool = False
    unlabelled: list[Path] = field(default_factory=list)
    found: Tally = field(default_factory=lambda: Tally("images"))
    marked: Tally = field(default_factory=lambda: Tally("annotations"))
    bad: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._below = FilesBelow(self.root)
        self._named: set[Path] = set()
        self._current: Path | None = None
        self._unclear: set[Path] = set()
        self._counted, self._expected = 0, 0

    @contextmanager
    def about(self, what: str, tool: str) -> Iterator[None]:
        """Note what goes wrong in the block as a bad label, of the image that it named if it did, and go on behind it.

        Args:
            what: the label file, or the record of one, for messages.
            tool: the tool that wrote it.
        """
        self._current = None
        self._counted, self._expected = self.marked.found, 0
        try:
            yield
        except FlawmaskError as error:
            self._note(what, str(error))
        except MALFORMED as error:
            self._note(what, f"{what} is not as {tool} writes it ({type(error).__name__}: {error}): export it anew")

    def expect(self, marks: int) -> None:
        """Note how many annotations the current label file or record holds: they are counted, whatever goes wrong."""
        self._expected = marks

    def leave_out_mark(self, name: str, reason: str, classes: Collection[str] = ()) -> None:
        """Count something on the current image that is not used. With nothing else on it, nobody knows what the image
        shows: it is not good, unless all that is left out says so.

        Args:
            name: what people know it by.
            reason: why it is not used, in one or two words.
            classes: what it says of the image as a whole.
        """
        self.marked.leave_out(name, reason)
        says_good = bool(classes) and all(one in {GOOD, *self.reading.good_names} or looks_good(one) for one in classes)
        if self._current is not None and not says_good:
            self._unclear.add(self._current.resolve())

    def is_unclear(self, image: LabelledImage) -> bool:
        """Return whether an image has nothing on it but what cannot be used."""
        return not image.regions and image.path.resolve() in self._unclear

    def _note(self, what: str, reason: str) -> None:
        for number in range(self._expected - (self.marked.found - self._counted)):
            self.marked.leave_out(f"annotation {number} of {what}", "image not used")
        self.bad.append({"file": what if self._current is None else self.name_of(self._current), "reason": reason})

    def name(self, image: Path) -> None:
        """Note that a label file speaks of an image, whether it can be used or not."""
        self._current = image
        self._named.add(image.resolve())

    def is_named(self, image: Path) -> bool:
        """Return whether a label file speaks of an image."""
        return image.resolve() in self._named

    def image_file(self, name: str, where: Path, beside: Path | None = None) -> Path:
        """Return the image that a label file names, by the longest common tail where it was written elsewhere.

        Args:
            name: as the label file has it.
            where: the label file, for the message.
            beside: a folder that the name may lead from.

        Raises:
            FlawmaskError: there is none, or several fit equally well.
        """
        for folder in (beside, self.root):
            path = None if folder is None or not name else Path(folder, name.replace("\\", "/"))
            if path is not None and path.is_file() and self.root.resolve() in path.resolve().parents:
                break
        else:
            parts = self._below.best(name, str(where))
            if parts is None:
                raise FlawmaskError(
                    f"{where} names {name}, which is not in {self.root}: put it there, or say --image_dir"
                )
            path = self.root.joinpath(*parts)
        self.name(path)
        return path

    def name_of(self, path: Path) -> str:
        """Return what people know an image by: its path from the folder of the images."""
        return path.resolve().relative_to(self.root.resolve()).as_posix()


def files_below(source: Path, *suffixes: str) -> Iterator[Path]:
    """Yield a file, or the files in and below a folder, that have one of the suffixes, in a fixed order."""
    paths = [source] if source.is_file() else walk(source)
    yield from (path for path in paths if path.suffix.lower() in suffixes)


def polygon(points: Iterable[Sequence[float]], across: float = 1.0, down: float = 1.0) -> Segmentation:
    """Return COCO polygons of one ring.

    Args:
        points: its corners, each x and y.
        across: what an x is multiplied by.
        down: what a y is multiplied by.
    """
    ring = [round(float(value) * scale, 3) for x, y in points for value, scale in ((x, across), (y, down))]
    return [ring]  # type: ignore[list-item]  # COCO's own coordinates are fractions too


def rotated_box(box: Box, degrees: float, around: tuple[float, float]) -> Segmentation:
    """Return a rectangle turned clockwise around a point, as COCO polygons."""
    right, below = box.x + box.width, box.y + box.height
    return polygon(_turned([(box.x, box.y), (right, box.y), (right, below), (box.x, below)], degrees, around))


def ellipse(centre: tuple[float, float], radii: tuple[float, float], degrees: float = 0.0) -> Segmentation:
    """Return an ellipse, turned clockwise around its centre, as COCO polygons of `CORNERS` corners."""
    angles = [2 * math.pi * at / CORNERS for at in range(CORNERS)]
    (x, y), (rx, ry) = centre, radii
    return polygon(_turned([(x + rx * math.cos(at), y + ry * math.sin(at)) for at in angles], degrees, centre))


def _turned(
    points: Iterable[tuple[float, float]], degrees: float, around: tuple[float, float]
) -> list[tuple[float, float]]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x0, y0 = around
    return [
        (x0 + cos * (x - x0) - sin * (y - y0), y0 + sin * (x - x0) + cos * (y - y0))  # y points down
        for x, y in points
    ]


def outline_of(part: Mask, x: int, y: int, height: int, width: int) -> Segmentation:
    """Return the outline of a mask that covers a part of a (height, width) image, as COCO's `segmentation`.

    Args:
        part: (rows, columns) bool; what lies outside the image is cut off.
        x: the column of the image where its first column lies.
        y: the row of the image where its first row lies.
        height: the image's.
        width: the image's.
    """
    left, top = max(0, -x), max(0, -y)
    inside = part[top : max(top, height - y), left : max(left, width - x)]
    if not inside.any():
        return masks.to_rle(np.zeros((height, width), dtype=bool))
    tight = masks.cut_out(inside)
    return masks.encode_cut(Cut(tight.mask, x + left + tight.x, y + top + tight.y), height, width)
