"""The records of RF-DETR's networks. A record's `network` is the name of the configuration in rfdetr."""

from functools import partial
from typing import TYPE_CHECKING

from flawmask.model.architecture import Architecture, Recipe, SteppedSquare
from flawmask.model.published import OtherFile

if TYPE_CHECKING:
    from flawmask.model.build import Detector

SMALLEST_SQUARE = 120
"""The smallest side of an image in pixels. A smaller image would have fewer patches than the network has queries."""


def kind() -> "Detector":
    """Return the functions for RF-DETR."""
    from flawmask.model import rfdetr

    return rfdetr


_rfdetr = partial(
    Architecture,
    kind=kind,
    has_masks=True,
    loss_names=("loss_ce", "loss_bbox", "loss_giou", "loss_mask_ce", "loss_mask_dice"),  # rfdetr's names
    has_known_counts=True,
    # AdamW as for other transformers. With pretrained weights at 0.0001, like RF-DETR's authors.
    from_detector=Recipe("adamw", 50, trainable_layers=3),
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
