"""YOLO11 for boxes and for masks, through ultralytics (AGPL-3.0). It is an extra: `pip install "flawmask[yolo]"`.

Networks are built from ultralytics' own descriptions, without a download. Its training code and its usage reporting are
not used. Jocher, Qiu, "Ultralytics YOLO11", 2024, https://github.com/ultralytics/ultralytics.
"""

import logging
import os
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import cv2
import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, roi_align

from flawmask.errors import FlawmaskError
from flawmask.model import compute
from flawmask.model.architecture import STRIDE
from flawmask.model.compute import Layers
from flawmask.model.layers import CELLS, replace_norms, to_pixels
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target, crops
from flawmask.model.yolo_graph import Graph

log = logging.getLogger(__name__)

GREY = 114 / 255
"""The colour of padding, as in ultralytics."""

MASK_RATIO = 4
"""Pixels of the image per cell of the masks, along each side."""

LOSS_WEIGHTS = {"box": 7.5, "cls": 0.5, "dfl": 1.5}
"""Ultralytics' defaults."""

NMS_IOU = 0.7
"""If two boxes of a class have a larger IoU, the one with the lower score is suppressed. It is ultralytics' default."""


REPLACED = ((PIL.Image, "open"), (torch, "save"), (cv2, "imread"), (cv2, "imwrite"), (cv2, "imshow"))
"""Functions that importing ultralytics replaces for the whole process. Its `PIL.Image.open` tries to install a package
if a file is not an image."""


@cache
def _tasks() -> Any:
    """Return ultralytics' module of networks. Its usage reports, automatic installs and online checks are switched off.

    What it replaces in other packages is put back.

    Raises:
        FlawmaskError: ultralytics is not installed.
    """
    for name, value in {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}.items():
        os.environ.setdefault(name, value)
    threads = cv2.getNumThreads()
    originals = [getattr(module, name) for module, name in REPLACED]
    try:
        from ultralytics.nn import tasks
    except ImportError:
        raise FlawmaskError(
            'YOLO needs ultralytics, which is not installed: pip install "flawmask[yolo]" (it is licensed under '
            "AGPL-3.0, which asks for the source of what it becomes a part of)"
        ) from None
    log.warning("YOLO is ultralytics', licensed under AGPL-3.0: mind its terms before you ship it")
    cv2.setNumThreads(threads)  # importing ultralytics switches OpenCV's threads off for the whole process
    for (module, name), original in zip(REPLACED, originals, strict=True):
        setattr(module, name, original)
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    return tasks


def build(spec: ModelSpec) -> Any:
    """Return the network that the spec describes, with random weights.

    Raises:
        FlawmaskError: ultralytics is not installed.
    """
    tasks = _tasks()
    kind = tasks.SegmentationModel if spec.has_masks else tasks.DetectionModel
    model = kind(f"{spec.arch}.yaml", ch=3, nc=len(spec.classes), verbose=False)
    model.args = SimpleNamespace(**LOSS_WEIGHTS, overlap_mask=True, mask_ratio=MASK_RATIO)
    model.flawmask = spec
    replace_norms(model, spec.norm, spec.norm_eps)
    return model


def losses(model: Any, images: list[Tensor], targets: list[Target], _: int | None) -> dict[str, Tensor]:
    """Return the losses by ultralytics' names, each a scalar float32. See `counts` for their divisors.

    Args:
        model: in training mode.
        images: (3, H, W) uint8, resized for the network, on its device.
        targets: one for each image.
    """
    batch = _padded([image.float() / 255 for image in images])
    height, width = batch.shape[-2:]
    size = batch.new_tensor([width, height, width, height])
    boxes = [target["boxes"] / size for target in targets]
    sums, detached = _criterion(model)(
        model(batch),
        {
            "img": batch,
            "batch_idx": torch.cat([batch.new_full((len(one),), at) for at, one in enumerate(boxes)]),
            "cls": torch.cat([target["labels"] for target in targets])[:, None] - 1.0,
            "bboxes": torch.cat(
                [torch.cat(((one[:, :2] + one[:, 2:]) / 2, one[:, 2:] - one[:, :2]), 1) for one in boxes]
            ),
            "masks": torch.stack([_numbered(target, height, width) for target in targets]).to(batch.device),
        },
    )
    # The first result holds the losses times the number of images, in the order of the second's keys. One of them
    # belongs to networks of a later kind, and is left out.
    by_name = dict(zip(detached, sums, strict=True))
    return {name: by_name[name].float() / len(images) for name in model.flawmask.architecture.loss_names}


def counts(model: Any, _: list[Target]) -> dict[str, float]:
    """Return the divisor of each loss in the last pass.

    For the loss of the masks, it is the number of places that ultralytics assigned to an instance. For the others, it
    is the sum of these places' alignment scores.
    """
    places, scores = model.criterion.assigner.counts
    return {name: float(places if name == "seg_loss" else scores) for name in model.flawmask.architecture.loss_names}


def _criterion(model: Any) -> Any:
    """Return the module that computes the losses, with a hook that stores their divisors."""
    if getattr(model, "criterion", None) is None:
        model.criterion = model.init_criterion()
        model.criterion.assigner.register_forward_hook(_store_counts)
    return model.criterion


def _store_counts(assigner: Any, _: Any, assigned: tuple[Tensor, ...]) -> None:
    _, _, scores, is_assigned, _ = assigned
    assigner.counts = is_assigned.sum(), scores.sum()


def network_input(_: Any, images: Sequence[Tensor]) -> Tensor:
    """Return the batch that the network sees, (B, 3, H, W), 0 to 1, padding included."""
    return _padded([image.float() / 255 for image in images])


