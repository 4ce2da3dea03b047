"""RF-DETR with masks, through the package rfdetr (Apache-2.0). It is an extra: `pip install "flawmask[rfdetr]"`.

Only its networks and its losses are used, without a download. Its training code and its data code are not used, nor are
its larger models, which have another licence. Robinson et al., "RF-DETR: Real-time detection transformer", ICLR 2026,
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
from flawmask.model.draws import seeded_for
from flawmask.model.layers import CELLS, IMAGENET_DEVIATION, IMAGENET_MEAN
from flawmask.model.rfdetr_graph import Graph
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target, crops


@cache
def _rfdetr() -> tuple[Any, Any]:
    """Return the modules of rfdetr's configurations and networks.

    Raises:
        FlawmaskError: rfdetr is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # rfdetr uses deprecated compiler calls
            from rfdetr import config
            from rfdetr.models import lwdetr
    except ImportError as error:
        raise FlawmaskError(f'RF-DETR needs rfdetr ({error}): pip install "flawmask[rfdetr]"') from None
    # rfdetr logs through its own handlers, and warns about each network without DINOv2's weights.
    logging.getLogger("rf-detr").setLevel(logging.ERROR)
    return config, lwdetr


def build(spec: ModelSpec) -> Any:
    """Return the network that the spec describes, with random weights. It has no BatchNorm.

    Raises:
        FlawmaskError: rfdetr is not installed.
    """
    config, lwdetr = _rfdetr()
    # The folders are neither read nor written, and the weights that the configuration names are not loaded.
    network = getattr(config, spec.architecture.network)(num_classes=len(spec.classes), device="cpu")
    training = config.SegmentationTrainConfig(dataset_dir=".", output_dir=".")
    model = lwdetr.build_model_from_config(network, training)
    model.criterion, _ = lwdetr.build_criterion_from_config(network, training)
    model.flawmask = spec
    return model


def losses(model: Any, images: list[Tensor], targets: list[Target], _: int | None) -> dict[str, Tensor]:
    """Return the losses by rfdetr's names, each a scalar float32.

    Each is a sum over all layers of the decoder, with rfdetr's weights, divided by the number of instances.

    Args:
        model: in training mode.
        images: (3, H, W) uint8, resized for the network, on its device.
        targets: one for each image.
    """
    batch = network_input(model, images)
    rfdetr_targets = [_rfdetr_target(target, *batch.shape[-2:]) for target in targets]
    # By default, rfdetr sums the number of instances over the processes. And with its 13 groups of queries, a batch
    # without instances would weigh more than one with a single instance. So the number is passed explicitly.
    instances = max(1, sum(len(target["labels"]) for target in targets))
    outputs = model(_normalised(batch))
    of_images = []
    for at, target in enumerate(targets):
        with seeded_for(target, batch.device):  # rfdetr samples the points at which masks are compared
            of_image = model.criterion(
                _of_image(outputs, at), rfdetr_targets[at : at + 1], float(instances * model.group_detr)
            )
        of_images.append(of_image)
    weights: dict[str, float] = model.criterion.weight_dict
    return {
        name: torch.stack(
            [weight * one[key] for one in of_images for key, weight in weights.items() if key.startswith(name)]
        ).sum()
        for name in model.flawmask.architecture.loss_names
    }


def _of_image(outputs: Any, at: int) -> Any:
    """Return the network's outputs for one image of a batch, in the form of a batch of one image."""
    if isinstance(outputs, Tensor):
        return outputs[at : at + 1]
    if isinstance(outputs, list):
        return [_of_image(one, at) for one in outputs]
    return {name: one if name == "bias" else _of_image(one, at) for name, one in outputs.items()}


def counts(model: Any, targets: list[Target]) -> dict[str, float]:
    """Return the number of instances, by which each loss is divided."""
    return dict.fromkeys(
        model.flawmask.architecture.loss_names, float(sum(len(target["labels"]) for target in targets))
    )


