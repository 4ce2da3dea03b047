"""The spec of a network: everything that decides what it computes, except its weights."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from flawmask.errors import FlawmaskError
from flawmask.images import UPPER_BITS, Levels
from flawmask.joining import Join
from flawmask.model.arch import Arch, architecture
from flawmask.model.architecture import Architecture, FixedSquare, Proportional, SteppedSquare
from flawmask.tiles import TileFrom, Tiling

Norm = Literal["batch", "frozen", "group"]

TORCHVISION_SIZE, TORCHVISION_MAX_SIZE = 800, 1333
TORCHVISION_ANCHORS = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class ModelSpec:
    """Everything but the weights. Two networks with the same spec and state dict give the same results.

    Attributes:
        arch: the architecture's name.
        classes: the names of the classes, in the order of the network's labels 1, 2, ..., without background.
        image_size: the shorter side of a resized image, in pixels.
        norm: the normalisation layers: BatchNorm that learns, BatchNorm with frozen statistics, or GroupNorm.
        norm_eps: the epsilon of frozen norms; None for the architecture's own.
        anchor_sizes: the five anchor sizes, in pixels of the resized image, smallest first.
        max_detections: the most instances that are predicted on one image.
        proposals: region proposals kept per image, highest objectness first; twice as many in training.
        intensity: the values that become black and white, for images of more than 8 bits. Checkpoints of older
            versions have none: for them, the upper 8 of 16 bits are kept.
        join: which predictions of an image are one defect, see `joining.Join`. Checkpoints of older versions have none:
            for them, predictions are not joined.
        semantic_head: whether the network has a branch for pixels, see `model.semantic`. Checkpoints of older versions
            have none.
        tile: the side of the tiles in which the network sees an image, in pixels of the image; None if it sees images
            whole, as with checkpoints of older versions. A tile is resized like an image.
        overlap: the fewest pixels that neighbouring tiles share.
        tile_shift: how far the grid of tiles is moved, in pixels, up and to the left; for measurements.
        tile_from: which tiles the network sees, see `tiles.TileFrom`.
    """

    arch: Arch
    classes: tuple[str, ...]
    image_size: int = TORCHVISION_SIZE
    norm: Norm = "frozen"
    norm_eps: float | None = None
    anchor_sizes: tuple[int, ...] = TORCHVISION_ANCHORS
    max_detections: int = 100
    proposals: int = 1000
    intensity: Levels = UPPER_BITS
    join: Join = "off"
    semantic_head: bool = False
    tile: int | None = None
    overlap: int = 0
    tile_shift: int = 0
    tile_from: TileFrom = "all"

    def __post_init__(self) -> None:
        architecture(self.arch)
        is_known = self.norm in get_args(Norm) and self.join in get_args(Join) and bool(self.classes)
        is_known = is_known and self.tile_from in get_args(TileFrom)
        low, high = self.intensity
        is_known = is_known and self.semantic_head <= self.architecture.has_semantic_head
        if not is_known or len(self.anchor_sizes) != len(TORCHVISION_ANCHORS) or not 0 <= low < high <= 65535:
            raise FlawmaskError(f"{self} does not describe a network")
        _ = self.tiling  # it checks itself

    @property
    def tiling(self) -> Tiling | None:
        """The tiles in which the network sees an image; None if it sees images whole."""
        return None if self.tile is None else Tiling(self.tile, self.overlap, self.tile_shift, self.tile_shift)

    @property
    def tiles_as_json(self) -> dict[str, Any]:
        """The keys that say in results which tiles the network saw: `tile`, `overlap` and `tile_from`."""
        return {name: getattr(self, name) for name in ("tile", "overlap", "tile_from")}

    @property
    def architecture(self) -> Architecture:
        """The record of the architecture."""
        return architecture(self.arch)

    @property
    def has_masks(self) -> bool:
        """Whether the network predicts masks."""
        return self.architecture.has_masks

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The names of the network's losses; the order is the same everywhere."""
        return self.architecture.loss_names + (("loss_semantic",) if self.semantic_head else ())

    @property
    def fixed_size(self) -> int | None:
        """The side, in pixels, of the square to which every image is resized; None if the aspect ratio is kept."""
        match self.architecture.size:
            case FixedSquare(side):
                return side
            case SteppedSquare(step, smallest):
                return max(smallest, -(-self.image_size // step) * step)
            case Proportional():
                return None

    @property
    def max_size(self) -> int:
        """The largest longer side of a resized image, in pixels."""
        return round(self.image_size * TORCHVISION_MAX_SIZE / TORCHVISION_SIZE)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the resized image; at least 1.

        It is what torchvision's transform computes, in whole numbers: floats make some sides one pixel too short.
        """
        if self.fixed_size is not None:
            return self.fixed_size, self.fixed_size
        shorter, longer = min(height, width), max(height, width)
        rows, columns = (
            max(1, min(side * self.image_size // shorter, side * self.max_size // longer)) for side in (height, width)
        )
        return rows, columns

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the resized and padded image, if it is alone in a batch.

        Images with the same padded size can share a batch without more padding.
        """
        size = self.architecture.size
        if not isinstance(size, Proportional):
            return self.resized(height, width)
        rows, columns = (-(-side // size.stride) * size.stride for side in self.resized(height, width))
        return rows, columns

    def scales(self, height: int, width: int) -> tuple[float, float]:
        """Return the vertical and the horizontal scale by which a (height, width) image is resized."""
        if self.fixed_size is not None:
            return self.fixed_size / height, self.fixed_size / width
        scale = min(self.image_size / min(height, width), self.max_size / max(height, width))
        return scale, scale


def anchors_for(image_size: int) -> tuple[int, ...]:
    """Return five anchor sizes in pixels, smallest first: torchvision's for 800 pixels, scaled to the image size."""
    return tuple(max(4, round(size * image_size / TORCHVISION_SIZE)) for size in TORCHVISION_ANCHORS)


def proposals_for(image_size: int) -> int:
    """Return the number of region proposals to keep: torchvision's 1000 at 800 pixels, fewer for smaller images."""
    return max(200, round(1000 * image_size / TORCHVISION_SIZE))
