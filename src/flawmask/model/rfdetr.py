"""RF-DETR with outlines, through rfdetr: an extra, `pip install "flawmask[rfdetr]"`, under Apache-2.0.

Its networks and its losses alone take part, without a download; its training, its data and its larger models, which
have another licence, do not. Robinson et al., "RF-DETR: Real-time detection transformer", ICLR 2026,
https://arxiv.org/abs/2511.09554.
"""

import logging
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, roi_align

from flawmask.errors import FlawmaskError
from flawmask.model import compute
from flawmask.model.compute import Layers
from flawmask.model.draws import drawing_for
from flawmask.model.layers import CELLS, IMAGENET_DEVIATION, IMAGENET_MEAN
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target, crops


@cache
def _rfdetr() -> tuple[Any, Any]:
    """Return rfdetr's configurations and its networks.

    Raises:
        FlawmaskError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it compiles functions as torch wants it no more
            from rfdetr import config
            from rfdetr.models import lwdetr
    except ImportError as error:
        raise FlawmaskError(f'RF-DETR needs rfdetr ({error}): pip install "flawmask[rfdetr]"') from None
    # It has handlers of its own, and warns of each network that it does not start from DINOv2's weights.
    logging.getLogger("rf-detr").setLevel(logging.ERROR)
    return config, lwdetr


def build(spec: ModelSpec) -> Any:
    """Return the network that the spec describes, its weights drawn at random. There is no BatchNorm in it.

    Raises:
        FlawmaskError: rfdetr is not installed.
    """
    config, lwdetr = _rfdetr()
    # Nothing is read from or written to the folders, nor is the file of weights that the configuration names.
    network = getattr(config, spec.architecture.network)(num_classes=len(spec.classes), device="cpu")
    training = config.SegmentationTrainConfig(dataset_dir=".", output_dir=".")
    model = lwdetr.build_model_from_config(network, training)
    model.criterion, _ = lwdetr.build_criterion_from_config(network, training)
    model.flawmask = spec
    return model


def losses(model: Any, images: list[Tensor], targets: list[Target], _: int | None) -> dict[str, Tensor]:
    """Return the losses by rfdetr's names, each a scalar float32: over all layers of the decoder, weighed as rfdetr
    does it, and divided by the instances.

    Args:
        model: in training mode.
        images: (3, H, W) uint8, at the size at which the network sees them, on its device.
        targets: one each.
    """
    batch = network_input(model, images)
    wanted = [_wanted(target, *batch.shape[-2:]) for target in targets]
    # Left to itself, it would ask other processes how many there are, and weigh a batch without any by its 13 groups
    # of queries more than one with a single instance.
    instances = max(1, sum(len(target["labels"]) for target in targets))
    found = model(_normalised(batch))
    of_images = []
    for at, target in enumerate(targets):
        with drawing_for(target, batch.device):  # the points at which masks are compared
            of_image = model.criterion(_of_image(found, at), wanted[at : at + 1], float(instances * model.group_detr))
        of_images.append(of_image)
    weights: dict[str, float] = model.criterion.weight_dict
    return {
        name: torch.stack(
            [weight * one[key] for one in of_images for key, weight in weights.items() if key.startswith(name)]
        ).sum()
        for name in model.flawmask.architecture.loss_names
    }


def _of_image(found: Any, at: int) -> Any:
    """Return what the network says of one image of a batch, as it would of that alone."""
    if isinstance(found, Tensor):
        return found[at : at + 1]
    if isinstance(found, list):
        return [_of_image(one, at) for one in found]
    return {name: one if name == "bias" else _of_image(one, at) for name, one in found.items()}


def counts(model: Any, targets: list[Target]) -> dict[str, float]:
    """Return how many instances each loss is divided by."""
    return dict.fromkeys(
        model.flawmask.architecture.loss_names, float(sum(len(target["labels"]) for target in targets))
    )


def network_input(_: Any, images: Sequence[Tensor]) -> Tensor:
    """Return a batch as the network sees it, (B, 3, H, W), 0 to 1: squares of one size, without padding."""
    return torch.stack([image.float() / 255 for image in images])


def _normalised(batch: Tensor) -> Tensor:
    mean, deviation = (batch.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return (batch - mean) / deviation


def _wanted(target: Target, height: int, width: int) -> Target:
    """Return a target as rfdetr wants it: labels from 0, boxes by centre and size as shares of the image, masks of the
    whole image."""
    boxes = target["boxes"]
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    for mask, crop, (left, top, *_) in zip(masks, crops(target), target["windows"].tolist(), strict=True):
        mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    shares = boxes / boxes.new_tensor([width, height, width, height])
    return {"labels": target["labels"] - 1, "boxes": box_convert(shares, "xyxy", "cxcywh"), "masks": masks}


def train_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Let the network's layers compute in `dtype`; the last ones, boxes, what they are worked out from, and losses stay
    float32."""
    body, head = model.backbone[0], model.segmentation_head
    outer = [body.encoder, body.projector, *model.transformer.decoder.layers, *head.blocks, head.query_features_block]
    compute.compute_in(Layers([], outer), device, dtype)


