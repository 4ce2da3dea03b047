"""YOLO11 for boxes and for outlines, through ultralytics: an extra, `pip install "flawmask[yolo]"`, under AGPL-3.0.

Networks are built from ultralytics' own descriptions, without a download; its training and its usage reporting take no
part. Jocher, Qiu, "Ultralytics YOLO11", 2024, https://github.com/ultralytics/ultralytics.
"""

import logging
import os
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import cv2
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

log = logging.getLogger(__name__)

GREY = 114 / 255
"""What images are padded with, as ultralytics does it."""

MASK_RATIO = 4
"""Pixels of the image per cell of the masks, along each side."""

WEIGHTS_OF_LOSSES = {"box": 7.5, "cls": 0.5, "dfl": 1.5}
"""Ultralytics' defaults."""

NMS_IOU = 0.7
"""Of two boxes of a class that overlap by more, the less certain one goes; ultralytics' default."""


@cache
def _tasks() -> Any:
    """Return ultralytics' networks; it may report nothing, install nothing and ask nobody whether it is online.

    Raises:
        FlawmaskError: it is not installed.
    """
    for name, value in {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}.items():
        os.environ.setdefault(name, value)
    try:
        threads = cv2.getNumThreads()
        from ultralytics.nn import tasks
    except ImportError:
        raise FlawmaskError(
            'YOLO needs ultralytics, which is not installed: pip install "flawmask[yolo]" (it is licensed under '
            "AGPL-3.0, which asks for the source of what it becomes a part of)"
        ) from None
    log.warning("YOLO is ultralytics', licensed under AGPL-3.0: mind its terms before you ship it")
    cv2.setNumThreads(threads)  # which ultralytics sets to none, for all
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    return tasks


def build(spec: ModelSpec) -> Any:
    """Return the network that the spec describes, its weights drawn at random.

    Raises:
        FlawmaskError: ultralytics is not installed.
    """
    tasks = _tasks()
    kind = tasks.SegmentationModel if spec.has_masks else tasks.DetectionModel
    model = kind(f"{spec.arch}.yaml", ch=3, nc=len(spec.classes), verbose=False)
    model.args = SimpleNamespace(**WEIGHTS_OF_LOSSES, overlap_mask=True, mask_ratio=MASK_RATIO)
    model.flawmask = spec
    replace_norms(model, spec.norm, spec.norm_eps)
    return model


