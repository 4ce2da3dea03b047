"""The records of YOLO11's networks. They have the names of ultralytics' own descriptions."""

from functools import partial
from typing import TYPE_CHECKING

from flawmask.model.architecture import Architecture
from flawmask.model.published import OtherFile

if TYPE_CHECKING:
    from flawmask.model.build import Detector


def kind() -> "Detector":
    """Return the functions for YOLO."""
    from flawmask.model import yolo

    return yolo


def _weights(name: str) -> OtherFile:
    return OtherFile(f"https://github.com/ultralytics/assets/releases/download/v8.3.0/{name}.pt")


_yolo = partial(Architecture, kind=kind, init_assumes_norms=True)
_boxes = partial(_yolo, has_masks=False, loss_names=("box_loss", "cls_loss", "dfl_loss"))
_masks = partial(_yolo, has_masks=True, loss_names=("box_loss", "seg_loss", "cls_loss", "dfl_loss"))
"""The losses have ultralytics' names."""

RECORDS = (
    _boxes(name="yolo11n", coco=_weights("yolo11n")),
    _masks(name="yolo11n-seg", coco=_weights("yolo11n-seg")),
    _boxes(name="yolo11s", coco=_weights("yolo11s")),
    _masks(name="yolo11s-seg", coco=_weights("yolo11s-seg")),
)
