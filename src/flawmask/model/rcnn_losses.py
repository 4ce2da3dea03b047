"""The losses of Mask R-CNN, with a number of sampled regions and masks that follows the number of instances.

They follow He et al., "Mask R-CNN", ICCV 2017, as torchvision computes them, with three differences:

- The number of sampled regions and masks of an image depends on its instances. torchvision samples 512 regions and up
  to 128 masks of every image.
- Each loss is first averaged over an image, then over the images. torchvision averages over all regions of a batch. So
  a crowded image weighs more there, and an image's weight depends on the other images of its batch.
- Mask targets are sampled from the part of the mask around the instance, not from a mask as large as the image.
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
from flawmask.model.semantic import semantic_loss, semantic_targets
from flawmask.model.targets import Target, crops

SAMPLES_PER_INSTANCE, MIN_SAMPLES, MAX_SAMPLES = 32, 32, 512
"""The default number of sampled regions: per instance, and the least and most per image. A quarter of them may be
positive."""


MASKS_PER_INSTANCE = 4
"""The most masks per instance that train the mask head, by default. More masks of the same instance, in boxes that
differ little, would cost time and add no information."""


def samples_for(instances: int) -> int:
    """Return how many regions to sample of an image with so many instances."""
    return min(max(SAMPLES_PER_INSTANCE * instances, MIN_SAMPLES), MAX_SAMPLES)


def losses(model: Any, images: list[Tensor], targets: list[Target], roi_samples: int | None) -> dict[str, Tensor]:
    """Return the losses by torchvision's names, each a scalar float32.

    Each is a mean over the images; the loss of the masks is a mean over the images with an instance.

    Args:
        model: in training mode.
        images: (3, H, W) uint8, resized for the network, on its device.
        targets: one for each image.
        roi_samples: region proposals per image that train the heads; None derives them from the number of instances.
    """
    batch = batched(model, images)
    draws = [generator_for(target, batch.tensors.device) for target in targets]
    features = model.backbone(batch.tensors)
    proposals, proposal_losses = _propose(model.rpn, batch, features, targets, draws)
    heads = _head_losses(model.roi_heads, features, proposals, batch, targets, roi_samples, draws)
    return heads | proposal_losses | _semantic_losses(model, features, batch, targets)


def counts(_: Any, targets: list[Target]) -> dict[str, float]:
    """Return the number of images over which each loss is averaged."""
    images_with_instances = sum(len(target["boxes"]) > 0 for target in targets)
    names = (*LOSSES, "loss_semantic")
    return {name: float(images_with_instances if name == "loss_mask" else len(targets)) for name in names}


def _semantic_losses(
    model: Any, features: dict[str, Tensor], batch: ImageList, targets: list[Target]
) -> dict[str, Tensor]:
    """Return the loss of the branch for pixels, if the network has one."""
    if not hasattr(model, "semantic_head"):
        return {}
    wanted = semantic_targets(model.semantic_head, targets, batch.tensors.shape[-2:])
    return {"loss_semantic": semantic_loss(model.semantic_head(features["0"]), wanted)}


def _propose(
    rpn: Any, batch: ImageList, features: dict[str, Tensor], targets: list[Target], draws: list[torch.Generator]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the region proposals of each image, (K, 4), and the losses of the region proposal network. The steps are
    those of `RegionProposalNetwork.forward`."""
    levels = list(features.values())
    per_level = rpn.head(levels)
    anchors = rpn.anchor_generator(batch, levels)
    sizes = [scores[0].numel() for scores in per_level[0]]
    objectness, moves = concat_box_prediction_layers(*per_level)
    boxes = rpn.box_coder.decode(moves.detach(), anchors).view(len(anchors), -1, 4)
    proposals, _ = rpn.filter_proposals(boxes, objectness, batch.image_sizes, sizes)
    labels, truth = rpn.assign_targets_to_anchors(anchors, targets)
    corrections = rpn.box_coder.encode(truth, anchors)
    logits = objectness.view(len(anchors), -1)
    moves = moves.view(len(anchors), -1, 4)
    sampler = rpn.fg_bg_sampler
    score_losses, box_losses = [], []
    for at, draw in enumerate(draws):
        positives, negatives = _draw(labels[at], sampler.batch_size_per_image, sampler.positive_fraction, draw)
        drawn = torch.cat((positives, negatives))
        count = max(1, len(drawn))
        of_scores = F.binary_cross_entropy_with_logits(logits[at, drawn], labels[at][drawn], reduction="sum")
        of_boxes = F.smooth_l1_loss(moves[at, positives], corrections[at][positives], beta=1 / 9, reduction="sum")
        score_losses.append(of_scores / count)
        box_losses.append(of_boxes / count)
    return proposals, {
        "loss_objectness": torch.stack(score_losses).mean(),
        "loss_rpn_box_reg": torch.stack(box_losses).mean(),
    }


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
    zero = (class_logits.sum() * 0, box_regression.sum() * 0)  # for an image without any region
    each = [
        fastrcnn_loss(logits, moves, [label], [correction]) if len(label) else zero
        for logits, moves, label, correction in of_images
    ]
    classifier, box = (torch.stack(of_images).mean() for of_images in zip(*each, strict=True))
    if not heads.has_mask():
        return {"loss_classifier": classifier, "loss_box_reg": box}

    positives = [torch.where(of_image > 0)[0] for of_image in labels]
    if roi_samples is None:
        positives = [
            _random_subset(of_image, MASKS_PER_INSTANCE * len(target["boxes"]), draw)
            for of_image, target, draw in zip(positives, targets, draws, strict=True)
        ]
    mask_boxes = [boxes[at] for boxes, at in zip(chosen, positives, strict=True)]
    pooled = heads.mask_roi_pool(features, mask_boxes, batch.image_sizes)
    logits = heads.mask_predictor(heads.mask_head(pooled))
    side = logits.shape[-1]
    counts = [len(of_image) for of_image in positives]
    losses = []
    for of_image, target, boxes, instances, label, at in zip(
        logits.split(counts), targets, mask_boxes, matched, labels, positives, strict=True
    ):
        if len(at):
            of_class = of_image[torch.arange(len(at), device=at.device), label[at]]
            mask_target = mask_targets(target, boxes, instances[at], side)
            losses.append(F.binary_cross_entropy_with_logits(of_class, mask_target))
    # Without any mask the loss is 0 times the logits, so that every parameter still has a gradient.
    mask = torch.stack(losses).mean() if losses else logits.sum() * 0
    return {"loss_classifier": classifier, "loss_box_reg": box, "loss_mask": mask}


