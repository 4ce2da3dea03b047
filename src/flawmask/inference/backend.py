"""The interface of a backend, which runs a network. The stages know nothing else of PyTorch or another runtime."""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from flawmask import images
from flawmask.errors import FlawmaskError
from flawmask.inference.tiled import TiledDetections, prediction_of, windows_near
from flawmask.model.spec import ModelSpec
from flawmask.prediction import Prediction, RawDetections
from flawmask.strips import Bands, StripImage, reduced, shrunk
from flawmask.tiles import Window, cut, padded

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Resized:
    """An image at the size of the network's input.

    Attributes:
        pixels: (rows, columns, 3) uint8 RGB, of the size that `ModelSpec.resized` returns. For a backend that resizes
            images itself, the original image.
        height: the height of the original image.
        width: the width of the original image.
    """

    pixels: Image
    height: int
    width: int


class Backend(Protocol):
    """A network and the runtime that computes it: PyTorch, or another one.

    Attributes:
        spec: the specification of the network.
        batch_size: the default batch size, 1 or more.
        uses_cores: whether the network runs on the CPU cores that threads need to read images and to make masks.
        resizes: whether the network resizes images itself.
    """

    spec: ModelSpec
    batch_size: int
    uses_cores: bool
    resizes: bool

    def infer(self, batch: Sequence[Resized], /) -> list[RawDetections]:
        """Return the detections of each image. Only one thread may call it at a time.

        Args:
            batch: at least one image, all of the same padded size (`ModelSpec.padded`). An image among larger ones
                would be padded more than alone, which changes its results.

        Raises:
            ValueError: the padded sizes differ.
        """
        ...


def prepared(pixels: Image, backend: Backend) -> Resized:
    """Return the image, (height, width, 3) uint8 RGB, as the backend takes it.

    Raises:
        ValueError: the array has another shape or type.
    """
    if not backend.resizes:
        return resized(pixels, backend.spec)
    _check(pixels)
    return Resized(pixels, *pixels.shape[:2])


def resized(pixels: Image, spec: ModelSpec) -> Resized:
    """Return the image, (height, width, 3) uint8 RGB, at the size of the network's input.

    Raises:
        ValueError: the array has another shape or type.
    """
    _check(pixels)
    height, width = pixels.shape[:2]
    return Resized(images.resize(pixels, spec.resized(height, width)), height, width)


def _check(pixels: Image) -> None:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"an image is (height, width, 3) uint8 RGB, not {pixels.shape} {pixels.dtype}")


def check_padding(batch: Sequence[Resized], spec: ModelSpec) -> None:
    """Refuse a batch with images of different padded sizes: the smaller ones would be padded more than alone.

    Raises:
        ValueError: the padded sizes differ.
    """
    first, *others = (spec.padded(image.height, image.width) for image in batch)
    for other in others:
        if other != first:
            raise ValueError(f"images of one batch need one padded size, not {first} and {other}")


def detect(backend: Backend, pixels: Image | StripImage) -> Prediction:
    """Return the prediction for one image.

    Args:
        backend: runs the network.
        pixels: (height, width, 3) uint8 RGB; for a network that sees tiles, also a file that is read in strips.

    Raises:
        ValueError: the array has another shape or type.
        ImageError: a file that is read in strips is damaged.
    """
    if backend.spec.tile is None:
        assert not isinstance(pixels, StripImage)
        (detections,) = backend.infer([prepared(pixels, backend)])
        return prediction_of(detections, backend.spec, *pixels.shape[:2])
    return prediction_of(infer_tiles(backend, pixels).detections, backend.spec, *pixels.shape[:2])


class TilesSeen(NamedTuple):
    """What a network saw in the tiles of an image.

    Attributes:
        detections: those of each tile.
        picture: the image; a smaller picture of one that was read in strips.
        size: height and width of the image.
        read: seconds to cut and resize the tiles, and to read the strips.
        network: seconds of all batches.
    """

    detections: TiledDetections
    picture: Image
    size: tuple[int, int]
    read: float
    network: float


Reader = Callable[[Callable[[Window], Resized], Iterable[Window]], Generator[Resized, None, None]]
"""Calls the function for each tile, in order. It may do so ahead, in threads."""


def _one_by_one(read: Callable[[Window], Resized], windows: Iterable[Window]) -> Generator[Resized, None, None]:
    yield from map(read, windows)


def infer_tiles(
    backend: Backend, image: Image | StripImage, batch_size: int | None = None, reader: Reader = _one_by_one
) -> TilesSeen:
    """Run the network on the tiles of an image, in batches.

    Args:
        backend: runs the network; its spec says which tiles.
        image: (height, width, 3) uint8 RGB, or a file that is read in strips.
        batch_size: tiles per batch; by default the backend's own.
        reader: reads the tiles.

    Raises:
        ImageError: a file that is read in strips is damaged.
    """
    spec, tiling = backend.spec, backend.spec.tiling
    assert tiling is not None
    height, width = image.shape[:2]
    windows, seconds, network = tiling.windows(height, width), [0.0], 0.0
    coarse = None
    if spec.tile_from == "coarse":
        picture = shrunk(image) if isinstance(image, StripImage) else image
        start = time.perf_counter()
        windows, coarse = _promising(backend, picture, windows, height, width)
        network = time.perf_counter() - start
    source = Bands(image, windows) if isinstance(image, StripImage) else image

    def read(window: Window) -> Resized:
        start = time.perf_counter()
        pixels = source.cut(window) if isinstance(source, Bands) else cut(source, window)
        tile = prepared(padded(pixels, tiling.size), backend)
        seconds.append(time.perf_counter() - start)
        return tile

    found: list[RawDetections] = []
    with closing(reader(read, windows)) as tiles:
        while batch := list(islice(tiles, batch_size or backend.batch_size)):
            start = time.perf_counter()
            found += backend.infer(batch)
            network += time.perf_counter() - start
    detections = TiledDetections(tuple(zip(windows, found, strict=True)), coarse)
    shown = source.picture if isinstance(source, Bands) else source
    return TilesSeen(detections, shown, (height, width), sum(seconds), network)


def _promising(
    backend: Backend, picture: Image, windows: list[Window], height: int, width: int
) -> tuple[list[Window], npt.NDArray[np.float32] | None]:
    """Return the tiles in which the network sees something on the whole image, and its maps of that."""
    small = reduced(picture, *backend.spec.resized(*picture.shape[:2]))
    (detections,) = backend.infer([Resized(small, height, width)])
    pixel = max(height / small.shape[0], width / small.shape[1])
    return windows_near(detections.boxes, windows, pixel), detections.maps


def check_classes(spec: ModelSpec, class_names: Sequence[str], where: Path) -> None:
    """Refuse a model and a data set whose class names differ.

    Raises:
        FlawmaskError: the names differ.
    """
    if set(spec.classes) != set(class_names):
        raise FlawmaskError(
            f"the checkpoint knows the classes {', '.join(spec.classes)}, but {where} has {', '.join(class_names)}: "
            "they must be the same"
        )
