"""What is to be known of an architecture apart from its network: one record each, which imports no PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flawmask.model.published import BODY, OtherFile, PackageFile, Rules, TorchvisionFile

if TYPE_CHECKING:
    from flawmask.model.build import Detector

STRIDE = 32
"""Networks that keep an image's proportions pad it to whole multiples of so many pixels, at the right and below."""


@dataclass(frozen=True)
class Proportional:
    """Images keep their proportions: the shorter side is resized to the image size, then both are padded.

    Attributes:
        stride: sides are padded to whole multiples of so many pixels, at the right and below.
    """

    stride: int = STRIDE


@dataclass(frozen=True)
class FixedSquare:
    """Images are squeezed to a square that is always the same.

    Attributes:
        side: its width and height, in pixels.
    """

    side: int


@dataclass(frozen=True)
class SteppedSquare:
    """Images are squeezed to a square, the smallest one allowed whose sides are no shorter than the image size.

    Attributes:
        step: its sides are whole multiples of so many pixels.
        smallest: its sides have so many pixels at least.
    """

    step: int
    smallest: int


@dataclass(frozen=True)
class DefaultOptimizer:
    """What `--optimizer auto` takes.

    Attributes:
        name: as `--optimizer` names it.
        divisor: its learning rate is `--lr` divided by this.
    """

    name: Literal["sgd", "adamw"]
    divisor: int = 1


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that others ask about an architecture: nobody else tells one from another by its name.

    SGD at 0.005 is what pretrained weights are tuned for. From none it was seen to reach NaN within 100 images, and
    AdamW at a tenth of it trains.

    Attributes:
        name: what `--arch` and checkpoints call it.
        kind: returns the functions for its kind of network; this imports PyTorch.
        network: what its kind builds the network from, as the kind's module says; None where the name is enough.
        has_masks: whether it finds masks; the others find boxes.
        loss_names: what its losses are called, in this order everywhere.
        size: at which size it sees an image.
        has_known_counts: whether the targets tell what its losses are divided by: images or instances. For the others
            a pass tells.
        has_anchor_sizes: whether `ModelSpec.anchor_sizes` mean anything to it; the others have anchors of their own,
            or none.
        is_recordable: whether the passes of its training can be recorded on CUDA.
        init_assumes_norms: whether its layers are drawn for norms that even out what they give; the others' do without.
        allows_batch_norm: whether `--norm auto` may choose norms that learn from a batch.
        batches_on_cpu: whether several images pass through it together on a CPU too. The others go one by one there,
            which is as fast and takes less memory.
        trainable_layers: how many of its backbone's five stages learn where it starts from pretrained weights.
        from_pretrained: the default optimiser where it starts from pretrained weights.
        from_scratch: the default optimiser where it does not.
        coco: its COCO weights; None where there are none.
        imagenet: the ImageNet weights of its backbone; None where there are none.
        old_names: what its layers were called in older files.
        backbone_names: what the layers of its backbone are called in a classifier's file.
    """

    name: str
    kind: "Callable[[], Detector]"
    network: Any = None
    has_masks: bool
    loss_names: tuple[str, ...]
    size: Proportional | FixedSquare | SteppedSquare = Proportional()
    has_known_counts: bool = False
    has_anchor_sizes: bool = False
    is_recordable: bool = False
    init_assumes_norms: bool = False
    allows_batch_norm: bool = True
    batches_on_cpu: bool = False
    trainable_layers: int = 3
    from_pretrained: DefaultOptimizer = DefaultOptimizer("sgd")
    from_scratch: DefaultOptimizer = DefaultOptimizer("adamw", 10)
    coco: TorchvisionFile | OtherFile | None = None
    imagenet: TorchvisionFile | PackageFile | None = None
    old_names: Rules = ()
    backbone_names: Rules = BODY

    def image_size(self, asked: int) -> int:
        """Return the image size in pixels that it is built for: the one that is asked for, or the only one it knows."""
        return self.size.side if isinstance(self.size, FixedSquare) else asked
