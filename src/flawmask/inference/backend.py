"""What runs a network, whatever with: all that the stages know of it."""

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
    """An image as the network sees it.

    Attributes:
        pixels: (rows, columns, 3) uint8 RGB, of the size that `ModelSpec.resized` says.
        height: the image's as it was read.
        width: the image's as it was read.
    """

    pixels: Image
    height: int
    width: int


class Backend(Protocol):
    """A network and what computes it: PyTorch, or another runtime.

    Attributes:
        spec: what the network was built from.
        batch_size: how many images it takes at once where nothing else is asked for, 1 or more.
        uses_cores: whether it computes on the cores on which threads read images and make masks.
    """

    spec: ModelSpec
    batch_size: int
    uses_cores: bool

    def infer(self, batch: Sequence[Resized], /) -> list[RawDetections]:
        """Return what the network finds on each image. One thread calls it at a time.

        Args:
            batch: at least one image, all with the same `ModelSpec.padded`: one among larger ones would be padded more
                than it is alone, which gives other results.

        Raises:
            ValueError: an image would be padded more than alone.
        """
        ...


def resized(pixels: Image, spec: ModelSpec) -> Resized:
    """Return the image, (height, width, 3) uint8 RGB, at the size at which the network sees it.

    Raises:
        ValueError: the array is of another shape or type.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"an image is (height, width, 3) uint8 RGB, not {pixels.shape} {pixels.dtype}")
    height, width = pixels.shape[:2]
    return Resized(images.resize(pixels, spec.resized(height, width)), height, width)


def check_padding(batch: Sequence[Resized], spec: ModelSpec) -> None:
    """Refuse a batch in which an image would be padded more than alone.

    Raises:
        ValueError: there is one.
    """
    one, *others = (spec.padded(image.height, image.width) for image in batch)
    for other in others:
        if other != one:
            raise ValueError(f"images of one batch are of one size once they are padded, not {one} and {other}")


def detect(backend: Backend, pixels: Image) -> Prediction:
    """Return what is found on one image, (height, width, 3) uint8 RGB.

    Raises:
        ValueError: the array is of another shape or type.
    """
    (found,) = backend.infer([resized(pixels, backend.spec)])
    return post_process(found, backend.spec.classes, *pixels.shape[:2], join=backend.spec.join)


def check_classes(spec: ModelSpec, class_names: Sequence[str], where: Path) -> None:
    """Refuse a model and a data set that do not speak of the same classes.

    Raises:
        FlawmaskError: the names differ.
    """
    if set(spec.classes) != set(class_names):
        raise FlawmaskError(
            f"the checkpoint knows the classes {', '.join(spec.classes)}, but {where} has {', '.join(class_names)}: "
            "they must be the same"
        )
