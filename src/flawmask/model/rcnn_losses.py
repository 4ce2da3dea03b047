"""The losses of Mask R-CNN in full view, with no more regions and masks than the image has use for.

He et al., "Mask R-CNN", ICCV 2017, as torchvision computes it, with three differences. How many regions and masks of an
image the heads learn on follows how many instances it has; torchvision takes 512, and up to 128 masks, of every image.
Each loss is a mean over one image, and then over the images: torchvision takes one mean over all regions of a batch, in
which a crowded image weighs more, and an image more or less for what passes beside it. And the masks' targets are
looked up inside the instances' boxes, not in masks as large as the image.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers

from flawmask.model.draws import generator_for
from flawmask.model.layers import batched
from flawmask.model.rcnn_archs import LOSSES
from flawmask.model.targets import Target, crops

SAMPLES_PER_INSTANCE, MIN_SAMPLES, MAX_SAMPLES = 32, 32, 512
"""Regions of an image that the heads learn on, where their number is not given; a quarter of them on an instance."""


MASKS_PER_INSTANCE = 4
"""Masks of an image that are learned, where the regions' number is not given: further ones of the same instance, in
boxes that differ little, cost the mask head's time and say the same."""


def samples_for(instances: int) -> int:
    """Return on how many regions of an image with so many instances the heads learn."""
    return min(max(SAMPLES_PER_INSTANCE * instances, MIN_SAMPLES), MAX_SAMPLES)


def losses(model: Any, images: list[Tensor], targets: list[Target], roi_samples: int | None) -> dict[str, Tensor]:
    """Return the five losses by torchvision's names, each a scalar float32: a mean over the images; that of the masks
    over the images with an instance.

    Args:
        model: in training mode.
        images: (3, H, W) uint8, at the size at which the network sees them, on its device.
        targets: one each.
        roi_samples: regions per image on which the heads learn; None follows the number of instances.
    """
    batch = batched(model, images)
    draws = [generator_for(target, batch.tensors.device) for target in targets]
    features = model.backbone(batch.tensors)
    proposals, proposal_losses = _propose(model.rpn, batch, features, targets, draws)
    heads = _head_losses(model.roi_heads, features, proposals, batch, targets, roi_samples, draws)
    return heads | proposal_losses


def counts(_: Any, targets: list[Target]) -> dict[str, float]:
    """Return over how many images each loss is a mean."""
    with_instance = sum(len(target["boxes"]) > 0 for target in targets)
    return {name: float(with_instance if name == "loss_mask" else len(targets)) for name in LOSSES}