def _padded(images: Sequence[Tensor]) -> Tensor:
    """Return (3, H, W) images as one batch, padded at the right and below."""
    sides = [max(image.shape[axis] for image in images) for axis in (-2, -1)]
    height, width = (-(-side // STRIDE) * STRIDE for side in sides)
    padded = [F.pad(one, (0, width - one.shape[-1], 0, height - one.shape[-2]), value=GREY) for one in images]
    return torch.stack(padded).contiguous(memory_format=torch.channels_last)


def _numbered(target: Target, height: int, width: int) -> Tensor:
    """Return the instance of each cell, counted from 1: (H / 4, W / 4), 0 for none. Where instances overlap, the
    smaller one counts."""
    cells = torch.zeros(height // MASK_RATIO, width // MASK_RATIO)
    masks = []
    for crop, (left, top, *_) in zip(crops(target), target["windows"].tolist(), strict=True):
        whole = torch.zeros(height, width)
        whole[top : top + crop.shape[0], left : left + crop.shape[1]] = crop.cpu().float()
        coverage = F.avg_pool2d(whole[None], MASK_RATIO)[0]
        masks.append(coverage >= 0.5 if (coverage >= 0.5).any() else coverage > 0)
    for number in sorted(range(len(masks)), key=lambda one: -int(masks[one].sum())):
        cells[masks[number]] = number + 1
    return cells


def train_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Prepare the layers for training in `dtype`. The last layers, boxes and losses stay float32."""
    compute.train_in(model, _layers(model), device, dtype)


def infer_in(model: Any, _: torch.device, dtype: torch.dtype) -> None:
    """Convert the layers to `dtype` for inference. The last layers and boxes stay float32.

    The network cannot be trained any more.
    """
    compute.infer_in(model, _layers(model), dtype)


def _layers(model: Any) -> Layers:
    """Return the layers that may compute in lower precision: all except those that output boxes, scores, coefficients
    and prototypes. The head's inputs are float32, because it computes its grid in their dtype."""
    *body, head = model.model
    inner = [layer for at, layer in enumerate(body) if at not in head.f]
    outer = [body[at] for at in head.f]
    for tower in (*head.cv2, *head.cv3, *getattr(head, "cv4", ())):
        inner += tower[:-2]
        outer.append(tower[-2])
    if hasattr(head, "proto"):
        inner += [head.proto.cv1, head.proto.upsample]
        outer.append(head.proto.cv2)
    return Layers(inner, outer)


def infer(model: Any, images: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Return the instances predicted on each image.

    They are `boxes` (N, 4) float32, x1 y1 x2 y2 in pixels of the original; `labels` (N,) int64; `scores` (N,) float32,
    0 to 1; and, if the network has masks, `masks` (N, 1, 28, 28) float32, probabilities inside the box.

    Args:
        model: in evaluation mode.
        images: (3, H, W) uint8, resized for the network; they are padded to one size here.
        sizes: height and width of each original.
    """
    spec: ModelSpec = model.flawmask
    outputs, _ = model(network_input(model, images))
    outputs, prototypes = outputs if spec.has_masks else (outputs, [None] * len(images))
    floor = getattr(model, "score_thresh", 0.0)
    ratios = to_pixels([(image.shape[1], image.shape[2]) for image in images], sizes).to(outputs.device)
    each = zip(outputs, prototypes, ratios, sizes, strict=True)
    return [_instances(one, proto, spec, floor, ratio, size) for one, proto, ratio, size in each]


def _instances(
    outputs: Tensor, prototypes: Tensor | None, spec: ModelSpec, floor: float, ratio: Tensor, size: tuple[int, int]
) -> dict[str, Tensor]:
    """Return the instances of an image.

    Args:
        outputs: (4 + classes + coefficients, A): centre and size of each box in pixels of the resized image, scores
            and mask coefficients.
        prototypes: (coefficients, H / 4, W / 4); the mask of an instance is a weighted sum of them. None without masks.
        spec: of the network.
        floor: boxes whose score is at most this are dropped.
        ratio: (4,) pixels of the image per pixel of the resized image.
        size: height and width of the image.
    """
    ends = (2, 4, 4 + len(spec.classes))
    centres, sides, scores, coefficients = torch.tensor_split(outputs.T, ends, dim=1)
    boxes = torch.cat((centres - sides / 2, centres + sides / 2), dim=1)
    score, label = scores.max(dim=1)
    above = torch.where(score > floor)[0]
    kept = above[batched_nms(boxes[above], score[above], label[above], NMS_IOU)][: spec.max_detections]
    # Clip the boxes to the image, both those that are returned and those that masks are cropped to.
    height, width = size
    scaled = boxes[kept] * ratio
    scaled = torch.minimum(scaled.clamp(min=0), scaled.new_tensor([width, height, width, height]))
    boxes = scaled / ratio
    instances = {"labels": label[kept] + 1, "scores": score[kept]}
    if prototypes is not None:
        masks = (coefficients[kept] @ prototypes.flatten(1)).view(-1, 1, *prototypes.shape[1:])
        places = torch.cat((torch.arange(len(kept), device=boxes.device)[:, None], boxes), dim=1)
        instances["masks"] = roi_align(masks, places, CELLS, 1 / MASK_RATIO, aligned=True).sigmoid()
    return instances | {"boxes": scaled}


def graph(model: Any, spec: ModelSpec) -> Graph:
    """Return the network as it is exported, see `build.Detector.graph`."""
    return Graph(model, spec, GREY, NMS_IOU)


def stages(model: Any) -> list[list[nn.Module]]:
    """Return the stages of the backbone, which is the first eleven layers, the stage nearest to the image first. Each
    stage begins with a layer that halves the resolution."""
    blocks = list(model.model)[:11]
    starts = [at for at, block in enumerate(blocks) if type(block).__name__ == "Conv"]
    return [blocks[start:end] for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True)]
