"""How `predict` reads its images, and which of them it warns of."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask import images, remote
from flawmask.errors import FlawmaskError
from flawmask.inference.config import PredictConfig
from flawmask.masks import Mask
from flawmask.model.spec import ModelSpec
from flawmask.settings import require
from flawmask.strips import StripImage, opened
from flawmask.tiles import warn_of_smaller

log = logging.getLogger(__name__)


@dataclass
class Odd:
    """Images of a kind that the user should know of: how many, and one as an example, the first by name.

    Attributes:
        count: the number of such images.
        first: the example; None without any.
        how: what is odd about it.
        lock: held while an image is counted.
    """

    count: int = 0
    first: str | None = None
    how: str = ""
    lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, name: str, how: str = "") -> None:
        """Count an image. Several threads may call this."""
        with self.lock:
            self.count += 1
            if self.first is None or name < self.first:
                self.first, self.how = name, how


@dataclass(frozen=True)
class Reader:
    """Reads images. Several threads do it.

    Attributes:
        config: the settings of the stage.
        spec: the specification of the network.
        region: the region of interest, (height, width) bool; None for the whole image.
        levels: the values that become black and white in images of more than 8 bits.
        outside: the images with a grey range that does not fit `levels`.
        smaller: the images that are smaller than a tile in height or width.
        first: the first image that is decoded whole, for each reason; see `strips.opened`.
    """

    config: PredictConfig
    spec: ModelSpec
    region: Mask | None
    levels: images.Levels
    outside: Odd = field(default_factory=Odd)
    smaller: Odd = field(default_factory=Odd)
    first: dict[str, Path] = field(default_factory=dict)

    def __call__(self, path: Path | str) -> npt.NDArray[np.uint8] | StripImage:
        """Return an image's pixels, (height, width, 3) RGB; with tiles, perhaps a file that is read in strips.

        Args:
            path: the file's path, or the address of a remote file.

        Raises:
            FlawmaskError: it cannot be read, or its size is not that of the region of interest.
        """
        pixels: npt.NDArray[Any] | StripImage
        if isinstance(path, str):
            pixels = images.decode(remote.read(path), path, self.config.page)
        else:
            has_tiles = self.spec.tile is not None and self.config.page is None
            pixels = (opened(path, self.first) if has_tiles else None) or images.read_pixels(path, self.config.page)
        self._check_size(pixels.shape[:2], path)
        if self.spec.tile is not None and min(pixels.shape[:2]) < self.spec.tile:
            self.smaller.add(str(path))
        if isinstance(pixels, StripImage):
            return pixels
        if how := images.levels_problem(pixels, self.levels):
            self.outside.add(str(path), how)
        return images.as_seen(pixels, self.levels, path)

    def _check_size(self, shape: tuple[int, ...], path: Path | str) -> None:
        if self.region is not None and self.region.shape != shape:
            sizes = [f"{width}x{height}" for height, width in (shape, self.region.shape)]
            raise FlawmaskError(
                f"{path} is {sizes[0]} but {self.config.roi} is {sizes[1]}: draw the region at the images' size"
            )

    def warn(self, total: int) -> None:
        """Warn of odd images among `total` that were read."""
        if self.outside.count:
            log.warning(
                "%d of %d images do not fit the range of grey from %d to %d (%s): %s %s; if the camera has fewer bits "
                "or more, give their number with --intensity, or train on its images",
                self.outside.count,
                total,
                *self.levels,
                "as the model was trained" if self.config.intensity is None else f"--intensity {self.config.intensity}",
                self.outside.first,
                self.outside.how,
            )
        if self.spec.tile is not None:
            warn_of_smaller(self.smaller.count, total, "--input", self.spec.tile)


def read_region(path: Path) -> Mask:
    """Return the region of interest of `--roi`, (height, width) bool.

    Raises:
        FlawmaskError: the file cannot be read, or has no white pixel.
    """
    region = images.read_mask(path)
    require(bool(region.any()), f"{path} has no white pixel: no defect would ever count")
    return region