def _sample(
    heads: Any,
    proposals: list[Tensor],
    targets: list[Target],
    roi_samples: int | None,
    draws: list[torch.Generator],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Sample the regions of each image from the region proposals and the true boxes. At most a quarter are positive.

    Returns:
        For each image the regions, (K, 4); the instance of each, (K,); its label, (K,), 0 for background; and its box
        regression target, (K, 4).
    """
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


def _draw(labels: Tensor, count: int, positive_share: float, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the places of randomly sampled boxes: positives (P,) and negatives (N,), int64.

    At most `positive_share` of `count` are positive. Negatives fill up to `count` if there are enough.

    Args:
        labels: (A,), at least 1 for a positive, 0 for a negative, below 0 for a box that is not sampled.
        count: the number of boxes wanted.
        positive_share: the largest share of positives.
        draw: the random generator.
    """
    positives = _random_subset(torch.where(labels >= 1)[0], int(count * positive_share), draw)
    return positives, _random_subset(torch.where(labels == 0)[0], count - len(positives), draw)


def _random_subset(places: Tensor, max_size: int, draw: torch.Generator) -> Tensor:
    """Return all places, or a random subset of `max_size` if there are more."""
    if len(places) <= max_size:
        return places
    return places[torch.randperm(len(places), generator=draw, device=places.device)[:max_size]]


def mask_targets(target: Target, boxes: Tensor, instances: Tensor, side: int) -> Tensor:
    """Return the mask head's target for each box: (K, side, side) float32, 0 to 1.

    The result is that of RoIAlign on the instance's whole mask (torchvision's `project_masks_on_boxes`), in which each
    bin is the mean of a grid of bilinear samples. Such a mean is a product of means along the two axes. So two small
    matrix products per instance compute all its boxes at once.

    Args:
        target: of the image.
        boxes: (K, 4) x1 y1 x2 y2 in pixels of the resized image.
        instances: (K,) int64, the instance of each box.
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
    """Return the weight of each cell of an axis in each bin of each box: (K, bins, cells).

    The number of samples of a bin is its length in cells, rounded up, as in RoIAlign without a fixed sampling ratio. A
    sample up to one cell outside the axis takes the value of the nearest cell. Samples further outside count as 0.
    """
    length = (end - start).clamp(min=1.0) / bins
    counts = length.ceil().clamp(min=1)
    max_count = int(counts.max()) if len(counts) else 1
    number = torch.arange(max_count, device=start.device)
    step = torch.arange(bins, device=start.device)[:, None] + (number + 0.5) / counts[:, None, None]
    at = start[:, None, None] + step * length[:, None, None]
    weight = (number < counts[:, None, None]) & (at >= -1.0) & (at <= cells)
    at = at.clamp(0, cells - 1)
    low = at.long()
    fraction = at - low
    weight = weight / counts[:, None, None]
    means = start.new_zeros(len(start), bins, cells)
    means.scatter_add_(2, low, weight * (1 - fraction))
    return means.scatter_add_(2, (low + 1).clamp(max=cells - 1), weight * fraction)
