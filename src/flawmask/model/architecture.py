"""The record of an architecture: everything about it but the network itself. It imports no PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flawmask.model.published import BODY, OtherFile, PackageFile, Rules, TorchvisionFile

if TYPE_CHECKING:
    from flawmask.model.build import Detector

STRIDE = 32
"""Networks that keep an image's aspect ratio pad its sides to multiples of this many pixels, at the right and below."""


@dataclass(frozen=True)
class Proportional:
    """Images keep their aspect ratio: the shorter side is resized to the image size, then both sides are padded.

    Attributes:
        stride: sides are padded to multiples of this many pixels, at the right and below.
    """

    stride: int = STRIDE


@dataclass(frozen=True)
class FixedSquare:
    """Images are resized to a square of a fixed size, whatever their aspect ratio.

    Attributes:
        side: its width and height, in pixels.
    """

    side: int


@dataclass(frozen=True)
class SteppedSquare:
    """Images are resized to a square, whatever their aspect ratio. Its side is the image size rounded up to a multiple.

    Attributes:
        step: the side is a multiple of this many pixels.
        smallest: the smallest side, in pixels.
    """

    step: int
    smallest: int


Start = Literal["detector", "backbone", "nothing"]
"""What a training starts from: pretrained weights of a whole detector, of its backbone only, or random weights."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained by default, from one kind of start. docs/results.md shows what the values rest on.

    Attributes:
        optimizer: the optimiser for `--optimizer auto`.
        divisor: its learning rate is `--lr` divided by this.
        backbone_lr: the learning rate of the backbone, as a share of that of the other layers.
        trainable_layers: how many of the backbone's five stages are trained.
    """

    optimizer: Literal["sgd", "adamw"]
    divisor: int = 1
    backbone_lr: float = 1.0
    trainable_layers: int = 5


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that other modules need to know of an architecture. None of them tests an architecture's name.

    SGD at 0.005 is the default only from a pretrained detector: its weights are tuned for that. Without pretrained
    weights, SGD reached NaN within 100 images in a trial, while AdamW at a tenth of the rate trained well. A pretrained
    backbone beside random heads gets a tenth of their learning rate: at the full rate it loses what it has learnt.

    Attributes:
        name: the name in `--arch` and in checkpoints.
        kind: returns the functions for its kind of network; calling it imports PyTorch.
        network: what the kind's module builds the network from; None where the name is enough.
        has_masks: whether it predicts masks. All architectures predict boxes.
        loss_names: the names of its losses; the order is the same everywhere.
        size: how images are resized for it.
        has_known_counts: whether the divisors of its losses (images or instances) follow from the targets alone. For
            the others, only a forward pass tells them.
        has_anchor_sizes: whether it uses `ModelSpec.anchor_sizes`. The others have fixed anchors or none.
        has_semantic_head: whether it can have a branch for pixels, see `model.semantic`.
        is_recordable: whether its training passes can be recorded as CUDA graphs.
        init_assumes_norms: whether the initial weights of its layers need norms that rescale the layers' outputs.
        allows_batch_norm: whether `--norm auto` may choose BatchNorm that learns.
        batches_on_cpu: whether a CPU computes several images at once. Otherwise it computes one after the other, which
            is as fast and takes less memory.
        from_detector: the recipe with pretrained weights of the whole detector.
        from_backbone: the recipe with pretrained weights of its backbone only.
        from_nothing: the recipe without pretrained weights.
        coco: its COCO weights; None if there are none.
        imagenet: the ImageNet weights of its backbone; None if there are none.
        old_names: the names of its layers in older files.
        backbone_names: the names of its backbone's layers in a classifier's file.
    """

    name: str
    kind: "Callable[[], Detector]"
    network: Any = None
    has_masks: bool
    loss_names: tuple[str, ...]
    size: Proportional | FixedSquare | SteppedSquare = Proportional()
    has_known_counts: bool = False
    has_anchor_sizes: bool = False
    has_semantic_head: bool = False
    is_recordable: bool = False
    init_assumes_norms: bool = False
    allows_batch_norm: bool = True
    batches_on_cpu: bool = False
    from_detector: Recipe = Recipe("sgd", trainable_layers=3)
    from_backbone: Recipe = Recipe("adamw", 10, backbone_lr=0.1)
    from_nothing: Recipe = Recipe("adamw", 10)
    coco: TorchvisionFile | OtherFile | None = None
    imagenet: TorchvisionFile | PackageFile | None = None
    old_names: Rules = ()
    backbone_names: Rules = BODY

    def recipe(self, start: Start) -> Recipe:
        """Return how the network is trained by default, from this start."""
        return {"detector": self.from_detector, "backbone": self.from_backbone, "nothing": self.from_nothing}[start]

    def image_size(self, wanted: int) -> int:
        """Return the wanted image size in pixels. An architecture with one fixed size returns that instead."""
        return self.size.side if isinstance(self.size, FixedSquare) else wanted
