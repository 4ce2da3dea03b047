"""The tiles that a training shows: which ones an epoch draws, and their exact masks.

Most of a large image is good ground. If all its tiles were shown, an epoch would take long and teach little. So an
epoch draws a few tiles of each image: tiles with a defect, tiles beside one, and tiles of good images.
"""

import logging
from collections import Counter
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from flawmask import masks
from flawmask.coco import CocoSplit, Record, instance_rles, without_crowds
from flawmask.masks import Mask
from flawmask.model.spec import ModelSpec
from flawmask.tiles import Tiling, Window, cut, padded
from flawmask.training import loader
from flawmask.training.cache import PixelCache
from flawmask.training.loader import Augmenting, Item, SplitDataset

log = logging.getLogger(__name__)

MAX_DEFECTS, BESIDE, GOOD_GROUND = 6, 2, 2
"""An epoch draws so many tiles of an image: at most six, each with a defect, and two beside a defect; of a good image,
two. It never draws more tiles than cover the image."""

MIN_SLIVER = 16
"""In pixels. A piece that the edge of a tile cuts off is left out if it has fewer pixels than this and less than half
of its defect."""

Kind = Literal["defect", "beside", "good"]


class Draw(NamedTuple):
    """A tile of an epoch.

    Attributes:
        image: the place of its image in the split.
        number: counts the tiles of an image.
        defects: how many tiles of the image are of kind `defect`.
        kind: `defect`: it holds a pixel of a defect. `beside`: it lies around a defect, within half a tile, and may
            hold it or not. `good`: it may lie anywhere.
    """

    image: int
    number: int
    defects: int
    kind: Kind


def draws_of(split: CocoSplit, tiling: Tiling) -> list[Draw]:
    """Return the tiles of an epoch. Where they lie in their images is drawn anew in each epoch."""
    draws = []
    for place, image in enumerate(split.images):
        count = len(without_crowds(split.defects(image)))
        wanted: dict[Kind, int] = {"good": GOOD_GROUND}
        if count:
            wanted = {"defect": min(count, MAX_DEFECTS), "beside": BESIDE}
        kinds = [kind for kind, times in wanted.items() for _ in range(times)]
        kinds = kinds[: len(tiling.windows(image["height"], image["width"]))]
        draws += [Draw(place, number, kinds.count("defect"), kind) for number, kind in enumerate(kinds)]
    return draws


def log_cost(split: CocoSplit, tiling: Tiling) -> None:
    """Log how many tiles an epoch shows, and of what."""
    draws = draws_of(split, tiling)
    every = sum(len(tiling.windows(image["height"], image["width"])) for image in split.images)
    kinds = Counter(one.kind for one in draws)
    log.info(
        "an epoch shows %d tiles, drawn anew each time, of %d images that %d tiles cover: %d with a defect, %d beside "
        "one, %d of good images",
        *(len(draws), len(split.images), every, kinds["defect"], kinds["beside"], kinds["good"]),
    )


