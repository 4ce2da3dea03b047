"""Everything that decides what a network computes but its weights, in one value."""

from dataclasses import dataclass
from typing import Literal, get_args

from flawmask.errors import FlawmaskError
from flawmask.images import UPPER_BITS, Levels
from flawmask.joining import Join
from flawmask.model.arch import Arch, architecture
from flawmask.model.architecture import Architecture, FixedSquare, Proportional, SteppedSquare

Norm = Literal["batch", "frozen", "group"]

TORCHVISION_SIZE, TORCHVISION_MAX_SIZE = 800, 1333
TORCHVISION_ANCHORS = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class ModelSpec:
    """Everything but the weights: two networks of one spec and one state dict give the same results.

    Attributes:
        arch: the architecture's name.
        classes: the classes' names in the order of the network's labels 1, 2, ...; background is not among them.
        image_size: the shorter side, in pixels, to which an image is resized.
        norm: what normalises: BatchNorm that learns, BatchNorm with fixed statistics, or GroupNorm.
        norm_eps: the epsilon of frozen norms; None for the architecture's own.
        anchor_sizes: the five anchor sizes, in pixels of the resized image, smallest first.
        max_detections: the most instances that one image can have.
        proposals: the most regions of an image that the heads look at; twice as many in training.
        intensity: which value is black and which is white, of images of more than 8 bits; of older checkpoints those
            that keep the upper 8 of 16 bits.
        join: which predictions of an image are one defect, see `joining.Join`; of older checkpoints each is one.
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

    def __post_init__(self) -> None:
        architecture(self.arch)
        is_known = self.norm in get_args(Norm) and self.join in get_args(Join) and bool(self.classes)
        low, high = self.intensity
        if not is_known or len(self.anchor_sizes) != len(TORCHVISION_ANCHORS) or not 0 <= low < high <= 65535:
            raise FlawmaskError(f"{self} does not describe a network")

    @property
    def architecture(self) -> Architecture:
        """What is to be known of every network of this architecture."""
        return architecture(self.arch)

    @property
    def has_masks(self) -> bool:
        """Whether the network outlines what it finds."""
        return self.architecture.has_masks

    @property
    def fixed_size(self) -> int | None:
        """The width and height, in pixels, to which every image is squeezed; None where proportions are kept."""
        match self.architecture.size:
            case FixedSquare(side):
                return side
            case SteppedSquare(step, smallest):
                return max(smallest, -(-self.image_size // step) * step)
            case Proportional():
                return None

    @property
    def max_size(self) -> int:
        """The most, in pixels, that the longer side may have after resizing."""
        return round(self.image_size * TORCHVISION_MAX_SIZE / TORCHVISION_SIZE)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width at which the network sees an image, as torchvision's transform works them out;
        but no side is ever 0."""
        if self.fixed_size is not None:
            return self.fixed_size, self.fixed_size
        down, across = self.scales(height, width)
        return max(1, int(height * down)), max(1, int(width * across))

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that an image has once it is resized and padded, alone in a batch.

        Images for which these are the same can share a batch: none is padded more than it would be alone.
        """
        size = self.architecture.size
        if not isinstance(size, Proportional):
            return self.resized(height, width)
        rows, columns = (-(-side // size.stride) * size.stride for side in self.resized(height, width))
        return rows, columns

    def scales(self, height: int, width: int) -> tuple[float, float]:
        """Return how many pixels the network sees for one of a (height, width) image, down and across."""
        if self.fixed_size is not None:
            return self.fixed_size / height, self.fixed_size / width
        scale = min(self.image_size / min(height, width), self.max_size / max(height, width))
        return scale, scale


def anchors_for(image_size: int) -> tuple[int, ...]:
    """Return five anchor sizes in pixels, smallest first: the same share of a resized image as torchvision's at 800."""
    return tuple(max(4, round(size * image_size / TORCHVISION_SIZE)) for size in TORCHVISION_ANCHORS)


def proposals_for(image_size: int) -> int:
    """Return how many regions the heads look at: torchvision's 1000 at 800 pixels, fewer on images with less room."""
    return max(200, round(1000 * image_size / TORCHVISION_SIZE))
