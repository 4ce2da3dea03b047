"""The losses of Mask R-CNN for a whole batch at once. No tensor's size depends on the predictions.

These are the losses of `rcnn_losses.py`, for GPUs. That module goes image by image. Most of its steps have to read a
count from the device before the next step, so a GPU waits for Python most of the time. Here, every image has the same
number of slots for instances and anchors, the regions of all images have slots in one list, and flags tell which slots
are used. Only one value is read from the device: whether suppression has finished (`Regions.settled`).

A pass has two halves: `propose` goes from pixels to region proposals, and `losses_of` from these to the losses. Neither
needs a decision by the host, so both can be recorded once and replayed (`training/recording.py`). Their random samples
depend on numbers that are drawn before the pass (`PassInputs`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

from flawmask.model.draws import generator_for
from flawmask.model.instances import Capacity, Instances, mask_targets, rounded
from flawmask.model.layers import stacked, upload
from flawmask.model.matching import AnchorSamples, decode, encode, ious
from flawmask.model.nms import BLOCK, ROUNDS, keep_best
from flawmask.model.rcnn_losses import MASKS_PER_INSTANCE, samples_for
from flawmask.model.semantic import semantic_loss, semantic_targets
from flawmask.model.targets import Target

MIN_SLOTS = 16
"""The smallest number of slots for regions or masks. Larger numbers are rounded up to powers of two."""


def is_supported(model: Any) -> bool:
    """Return whether this module can compute a network's losses.

    It cannot if the heads have BatchNorm: its statistics would include unused slots.
    """
    return not any(isinstance(one, torch.nn.BatchNorm2d) for one in model.roi_heads.modules())


@dataclass(frozen=True)
class Quotas:
    """How many regions and masks of each of B images train the heads.

    Attributes:
        each: (B, 3) int64: regions, the most positive regions among them, and masks.
        regions: slots for the regions of all images.
        masks: slots for the masks of all images; at least one, so that every layer has a gradient.
    """

    each: Tensor
    regions: int
    masks: int


@dataclass(frozen=True)
class Candidates:
    """The N boxes of highest objectness of each of L levels of B images, before suppression.

    Attributes:
        boxes: (B, L, N, 4) float32, x1 y1 x2 y2, clipped to the image, the best of each level first.
        scores: (B, L, N) float32, 0 to 1.
        valid: (B, L, N) bool, which slots hold a box.
    """

    boxes: Tensor
    scores: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Regions:
    """The region proposals: K slots for each of B images.

    Attributes:
        boxes: (B, K, 4) float32, x1 y1 x2 y2, the best first.
        is_box: (B, K) bool, which slots hold a box.
        settled: () bool, whether suppression has finished.
    """

    boxes: Tensor
    is_box: Tensor
    settled: Tensor


@dataclass(frozen=True)
class Proposals:
    """The result of the first half of a pass: features and region proposals of B images.

    Attributes:
        shape: height and width of a padded image.
        samples: the anchors that train the region proposal network.
        features: of each level, (B, channels, height, width).
        objectness: (B, A) float32, the logits of all anchors.
        moves: (B, A, 4) float32, the box corrections of all anchors.
        candidates: the boxes of each level before suppression.
        regions: the boxes after suppression. They are final only if `settled`.
    """

    shape: tuple[int, int]
    samples: AnchorSamples
    features: dict[str, Tensor]
    objectness: Tensor
    moves: Tensor
    candidates: Candidates
    regions: Regions


@dataclass(frozen=True)
class SampledRegions:
    """The regions that train the heads, with their targets: R slots for all images together.

    Attributes:
        image_of: (R,) int64, the image of each region.
        rois: (R, 4) float32, x1 y1 x2 y2; zeros in unused slots.
        used: (R,) bool, which slots hold a region.
        labels: (R,) int64, 0 for background.
        corrections: (R, 4) float32, the box regression targets.
        masks: the regions that train the mask head; None if the network has none.
    """

    image_of: Tensor
    rois: Tensor
    used: Tensor
    labels: Tensor
    corrections: Tensor
    masks: "SampledMasks | None" = None


@dataclass(frozen=True)
class SampledMasks:
    """The regions that train the mask head, with their targets: M slots for all images together.

    Attributes:
        image_of: (M,) int64, the image of each region.
        rois: (M, 4) float32, x1 y1 x2 y2; zeros in unused slots.
        used: (M,) bool, which slots hold a region.
        labels: (M,) int64, 0 in unused slots.
        targets: (M, side, side) float32, 0 to 1.
    """

    image_of: Tensor
    rois: Tensor
    used: Tensor
    labels: Tensor
    targets: Tensor


@dataclass(frozen=True)
class PassInputs:
    """All inputs of a pass through B images.

    Attributes:
        pixels: (B, H, W, 3) uint8, each image in the upper left corner; H and W are multiples of `STRIDE`.
        sizes: (B, 2) int64, height and width of each image.
        instances: of the images.
        quotas: how many regions and masks of each image train the heads.
        anchor_draws: (B, A) float32, random numbers from 0 to 1 that decide which anchors are sampled.
        region_draws: (B, K + G) float32, random numbers from 0 to 1 that decide which regions are sampled.
        defective: (B, D, rows, columns) float32, the target of the branch for pixels; None without the branch.
    """

    pixels: Tensor
    sizes: Tensor
    instances: Instances
    quotas: Quotas
    anchor_draws: Tensor
    region_draws: Tensor
    defective: Tensor | None = None


class RcnnBatch:
    """Computes the training passes of one network. It caches the anchors of each image size.

    Attributes:
        model: in training mode, on its device.
        roi_samples: region proposals per image that train the heads; None derives them from the number of instances.
    """

    def __init__(self, model: Any, roi_samples: int | None) -> None:
        self.model, self.roi_samples = model, roi_samples
        self.device = next(model.parameters()).device
        transform = model.transform
        self._mean, self._deviation = (
            torch.tensor(values, device=self.device)[:, None, None]
            for values in (transform.image_mean, transform.image_std)
        )
        self._anchors: dict[tuple[int, int], tuple[Tensor, list[int]]] = {}

    def losses(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the losses, as `rcnn_losses.losses` does."""
        pixels, sizes = stacked(images)
        inputs = self.inputs(upload(pixels, self.device), sizes, targets)
        proposed = self.propose(inputs)
        regions = self.settled(proposed.regions, proposed.candidates)
        return self.losses_of(inputs, proposed, regions)

    def inputs(
        self, pixels: Tensor, sizes: Sequence[tuple[int, int]], targets: Sequence[Target], *, is_rounded: bool = False
    ) -> PassInputs:
        """Return the inputs of a pass on the device. Only the pixels stay where they are.

        Args:
            pixels: (B, H, W, 3) uint8, each image in the upper left corner; H and W are multiples of `STRIDE`.
            sizes: height and width of each image.
            targets: one for each image.
            is_rounded: round the numbers of slots up, so that few different shapes occur.
        """
        count, height, width, _ = pixels.shape
        capacity = Capacity.of(targets)
        capacity = capacity.rounded(count, height, width) if is_rounded else capacity
        instances = Instances.of(targets, self.device, capacity)
        anchors, per_level = self.anchors((height, width))
        candidates = len(per_level) * self._candidates_per_level(per_level)
        regions = min(self.model.rpn.post_nms_top_n(), candidates) + capacity.instances
        anchor_draws, region_draws = self._draws(targets, len(anchors), regions)
        return PassInputs(
            pixels,
            upload(torch.tensor(list(sizes)), self.device),
            instances,
            self.quotas(instances, is_rounded=is_rounded),
            anchor_draws,
            region_draws,
            self._defective(targets, (height, width)),
        )

    def _defective(self, targets: Sequence[Target], shape: tuple[int, int]) -> Tensor | None:
        head = getattr(self.model, "semantic_head", None)
        return None if head is None else upload(semantic_targets(head, targets, shape), self.device)

    def _draws(self, targets: Sequence[Target], *counts: int) -> Iterator[Tensor]:
        """Yield random numbers from 0 to 1 for each count: (B, count) float32. Each image has its own generator."""
        draws = [generator_for(target, self.device) for target in targets]
        for count in counts:
            yield torch.stack([torch.rand(count, generator=draw, device=self.device) for draw in draws])

    @torch.no_grad()
    def anchors(self, shape: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Return the anchors of a batch of this height and width, (A, 4) float32, and the number of each level."""
        key = (int(shape[0]), int(shape[1]))
        if key not in self._anchors:
            in_training = [module for module in self.model.modules() if module.training]
            self.model.eval()  # this pass, which only tells the features' sizes, must not update any norm
            blank = torch.zeros(1, 3, *key, device=self.device)
            features = list(self.model.backbone(blank).values())
            for module in in_training:
                module.training = True
            (anchors,) = self.model.rpn.anchor_generator(ImageList(blank, [key]), features)
            per_cell = self.model.rpn.anchor_generator.num_anchors_per_location()
            cells = [int(level.shape[-2] * level.shape[-1]) for level in features]
            self._anchors[key] = (anchors, [a * b for a, b in zip(cells, per_cell, strict=True)])
        return self._anchors[key]

    def propose(self, inputs: PassInputs) -> Proposals:
        """Return the network's region proposals, and the anchors that train its region proposal network."""
        rpn = self.model.rpn
        shape = (int(inputs.pixels.shape[1]), int(inputs.pixels.shape[2]))
        anchors, _ = self.anchors(shape)
        # Sample before the features are computed: the sampler's large matrices are freed before memory becomes scarce.
        samples = AnchorSamples.draw(rpn, anchors, inputs.instances, inputs.anchor_draws)
        features = self.model.backbone(self._normalised(inputs.pixels, inputs.sizes))
        objectness, moves = rpn.head(list(features.values()))
        per_level = [
            (scores.permute(0, 2, 3, 1).flatten(1), _of_anchors(of_level, scores.shape[1]))
            for scores, of_level in zip(objectness, moves, strict=True)
        ]
        candidates = self._candidates(per_level, shape, inputs.sizes)
        return Proposals(
            shape,
            samples,
            features,
            torch.cat([scores for scores, _ in per_level], dim=1),
            torch.cat([of_level for _, of_level in per_level], dim=1),
            candidates,
            self._suppressed(candidates, ROUNDS),
        )

    def settled(self, regions: Regions, candidates: Candidates) -> Regions:
        """Return the region proposals after complete suppression. This waits for the device, usually once."""
        if bool(regions.settled):
            return regions
        longer = self._suppressed(candidates, 4 * ROUNDS)
        return longer if bool(longer.settled) else self._suppressed(candidates, BLOCK)

    def _normalised(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Return the backbone's input, (B, 3, H, W) float32: normalised colours, 0 as padding."""
        images = ((pixels.permute(0, 3, 1, 2).float() / 255) - self._mean) / self._deviation
        height, width = pixels.shape[1:3]
        rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
        columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]
        return torch.where(inside, images, 0.0).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def _candidates(
        self, per_level: Sequence[tuple[Tensor, Tensor]], shape: Sequence[int], sizes: Tensor
    ) -> Candidates:
        """Return the boxes of highest objectness of each level.

        Args:
            per_level: logits (B, A) and box corrections (B, A, 4) of each level's anchors.
            shape: height and width of a padded image.
            sizes: (B, 2) int64, height and width of each image.
        """
        rpn = self.model.rpn
        anchors, counts = self.anchors(shape)
        slots = self._candidates_per_level(counts)
        boxes, scores = [], []
        for (logits, moves), of_level in zip(per_level, torch.split(anchors, counts), strict=True):
            best, at = logits.detach().topk(min(slots, logits.shape[1]))
            moved = decode(moves.detach().gather(1, at[..., None].expand(-1, -1, 4)), of_level[at], rpn.box_coder)
            boxes.append(F.pad(moved, (0, 0, 0, slots - at.shape[1])))
            scores.append(F.pad(best, (0, slots - at.shape[1]), value=-torch.inf))
        limits = sizes.flip(1).to(torch.float32)[:, None, None]  # width, height
        of_levels = torch.stack(boxes, dim=1)
        corners = [torch.minimum(of_levels[..., at : at + 2].clamp(min=0), limits) for at in (0, 2)]
        is_large = ((corners[1] - corners[0]) >= rpn.min_size).all(dim=-1)
        logits = torch.stack(scores, dim=1)
        probabilities = torch.sigmoid(logits)
        valid = is_large & (probabilities >= rpn.score_thresh) & (logits > -torch.inf)
        return Candidates(torch.cat(corners, dim=-1), probabilities, valid)

    def _candidates_per_level(self, counts: Sequence[int]) -> int:
        return int(min(self.model.rpn.pre_nms_top_n(), max(counts)))

    @torch.no_grad()
    def _suppressed(self, candidates: Candidates, rounds: int) -> Regions:
        rpn = self.model.rpn
        images, levels, count = candidates.valid.shape
        sets = images * levels
        boxes, valid = candidates.boxes.view(sets, count, 4), candidates.valid.view(sets, count)
        kept, settled = keep_best(boxes, valid, rpn.nms_thresh, rounds)
        # Suppressed boxes get a score below that of any kept box.
        scores = torch.where(kept.view(images, levels, count), candidates.scores, -1.0).flatten(1)
        best, at = scores.sort(dim=1, descending=True, stable=True)
        slots = min(rpn.post_nms_top_n(), best.shape[1])
        boxes = candidates.boxes.flatten(1, 2).gather(1, at[:, :slots, None].expand(-1, -1, 4))
        return Regions(boxes, best[:, :slots] >= 0, settled)

    @torch.no_grad()
    def draw(
        self, regions: Regions, instances: Instances, quotas: Quotas | None = None, draws: Tensor | None = None
    ) -> SampledRegions:
        """Sample the regions that train the heads, and return them with their targets.

        They are sampled from the region proposals and the true boxes. At most a quarter of an image's regions are
        positive, which means that they lie on an instance.

        Args:
            regions: the region proposals after complete suppression.
            instances: of the images.
            quotas: how many regions and masks to sample; None derives them from the instances.
            draws: (B, K + G) float32, random numbers from 0 to 1 that decide the sample; None to draw them here.
        """
        heads = self.model.roi_heads
        quotas = quotas or self.quotas(instances)
        boxes = torch.cat((regions.boxes, instances.boxes), dim=1)
        is_box = torch.cat((regions.is_box, instances.labels > 0), dim=1)
        overlaps, matched = ious(instances, slice(None), boxes).max(dim=1)
        matcher = heads.proposal_matcher
        positive = is_box & (overlaps >= matcher.high_threshold)
        negative = is_box & (overlaps < matcher.low_threshold)
        labels = torch.where(positive, instances.labels.gather(1, matched), 0)
        # Positive regions first, then negative ones, each in random order.
        draws = torch.rand(is_box.shape, device=self.device) if draws is None else draws
        keys = draws + torch.where(positive, 0.0, torch.where(negative, 1.0, 2.0))
        order = keys.argsort(dim=1)

        quota, max_positives, of_masks = quotas.each.unbind(1)
        positives = positive.sum(1)
        taken = torch.minimum(positives, max_positives)
        negatives = torch.minimum(negative.sum(1), quota - taken)
        image_of, slot, is_slot = _slots(quota, quotas.regions)
        # Slots behind the sampled positives take negatives. These begin at rank `positives`, so surplus positives are
        # skipped.
        taken_there = taken[image_of]
        rank = torch.where(slot < taken_there, slot, positives[image_of] + slot - taken_there)
        region = order[image_of, rank.clamp(max=order.shape[1] - 1)]
        used = is_slot & (slot < taken_there + negatives[image_of])
        region_labels = torch.where(used, labels[image_of, region], 0)
        rois = boxes[image_of, region]
        truth = instances.boxes[image_of, matched[image_of, region]]
        corrections = torch.where((region_labels > 0)[:, None], encode(truth, rois, heads.box_coder.weights), 0.0)
        drawn = SampledRegions(image_of, torch.where(used[:, None], rois, 0.0), used, region_labels, corrections)
        if not heads.has_mask():
            return drawn
        image_of, slot, is_slot = _slots(of_masks, quotas.masks)
        region = order[image_of, slot.clamp(max=order.shape[1] - 1)]
        used = is_slot & (slot < taken[image_of])
        rois = torch.where(used[:, None], boxes[image_of, region], 0.0)
        of_instance = matched[image_of, region]
        targets = mask_targets(instances, image_of, of_instance, rois, 2 * heads.mask_roi_pool.output_size[0])
        mask_labels = torch.where(used, labels[image_of, region], 0)
        return replace(drawn, masks=SampledMasks(image_of, rois, used, mask_labels, targets))

    def quotas(self, instances: Instances, *, is_rounded: bool = False) -> Quotas:
        """Return how many regions and masks of each image train the heads.

        With `roi_samples`, that is the number of regions, and all positive regions have masks. Otherwise the instances
        decide the number of regions, and each instance has a few masks at most.
        """
        fraction = self.model.roi_heads.fg_bg_sampler.positive_fraction
        rows = []
        for count in instances.counts:
            regions = self.roi_samples or samples_for(count)
            positives = int(regions * fraction)
            masks = positives if self.roi_samples else min(positives, MASKS_PER_INSTANCE * count)
            rows.append([regions, positives, masks if count else 0])
        slots = [max(1, sum(row[at] for row in rows)) for at in (0, 2)]
        if is_rounded:
            slots = [rounded(count, MIN_SLOTS) for count in slots]
        return Quotas(upload(torch.tensor(rows), self.device), *slots)

    def losses_of(self, inputs: PassInputs, proposed: Proposals, regions: Regions) -> dict[str, Tensor]:
        """Return the losses by torchvision's names, each a scalar float32: means over each image, then over the images.

        Args:
            inputs: of the pass.
            proposed: the result of `propose`.
            regions: the region proposals after complete suppression.
        """
        drawn = self.draw(regions, inputs.instances, inputs.quotas, inputs.region_draws)
        losses = self._head_losses(proposed, drawn) | self._proposal_losses(proposed)
        if inputs.defective is not None:
            losses["loss_semantic"] = semantic_loss(self.model.semantic_head(proposed.features["0"]), inputs.defective)
        return losses

    def _head_losses(self, proposed: Proposals, drawn: SampledRegions) -> dict[str, Tensor]:
        heads, images = self.model.roi_heads, len(proposed.objectness)
        levels = heads.box_roi_pool.levels_of(proposed.features)
        pooled = heads.box_roi_pool.pool(levels, drawn.rois, drawn.image_of, [proposed.shape])
        logits, moves = heads.box_predictor(heads.box_head(pooled))
        weights = _loss_weights(drawn.used, drawn.image_of, images) / images
        classifier = (F.cross_entropy(logits, drawn.labels, reduction="none") * weights).sum()
        moves = moves.view(len(moves), -1, 4)
        of_class = moves.gather(1, drawn.labels[:, None, None].expand(-1, 1, 4))[:, 0]
        box = (_smooth_l1(of_class, drawn.corrections) * (drawn.labels > 0) * weights).sum()
        losses = {"loss_classifier": classifier, "loss_box_reg": box}
        if drawn.masks is not None:
            masks = drawn.masks
            # Convert the levels to float32 again. Keeping those from above would take more memory for longer.
            levels = heads.mask_roi_pool.levels_of(proposed.features)
            pooled = heads.mask_roi_pool.pool(levels, masks.rois, masks.image_of, [proposed.shape])
            logits = heads.mask_predictor(heads.mask_head(pooled))
            side = logits.shape[-1]
            of_class = logits.gather(1, masks.labels[:, None, None, None].expand(-1, 1, side, side))[:, 0]
            each = F.binary_cross_entropy_with_logits(of_class, masks.targets, reduction="none").mean(dim=(1, 2))
            weights = _loss_weights(masks.used, masks.image_of, images)
            # The weights of an image with masks add up to 1, so their sum is the number of such images.
            losses["loss_mask"] = (each * weights).sum() / weights.sum().clamp(min=1)
        return losses

    def _proposal_losses(self, proposed: Proposals) -> dict[str, Tensor]:
        samples = proposed.samples
        positives = samples.corrections.shape[1]
        weights = samples.used / samples.used.sum(dim=1, keepdim=True).clamp(min=1) / len(samples.used)
        logits = proposed.objectness.gather(1, samples.places)
        targets = (torch.arange(logits.shape[1], device=logits.device) < positives).to(logits.dtype).expand_as(logits)
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        moves = proposed.moves.gather(1, samples.places[:, :positives, None].expand(-1, -1, 4))
        return {
            "loss_objectness": (each * weights).sum(),
            "loss_rpn_box_reg": (_smooth_l1(moves, samples.corrections) * weights[:, :positives]).sum(),
        }


def _slots(quotas: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each of `count` slots its image, its number within that image, and whether it belongs to an image.

    Args:
        quotas: (B,) int64, the number of slots of each image. The images' slots follow each other.
        count: the number of all slots, at least the sum of the quotas.
    """
    ends = quotas.cumsum(0)
    slots = torch.arange(count, device=quotas.device)
    image_of = torch.searchsorted(ends, slots, right=True).clamp(max=len(quotas) - 1)
    return image_of, slots - (ends - quotas)[image_of], slots < ends[-1]


def _of_anchors(moves: Tensor, per_cell: int) -> Tensor:
    """Reorder a level's corrections from (B, 4 x per_cell, H, W) to one row per anchor: (B, H x W x per_cell, 4)."""
    images, _, height, width = moves.shape
    return moves.view(images, per_cell, 4, height, width).permute(0, 3, 4, 1, 2).reshape(images, -1, 4)


def _smooth_l1(moves: Tensor, wanted: Tensor) -> Tensor:
    """Return the regression loss of each box, (...), with torchvision's beta."""
    return F.smooth_l1_loss(moves, wanted, beta=1 / 9, reduction="none").sum(dim=-1)


def _loss_weights(used: Tensor, image_of: Tensor, images: int) -> Tensor:
    """Return the weight of each slot in the mean over its image: (R,) float32, 0 for unused slots.

    Args:
        used: (R,) bool, which slots are used.
        image_of: (R,) int64, the image of each slot.
        images: the number of images.
    """
    counts = torch.zeros(images, device=used.device).scatter_add_(0, image_of, used.to(torch.float32))
    return used / counts.clamp(min=1)[image_of]
