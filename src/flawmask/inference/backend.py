"""The interface of a backend, which runs a network. The stages know nothing else of PyTorch or another runtime."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flawmask import images
from flawmask.errors import FlawmaskError
from flawmask.model.spec import ModelSpec
from flawmask.prediction import Prediction, RawDetections, post_process

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


def detect(backend: Backend, pixels: Image) -> Prediction:
    """Return the prediction for one image, (height, width, 3) uint8 RGB.

    Raises:
        ValueError: the array has another shape or type.
    """
    (detections,) = backend.infer([prepared(pixels, backend)])
    return post_process(detections, backend.spec.classes, *pixels.shape[:2], join=backend.spec.join)


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