def network_input(_: Any, images: Sequence[Tensor]) -> Tensor:
    """Return the batch that the network sees, (B, 3, H, W), 0 to 1: squares of one size, without padding."""
    return torch.stack([image.float() / 255 for image in images])


def _normalised(batch: Tensor) -> Tensor:
    mean, deviation = (batch.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return (batch - mean) / deviation


def _rfdetr_target(target: Target, height: int, width: int) -> Target:
    """Return a target in rfdetr's form: labels from 0, boxes as centre and size relative to the image, masks of the
    whole image."""
    boxes = target["boxes"]
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    for mask, crop, (left, top, *_) in zip(masks, crops(target), target["windows"].tolist(), strict=True):
        mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    relative = boxes / boxes.new_tensor([width, height, width, height])
    return {"labels": target["labels"] - 1, "boxes": box_convert(relative, "xyxy", "cxcywh"), "masks": masks}


def train_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Prepare the layers to compute in `dtype`. The last layers, boxes and their inputs, and losses stay float32."""
    body, head = model.backbone[0], model.segmentation_head
    outer = [body.encoder, body.projector, *model.transformer.decoder.layers, *head.blocks, head.query_features_block]
    compute.compute_in(Layers([], outer), device, dtype)


infer_in = train_in


def infer(model: Any, images: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Return the instances predicted on each image.

    They are `boxes` (N, 4) float32, x1 y1 x2 y2 in pixels of the original; `labels` (N,) int64; `scores` (N,) float32,
    0 to 1; and `masks` (N, 1, 28, 28) float32, probabilities inside the box.

    Args:
        model: in evaluation mode.
        images: (3, S, S) uint8, resized for the network.
        sizes: height and width of each original.
    """
    spec: ModelSpec = model.flawmask
    outputs = model(_normalised(network_input(model, images)))
    floor = getattr(model, "score_thresh", 0.0)
    each = zip(outputs["pred_logits"], outputs["pred_boxes"], outputs["pred_masks"], sizes, strict=True)
    return [_instances(logits, boxes, masks, spec, floor, size) for logits, boxes, masks, size in each]


def _instances(
    logits: Tensor, boxes: Tensor, masks: Tensor, spec: ModelSpec, floor: float, size: tuple[int, ...]
) -> dict[str, Tensor]:
    """Return the instances of an image.

    Args:
        logits: (queries, classes + 1); the last class means no object.
        boxes: (queries, 4): centre and size, relative to the image.
        masks: (queries, rows, columns) logits over the whole image.
        spec: of the network.
        floor: instances whose score is at most this are dropped.
        size: height and width of the image.
    """
    classes = len(spec.classes)
    scores = logits[:, :classes].sigmoid().flatten()
    # A score of NaN counts as the lowest. `topk` would take it for the highest.
    scores, places = scores.nan_to_num(nan=-1.0).topk(min(spec.max_detections, len(scores)))
    is_above = scores > floor
    scores, places = scores[is_above], places[is_above]
    query = places // classes
    relative = box_convert(boxes[query], "cxcywh", "xyxy").clamp(0, 1)
    cells, pixels = (relative * relative.new_tensor([wide, high] * 2) for high, wide in (masks.shape[-2:], size))
    inside = roi_align(masks[:, None], torch.cat((query[:, None], cells), dim=1), CELLS, aligned=True).sigmoid()
    return {"boxes": pixels, "labels": places % classes + 1, "scores": scores, "masks": inside}


def graph(model: Any, spec: ModelSpec) -> Graph:
    """Return the network as it is exported, see `build.Detector.graph`."""
    return Graph(model, spec)


def stages(model: Any) -> list[list[nn.Module]]:
    """Return five stages: the patch embedding, and the encoder's layers in four groups, the one nearest to the image
    first. Each group ends with a layer that the heads use."""
    encoder = model.backbone[0].encoder.encoder
    layers = list(encoder.encoder.layer)
    size = len(layers) // 4
    groups = [layers[start : start + size] for start in range(0, len(layers), size)]
    return [[encoder.embeddings], *groups[:3], [*groups[3], encoder.layernorm]]