def losses(model: Any, images: list[Tensor], targets: list[Target], _: int | None) -> dict[str, Tensor]:
    """Return the losses by ultralytics' names, each a scalar float32, over all that is found on the images.

    Args:
        model: in training mode.
        images: (3, H, W) uint8, at the size at which the network sees them, on its device.
        targets: one each.
    """
    batch = _padded([image.float() / 255 for image in images])
    height, width = batch.shape[-2:]
    size = batch.new_tensor([width, height, width, height])
    boxes = [target["boxes"] / size for target in targets]
    found, named = _criterion(model)(
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
    # It returns sums over the images in the order of the second's keys; one of them is for networks of a later kind.
    both = dict(zip(named, found, strict=True))
    return {name: both[name].float() / len(images) for name in model.flawmask.architecture.loss_names}


def counts(model: Any, _: list[Target]) -> dict[str, float]:
    """Return how much each loss of the last pass was divided by: the number of places that ultralytics assigned to an
    instance, or the sum of how well they suit theirs."""
    places, suiting = model.criterion.assigner.counts
    return {name: float(places if name == "seg_loss" else suiting) for name in model.flawmask.architecture.loss_names}


def _criterion(model: Any) -> Any:
    """Return what computes the losses. It remembers what it divides them by."""
    if getattr(model, "criterion", None) is None:
        model.criterion = model.init_criterion()
        model.criterion.assigner.register_forward_hook(_remember)
    return model.criterion


def _remember(assigner: Any, _: Any, assigned: tuple[Tensor, ...]) -> None:
    _, _, suiting, is_assigned, _ = assigned
    assigner.counts = is_assigned.sum(), suiting.sum()


def network_input(_: Any, images: Sequence[Tensor]) -> Tensor:
    """Return a batch as the network sees it, (B, 3, H, W), 0 to 1, padding included."""
    return _padded([image.float() / 255 for image in images])


def _padded(images: Sequence[Tensor]) -> Tensor:
    """Return (3, H, W) images as one batch, padded at the right and below."""
    sides = [max(image.shape[axis] for image in images) for axis in (-2, -1)]
    height, width = (-(-side // STRIDE) * STRIDE for side in sides)
    padded = [F.pad(one, (0, width - one.shape[-1], 0, height - one.shape[-2]), value=GREY) for one in images]
    return torch.stack(padded).contiguous(memory_format=torch.channels_last)


def _numbered(target: Target, height: int, width: int) -> Tensor:
    """Return which instance each cell belongs to: (H / 4, W / 4), 0 for none; the smaller one lies above the larger."""
    cells = torch.zeros(height // MASK_RATIO, width // MASK_RATIO)
    masks = []
    for crop, (left, top, *_) in zip(crops(target), target["windows"].tolist(), strict=True):
        whole = torch.zeros(height, width)
        whole[top : top + crop.shape[0], left : left + crop.shape[1]] = crop.cpu().float()
        share = F.avg_pool2d(whole[None], MASK_RATIO)[0]
        masks.append(share >= 0.5 if (share >= 0.5).any() else share > 0)
    for number in sorted(range(len(masks)), key=lambda one: -int(masks[one].sum())):
        cells[masks[number]] = number + 1
    return cells


def train_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Let the network's layers train in `dtype`; the last ones, boxes and losses stay float32."""
    compute.train_in(model, _layers(model), device, dtype)


def infer_in(model: Any, _: torch.device, dtype: torch.dtype) -> None:
    """Let the network's layers hold `dtype`; the last ones and boxes stay float32. It cannot be trained any more."""
    compute.infer_in(model, _layers(model), dtype)


def _layers(model: Any) -> Layers:
    """Return the layers that compute in lower precision: all but those that give boxes, scores, coefficients and
    prototypes. What the head sees is float32: it lays out its grid in the same type."""
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
    """Return what is found on each image: `boxes` (N, 4) float32, x1 y1 x2 y2 in pixels of the original, `labels` (N,)
    int64, `scores` (N,) float32, 0 to 1, and, where it outlines what it finds, `masks` (N, 1, 28, 28) float32
    probabilities inside the box.

    Args:
        model: in evaluation mode.
        images: (3, H, W) uint8, at the size at which the network sees them, padded to one size by it.
        sizes: height and width of each original.
    """
    spec: ModelSpec = model.flawmask
    found, _ = model(network_input(model, images))
    found, prototypes = found if spec.has_masks else (found, [None] * len(images))
    floor = getattr(model, "score_thresh", 0.0)
    ratios = to_pixels([(image.shape[1], image.shape[2]) for image in images], sizes).to(found.device)
    each = zip(found, prototypes, ratios, sizes, strict=True)
    return [_instances(one, proto, spec, floor, ratio, size) for one, proto, ratio, size in each]


def _instances(
    found: Tensor, prototypes: Tensor | None, spec: ModelSpec, floor: float, ratio: Tensor, size: tuple[int, int]
) -> dict[str, Tensor]:
    """Return the instances of an image.

    Args:
        found: (4 + classes + coefficients, A): centre and size of each box in pixels of the resized image, scores.
        prototypes: (coefficients, H / 4, W / 4), of which each instance's mask is a sum; None without masks.
        spec: the network's.
        floor: boxes that score no more are dropped.
        ratio: (4,) pixels of the image per pixel of the resized one.
        size: the image's height and width.
    """
    ends = (2, 4, 4 + len(spec.classes))
    centres, sides, scores, coefficients = torch.tensor_split(found.T, ends, dim=1)
    boxes = torch.cat((centres - sides / 2, centres + sides / 2), dim=1)
    score, label = scores.max(dim=1)
    above = torch.where(score > floor)[0]
    kept = above[batched_nms(boxes[above], score[above], label[above], NMS_IOU)][: spec.max_detections]
    # What is returned, and what masks are cut out by: the box as far as it lies on the image.
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


def stages(model: Any) -> list[list[nn.Module]]:
    """Return the layers that halve the resolution, each with those up to the next, the one nearest to the image first:
    of the backbone, the first eleven."""
    blocks = list(model.model)[:11]
    starts = [at for at, block in enumerate(blocks) if type(block).__name__ == "Conv"]
    return [blocks[start:end] for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True)]