infer_in = train_in


def infer(model: Any, images: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Return what is found on each image: `boxes` (N, 4) float32, x1 y1 x2 y2 in pixels of the original, `labels` (N,)
    int64, `scores` (N,) float32, 0 to 1, and `masks` (N, 1, 28, 28) float32 probabilities inside the box.

    Args:
        model: in evaluation mode.
        images: (3, S, S) uint8, at the size at which the network sees them.
        sizes: height and width of each original.
    """
    spec: ModelSpec = model.flawmask
    found = model(_normalised(network_input(model, images)))
    floor = getattr(model, "score_thresh", 0.0)
    each = zip(found["pred_logits"], found["pred_boxes"], found["pred_masks"], sizes, strict=True)
    return [_instances(logits, boxes, masks, spec, floor, size) for logits, boxes, masks, size in each]


def _instances(
    logits: Tensor, boxes: Tensor, masks: Tensor, spec: ModelSpec, floor: float, size: tuple[int, ...]
) -> dict[str, Tensor]:
    """Return the instances of an image.

    Args:
        logits: (queries, classes + 1), of which the last one stands for nothing.
        boxes: (queries, 4): centre and size, as shares of the image.
        masks: (queries, rows, columns) logits over the whole image.
        spec: the network's.
        floor: detections that score no more are dropped.
        size: the image's height and width.
    """
    classes = len(spec.classes)
    scores = logits[:, :classes].sigmoid().flatten()
    # A score that is no number is the lowest, where PyTorch would take it for the highest.
    scores, places = scores.nan_to_num(nan=-1.0).topk(min(spec.max_detections, len(scores)))
    is_above = scores > floor
    scores, places = scores[is_above], places[is_above]
    query = places // classes
    shares = box_convert(boxes[query], "cxcywh", "xyxy").clamp(0, 1)
    cells, pixels = (shares * shares.new_tensor([wide, high] * 2) for high, wide in (masks.shape[-2:], size))
    inside = roi_align(masks[:, None], torch.cat((query[:, None], cells), dim=1), CELLS, aligned=True).sigmoid()
    return {"boxes": pixels, "labels": places % classes + 1, "scores": scores, "masks": inside}


def stages(model: Any) -> list[list[nn.Module]]:
    """Return the cut into patches, and the encoder's layers in four groups, each up to one that the heads look at; the
    one nearest to the image first."""
    encoder = model.backbone[0].encoder.encoder
    layers = list(encoder.encoder.layer)
    size = len(layers) // 4
    groups = [layers[start : start + size] for start in range(0, len(layers), size)]
    return [[encoder.embeddings], *groups[:3], [*groups[3], encoder.layernorm]]