class TileDataset(SplitDataset):
    """The tiles of the images of a split, resized as the network needs them, with their targets.

    An item is like one of `SplitDataset`. Its place is `epoch * number of tiles + tile`, as an `Order` with
    `marks_epochs` gives it; without, the tiles are always those of epoch 0. Where a tile lies depends only on the seed,
    the epoch, the image and the tile's number.

    The masks are cut exactly. What is left of a defect is one instance for each connected piece, without slivers. Good
    images have no instance: a tile of one looks like any other good ground.
    """

    def __init__(
        self,
        split: CocoSplit,
        spec: ModelSpec,
        seed: int,
        cache: PixelCache | None = None,
        augmenting: Augmenting | None = None,
    ) -> None:
        """Take the split. Images are read on access.

        Args:
            split: the split to read.
            spec: of a network that sees tiles.
            seed: of the places of the tiles.
            cache: for whole images as they are read; None caches nothing.
            augmenting: the augmentation of each tile.
        """
        super().__init__(split, spec, cache, augmenting)
        assert spec.tiling is not None
        self.tiling, self.seed = spec.tiling, seed
        self.draws = draws_of(split, spec.tiling)
        self.shapes = [spec.resized(self.tiling.size, self.tiling.size)] * len(self.draws)

    @property
    def changes(self) -> bool:
        """True: each epoch shows other tiles."""
        return True

    def __len__(self) -> int:
        """Return the number of tiles of an epoch."""
        return len(self.draws)

    def lies_on_its_side(self, epoch: int, place: int) -> bool:
        """Return False: tiles are square."""
        return False

    def __getitem__(self, place: int) -> Item:
        """Return the tile and its target at a place.

        Raises:
            FlawmaskError: the image cannot be read, or its size differs from its record.
        """
        epoch, at = divmod(place, len(self))
        one = self.draws[at]
        record = self.split.images[one.image]
        draw = np.random.default_rng([self.seed, epoch, record["id"], one.number])
        where = str(self.split.image_path(record))
        single = without_crowds(self.split.defects(record))
        rles = instance_rles(single, record["height"], record["width"], where)
        window = _window(one, [rle for rle in rles if masks.area(rle)], record, self.tiling.size, draw)
        pixels = padded(np.array(cut(self._read_whole(one.image), window)), self.tiling.size)
        names = {label: name for name, label in self._labels.items()}
        pieces, labels = [], []
        for rle, defect in zip(rles, single, strict=True):
            for piece in pieces_in(rle, window, self.tiling.size):
                pieces.append(piece)
                labels.append(names[self.split.labels[defect["category_id"]]])
        stack = np.array(pieces, dtype=bool).reshape(-1, *pixels.shape[:2])
        if self.augmenting is not None:
            pixels, stack, labels = self._transformed(self.augmenting, pixels, stack, labels, draw, where)
        return self._item(pixels, stack, labels, record["id"], where)


def pieces_in(rle: Record, window: Window, size: int) -> list[Mask]:
    """Return what a tile shows of a defect: a (size, size) bool mask for each 8-connected piece, without slivers."""
    part = masks.part_of_rle(rle, *window)
    if not part.any():
        return []
    whole, least = masks.area(rle), min(MIN_SLIVER, masks.area(rle) / 2)
    mask = np.zeros((size, size), dtype=bool)
    mask[: window.height, : window.width] = part
    if np.count_nonzero(part) == whole:  # not cut: the instance is the one that was labelled
        return [mask]
    return [piece for piece in masks.components(mask) if np.count_nonzero(piece) >= least]


def _window(one: Draw, rles: list[Record], record: Record, size: int, draw: np.random.Generator) -> Window:
    """Return where a tile lies. All places within the image that suit its kind are equally likely."""
    sides = np.array([record["height"], record["width"]])
    tile = np.minimum(size, sides)
    first, last = np.zeros(2, np.int64), sides - tile
    if one.kind != "good" and rles:
        # The first tile shows the first defect, and so on; if there are more defects than tiles, chance decides.
        in_turn = one.kind == "defect" and len(rles) <= one.defects
        number = one.number if in_turn else int(draw.integers(len(rles)))
        pixel = _pixel(rles[number % len(rles)], draw)
        reach = size // 2 if one.kind == "beside" else 0
        first = np.clip(pixel - tile + 1 - reach, first, last)
        last = np.clip(pixel + reach, first, last)
    y, x = draw.integers(first, last + 1).tolist()
    return Window(x, y, int(tile[1]), int(tile[0]))


def _pixel(rle: Record, draw: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return the row and the column of a random pixel of a mask."""
    x, y, width, height = masks.box_of_rle(rle)
    rows, columns = np.nonzero(masks.part_of_rle(rle, x, y, width, height))
    at = int(draw.integers(len(rows)))
    return np.array([y + rows[at], x + columns[at]])


def dataset_of(
    split: CocoSplit,
    spec: ModelSpec,
    seed: int,
    cache: PixelCache | None = None,
    augmenting: Augmenting | None = None,
) -> SplitDataset:
    """Return a split as its network sees it: whole images, or tiles. See `SplitDataset` and `TileDataset`."""
    if spec.tile is None:
        return loader.SplitDataset(split, spec, cache, augmenting)
    return TileDataset(split, spec, seed, cache, augmenting)


def cached_shapes(split: CocoSplit, spec: ModelSpec, augmenting: Augmenting | None) -> list[tuple[int, int]]:
    """Return height and width of each image in the cache: as the network sees it or, if tiles are cut out of it or it
    is augmented before it is resized, whole."""
    if spec.tile is None and (augmenting is None or augmenting.of_resized):
        return loader.resized_shapes(split, spec)
    return [(image["height"], image["width"]) for image in split.images]