def _propose(
    rpn: Any, batch: ImageList, features: dict[str, Tensor], targets: list[Target], draws: list[torch.Generator]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the region proposals of each image, (K, 4), and the losses, by the steps of
    `RegionProposalNetwork.forward`."""
    levels = list(features.values())
    per_level = rpn.head(levels)
    anchors = rpn.anchor_generator(batch, levels)
    sizes = [scores[0].numel() for scores in per_level[0]]
    objectness, moves = concat_box_prediction_layers(*per_level)
    boxes = rpn.box_coder.decode(moves.detach(), anchors).view(len(anchors), -1, 4)
    proposals, _ = rpn.filter_proposals(boxes, objectness, batch.image_sizes, sizes)
    labels, truth = rpn.assign_targets_to_anchors(anchors, targets)
    wanted = rpn.box_coder.encode(truth, anchors)
    logits = objectness.view(len(anchors), -1)
    moves = moves.view(len(anchors), -1, 4)
    sampler = rpn.fg_bg_sampler
    certain, box = [], []
    for at, draw in enumerate(draws):
        on, beside = _draw(labels[at], sampler.batch_size_per_image, sampler.positive_fraction, draw)
        drawn = torch.cat((on, beside))
        count = max(1, len(drawn))
        wrong = F.binary_cross_entropy_with_logits(logits[at, drawn], labels[at][drawn], reduction="sum")
        off = F.smooth_l1_loss(moves[at, on], wanted[at][on], beta=1 / 9, reduction="sum")
        certain.append(wrong / count)
        box.append(off / count)
    return proposals, {"loss_objectness": torch.stack(certain).mean(), "loss_rpn_box_reg": torch.stack(box).mean()}


def _head_losses(
    heads: Any,
    features: dict[str, Tensor],
    proposals: list[Tensor],
    batch: ImageList,
    targets: list[Target],
    roi_samples: int | None,
    draws: list[torch.Generator],
) -> dict[str, Tensor]:
    chosen, matched, labels, corrections = _sample(heads, proposals, targets, roi_samples, draws)
    pooled = heads.box_roi_pool(features, chosen, batch.image_sizes)
    class_logits, box_regression = heads.box_predictor(heads.box_head(pooled))
    counts = [len(of_image) for of_image in labels]
    of_images = zip(class_logits.split(counts), box_regression.split(counts), labels, corrections, strict=True)
    none = (class_logits.sum() * 0, box_regression.sum() * 0)  # of an image without a single region
    each = [
        fastrcnn_loss(logits, moves, [label], [wanted]) if len(label) else none
        for logits, moves, label, wanted in of_images
    ]
    classifier, box = (torch.stack(of_images).mean() for of_images in zip(*each, strict=True))
    if not heads.has_mask():
        return {"loss_classifier": classifier, "loss_box_reg": box}

    on_instance = [torch.where(of_image > 0)[0] for of_image in labels]
    if roi_samples is None:
        on_instance = [
            _random_subset(of_image, MASKS_PER_INSTANCE * len(target["boxes"]), draw)
            for of_image, target, draw in zip(on_instance, targets, draws, strict=True)
        ]
    mask_boxes = [boxes[at] for boxes, at in zip(chosen, on_instance, strict=True)]
    pooled = heads.mask_roi_pool(features, mask_boxes, batch.image_sizes)
    logits = heads.mask_predictor(heads.mask_head(pooled))
    side = logits.shape[-1]
    counts = [len(of_image) for of_image in on_instance]
    losses = []
    for of_image, target, boxes, instances, label, at in zip(
        logits.split(counts), targets, mask_boxes, matched, labels, on_instance, strict=True
    ):
        if len(at):
            of_class = of_image[torch.arange(len(at), device=at.device), label[at]]
            wanted = mask_targets(target, boxes, instances[at], side)
            losses.append(F.binary_cross_entropy_with_logits(of_class, wanted))
    # Of no mask at all, 0 times what there is, so that every parameter has a gradient.
    mask = torch.stack(losses).mean() if losses else logits.sum() * 0
    return {"loss_classifier": classifier, "loss_box_reg": box, "loss_mask": mask}


def _sample(
    heads: Any,
    proposals: list[Tensor],
    targets: list[Target],
    roi_samples: int | None,
    draws: list[torch.Generator],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return for each image the regions drawn, the instance that each lies on, its label (0: none) and the box
    corrections to be learned, (K, 4). At most a quarter of them lie on an instance; the true boxes take part."""
    truth = [target["boxes"] for target in targets]
    proposals = heads.add_gt_proposals(proposals, truth)
    matched, labels = heads.assign_targets_to_proposals(proposals, truth, [target["labels"] for target in targets])
    regions, instances, classes, boxes = [], [], [], []
    for at, (of_image, draw) in enumerate(zip(truth, draws, strict=True)):
        count = roi_samples or samples_for(len(of_image))
        drawn = torch.cat(_draw(labels[at], count, heads.fg_bg_sampler.positive_fraction, draw)).sort().values
        regions.append(proposals[at][drawn])
        instances.append(matched[at][drawn])
        classes.append(labels[at][drawn])
        boxes.append((of_image if len(of_image) else of_image.new_zeros(1, 4))[instances[at]])
    return regions, instances, classes, heads.box_coder.encode(boxes, regions)


def _draw(labels: Tensor, count: int, share: float, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the places of boxes drawn at random, (P,) and (N,) int64: those on an instance, no more than `share` of
    `count`, and those beside, which fill up to `count` where there are enough.

    Args:
        labels: (A,), at least 1 on an instance, 0 beside, less for what is not drawn.
        count: how many are wanted.
        share: the largest share of those on an instance.
        draw: decides it.
    """
    on = _random_subset(torch.where(labels >= 1)[0], int(count * share), draw)
    return on, _random_subset(torch.where(labels == 0)[0], count - len(on), draw)


def _random_subset(places: Tensor, most: int, draw: torch.Generator) -> Tensor:
    """Return the places, or so many of them drawn at random where there are more."""
    if len(places) <= most:
        return places
    return places[torch.randperm(len(places), generator=draw, device=places.device)[:most]]


def mask_targets(target: Target, boxes: Tensor, instances: Tensor, side: int) -> Tensor:
    """Return what the mask head should give for each box: (K, side, side) float32, 0 to 1.

    The same as RoIAlign of the instance's whole mask (torchvision's `project_masks_on_boxes`), of which each bin is a
    mean over a grid of bilinear samples. A mean over a grid is a product of means along its axes, so two small matrix
    products per instance give all its boxes at once.

    Args:
        target: the image's.
        boxes: (K, 4) x1 y1 x2 y2 in pixels of the resized image.
        instances: (K,) int64, which instance each box lies on.
        side: rows and columns of the result.
    """
    result = boxes.new_zeros(len(boxes), side, side)
    for number, (crop, (left, top, *_)) in enumerate(zip(crops(target), target["windows"].tolist(), strict=True)):
        at = torch.where(instances == number)[0]
        rows = _means(boxes[at, 1] - top, boxes[at, 3] - top, side, crop.shape[0])
        columns = _means(boxes[at, 0] - left, boxes[at, 2] - left, side, crop.shape[1])
        result[at] = rows @ crop.float() @ columns.transpose(1, 2)
    return result


def _means(start: Tensor, end: Tensor, bins: int, cells: int) -> Tensor:
    """Return the weight of each of an axis' cells in each bin of each box: (K, bins, cells).

    A bin holds as many samples as it is cells long, rounded up, as in RoIAlign without a fixed sampling ratio. Samples
    between the first or last cell and one cell beyond take that cell; further ones count as 0.
    """
    length = (end - start).clamp(min=1.0) / bins
    counts = length.ceil().clamp(min=1)
    most = int(counts.max()) if len(counts) else 1
    number = torch.arange(most, device=start.device)
    step = torch.arange(bins, device=start.device)[:, None] + (number + 0.5) / counts[:, None, None]
    at = start[:, None, None] + step * length[:, None, None]
    weight = (number < counts[:, None, None]) & (at >= -1.0) & (at <= cells)
    at = at.clamp(0, cells - 1)
    low = at.long()
    share = at - low
    weight = weight / counts[:, None, None]
    means = start.new_zeros(len(start), bins, cells)
    means.scatter_add_(2, low, weight * (1 - share))
    return means.scatter_add_(2, (low + 1).clamp(max=cells - 1), weight * share)
