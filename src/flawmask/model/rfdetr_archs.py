"""RF-DETR's networks by name. A record's `network` is what rfdetr calls the configuration."""

from functools import partial
from typing import TYPE_CHECKING

from flawmask.model.architecture import Architecture, DefaultOptimizer, SteppedSquare
from flawmask.model.published import OtherFile

if TYPE_CHECKING:
    from flawmask.model.build import Detector

SMALLEST_SQUARE = 120
"""Pixels of an image's sides: on a smaller one there are fewer patches than the network has queries."""


def kind() -> "Detector":
    """Return the functions for RF-DETR."""
    from flawmask.model import rfdetr

    return rfdetr


_rfdetr = partial(
    Architecture,
    kind=kind,
    has_masks=True,
    loss_names=("loss_ce", "loss_bbox", "loss_giou", "loss_mask_ce", "loss_mask_dice"),  # rfdetr's words
    has_known_counts=True,
    # As for other transformers, and with pretrained weights as RF-DETR's authors do it: AdamW at 0.0001.
    from_pretrained=DefaultOptimizer("adamw", 50),
)

# Checksums are those in rfdetr's `assets/model_weights.py`.
RECORDS = (
    _rfdetr(
        name="rfdetr_seg_nano",
        network="RFDETRSegNanoConfig",
        size=SteppedSquare(12, SMALLEST_SQUARE),
        coco=OtherFile(
            "https://storage.googleapis.com/rfdetr/rf-detr-seg-n-ft.pth", "9995497791d0ff1664a1d9ddee9cfd20"
        ),
    ),
    _rfdetr(
        name="rfdetr_seg_small",
        network="RFDETRSegSmallConfig",
        size=SteppedSquare(24, SMALLEST_SQUARE),
        coco=OtherFile(
            "https://storage.googleapis.com/rfdetr/rf-detr-seg-s-ft.pth", "0a2a3006381d0c42853907e700eadd08"
        ),
    ),
)
