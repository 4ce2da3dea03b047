"""The losses of Mask R-CNN for a whole batch at once, in tensors whose sizes do not depend on what is found.

The same losses as in `rcnn_losses.py`, for GPUs. There, each image is gone through by itself, and most steps ask the
device how many there are of something before they can go on: a GPU then waits for Python most of the time. Here, every
image has the same number of slots for instances and anchors, all regions have slots in one list, and flags say which
slots count. The one question that is left is whether suppression is finished (`Regions.settled`).

A pass has two halves, so that what needs no decision can be recorded once and replayed (`training/recording.py`):
`propose`, from pixels to region proposals, and `losses_of`, from these to the losses. What they draw at random is
decided by numbers that are drawn before (`PassInputs`).
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
from flawmask.model.targets import Target

MIN_SLOTS = 16
"""From here on, slots for regions and masks are rounded to powers of two."""


def is_supported(model: Any) -> bool:
    """Return whether a network's losses may be computed here: not where a norm of its heads would take slots
    that do not count for regions."""
    return not any(isinstance(one, torch.nn.BatchNorm2d) for one in model.roi_heads.modules())


@dataclass(frozen=True)
class Quotas:
    """On how many regions and masks of each of B images the heads learn.

    Attributes:
        each: (B, 3) int64: how many regions, how many of these may lie on an instance, and how many masks.
        regions: slots for the regions of all images.
        masks: slots for the masks of all images, one at least, so that every layer has a gradient.
    """

    each: Tensor
    regions: int
    masks: int


@dataclass(frozen=True)
class Candidates:
    """The best N boxes of each of L levels of B images, before suppression.

    Attributes:
        boxes: (B, L, N, 4) float32, x1 y1 x2 y2, the best of each level first, cut to the image.
        scores: (B, L, N) float32, 0 to 1.
        valid: (B, L, N) bool, which of them are boxes at all.
    """

    boxes: Tensor
    scores: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Regions:
    """The region proposals: K of each of B images.

    Attributes:
        boxes: (B, K, 4) float32, x1 y1 x2 y2, the best first.
        is_box: (B, K) bool, which of these are any.
        settled: () bool, whether suppression was finished.
    """

    boxes: Tensor
    is_box: Tensor
    settled: Tensor


@dataclass(frozen=True)
class Proposals:
    """What the network makes of B images before anything is drawn.

    Attributes:
        shape: height and width of a padded image.
        samples: on which anchors is learned.
        features: of each level, (B, channels, height, width).
        objectness: (B, A) float32 logits of all anchors.
        moves: (B, A, 4) float32, of all anchors.
        candidates: the best boxes of each level.
        regions: what suppression leaves of them, if it is settled.
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
    """On which regions the heads learn, and what: R of all images together, and M masks.

    Attributes:
        image_of: (R,) int64, which image each region lies on.
        rois: (R, 4) float32, x1 y1 x2 y2; zeros in slots that do not count.
        used: (R,) bool, which of the slots count.
        labels: (R,) int64, 0 for none.
        corrections: (R, 4) float32, how each is to be moved onto its instance.
        masks: what the mask head learns; None where the network has none.
    """

    image_of: Tensor
    rois: Tensor
    used: Tensor
    labels: Tensor
    corrections: Tensor
    masks: "SampledMasks | None" = None


@dataclass(frozen=True)
class SampledMasks:
    """On which regions the mask head learns, and what: M of all images together.

    Attributes:
        image_of: (M,) int64, which image each region lies on.
        rois: (M, 4) float32, x1 y1 x2 y2; zeros in slots that do not count.
        used: (M,) bool, which of the slots count.
        labels: (M,) int64, 0 in slots that do not count.
        wanted: (M, side, side) float32, 0 to 1.
    """

    image_of: Tensor
    rois: Tensor
    used: Tensor
    labels: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class PassInputs:
    """All that a pass through B images begins with.

    Attributes:
        pixels: (B, H, W, 3) uint8, each image in the upper left corner; H and W are multiples of `STRIDE`.
        sizes: (B, 2) int64, height and width of each image.
        instances: what is on them.
        quotas: on how much of each the heads learn.
        anchor_draws: (B, A) float32, random numbers from 0 to 1 that decide on which anchors is learned.
        region_draws: (B, K + G) float32, random numbers from 0 to 1 that decide on which regions is learned.
    """

    pixels: Tensor
    sizes: Tensor
    instances: Instances
    quotas: Quotas
    anchor_draws: Tensor
    region_draws: Tensor


class RcnnBatch:
    """The parts of a pass of one network, and what they need of it that does not change.

    Attributes:
        model: in training mode, on its device.
        roi_samples: regions per image on which the heads learn; None follows the number of instances.
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
        """Return what `rcnn_losses.losses` returns."""
        pixels, sizes = stacked(images)
        inputs = self.inputs(upload(pixels, self.device), sizes, targets)
        proposed = self.propose(inputs)
        regions = self.settled(proposed.regions, proposed.candidates)
        return self.losses_of(inputs, proposed, regions)

    def inputs(
        self, pixels: Tensor, sizes: Sequence[tuple[int, int]], targets: Sequence[Target], *, is_rounded: bool = False
    ) -> PassInputs:
        """Return what a pass begins with, on the device; but the pixels stay where they are.

        Args:
            pixels: (B, H, W, 3) uint8, each image in the upper left corner; H and W are multiples of `STRIDE`.
            sizes: height and width of each image.
            targets: of each.
            is_rounded: whether there is more room than is needed, so that few different shapes come.
        """
        count, height, width, _ = pixels.shape
        room = Capacity.of(targets)
        room = room.rounded(count, height, width) if is_rounded else room
        instances = Instances.of(targets, self.device, room)
        anchors, per_level = self.anchors((height, width))
        candidates = len(per_level) * self._most_of_level(per_level)
        regions = min(self.model.rpn.post_nms_top_n(), candidates) + room.instances
        return PassInputs(
            pixels,
            upload(torch.tensor(list(sizes)), self.device),
            instances,
            self.quotas(instances, is_rounded=is_rounded),
            *self._draws(targets, len(anchors), regions),
        )

    def _draws(self, targets: Sequence[Target], *counts: int) -> Iterator[Tensor]:
        """Yield random numbers from 0 to 1 for each count, (B, count) float32, an image's own in each row."""
        draws = [generator_for(target, self.device) for target in targets]
        for count in counts:
            yield torch.stack([torch.rand(count, generator=draw, device=self.device) for draw in draws])

    @torch.no_grad()
    def anchors(self, shape: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Return the anchors of a batch of this height and width, (A, 4) float32, and how many each level has."""
        key = (int(shape[0]), int(shape[1]))
        if key not in self._anchors:
            was = [module for module in self.model.modules() if module.training]
            self.model.eval()  # a look at the features' sizes teaches no norm anything
            blank = torch.zeros(1, 3, *key, device=self.device)
            features = list(self.model.backbone(blank).values())
            for module in was:
                module.training = True
            (anchors,) = self.model.rpn.anchor_generator(ImageList(blank, [key]), features)
            per_cell = self.model.rpn.anchor_generator.num_anchors_per_location()
            cells = [int(level.shape[-2] * level.shape[-1]) for level in features]
            self._anchors[key] = (anchors, [a * b for a, b in zip(cells, per_cell, strict=True)])
        return self._anchors[key]

    def propose(self, inputs: PassInputs) -> Proposals:
        """Return the network's region proposals, and on which anchors it learns."""
        rpn = self.model.rpn
        shape = (int(inputs.pixels.shape[1]), int(inputs.pixels.shape[2]))
        anchors, _ = self.anchors(shape)
        # Before there are features: its large matrices are gone when memory is scarce.
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
        """Return the region proposals with suppression finished. This waits for the device, once as a rule."""
        if bool(regions.settled):
            return regions
        longer = self._suppressed(candidates, 4 * ROUNDS)
        return longer if bool(longer.settled) else self._suppressed(candidates, BLOCK)

    def _normalised(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Return (B, 3, H, W) float32 as the backbone sees it: colours normalised, padding 0."""
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
        """Return the best boxes of each level.

        Args:
            per_level: logits (B, A) and moves (B, A, 4) of each level's anchors.
            shape: height and width of a padded image.
            sizes: (B, 2) int64, height and width of each image.
        """
        rpn = self.model.rpn
        anchors, counts = self.anchors(shape)
        most = self._most_of_level(counts)
        boxes, scores = [], []
        for (logits, moves), of_level in zip(per_level, torch.split(anchors, counts), strict=True):
            best, at = logits.detach().topk(min(most, logits.shape[1]))
            moved = decode(moves.detach().gather(1, at[..., None].expand(-1, -1, 4)), of_level[at], rpn.box_coder)
            boxes.append(F.pad(moved, (0, 0, 0, most - at.shape[1])))
            scores.append(F.pad(best, (0, most - at.shape[1]), value=-torch.inf))
        limits = sizes.flip(1).to(torch.float32)[:, None, None]  # width, height
        both = torch.stack(boxes, dim=1)
        corners = [torch.minimum(both[..., at : at + 2].clamp(min=0), limits) for at in (0, 2)]
        large = ((corners[1] - corners[0]) >= rpn.min_size).all(dim=-1)
        logits = torch.stack(scores, dim=1)
        certain = torch.sigmoid(logits)
        valid = large & (certain >= rpn.score_thresh) & (logits > -torch.inf)
        return Candidates(torch.cat(corners, dim=-1), certain, valid)

    def _most_of_level(self, counts: Sequence[int]) -> int:
        return int(min(self.model.rpn.pre_nms_top_n(), max(counts)))

    @torch.no_grad()
    def _suppressed(self, candidates: Candidates, rounds: int) -> Regions:
        rpn = self.model.rpn
        images, levels, count = candidates.valid.shape
        sets = images * levels
        boxes, valid = candidates.boxes.view(sets, count, 4), candidates.valid.view(sets, count)
        kept, settled = keep_best(boxes, valid, rpn.nms_thresh, rounds)
        # What is not kept scores less than any box.
        scores = torch.where(kept.view(images, levels, count), candidates.scores, -1.0).flatten(1)
        best, at = scores.sort(dim=1, descending=True, stable=True)
        most = min(rpn.post_nms_top_n(), best.shape[1])
        boxes = candidates.boxes.flatten(1, 2).gather(1, at[:, :most, None].expand(-1, -1, 4))
        return Regions(boxes, best[:, :most] >= 0, settled)

    @torch.no_grad()
    def draw(
        self, regions: Regions, instances: Instances, quotas: Quotas | None = None, draws: Tensor | None = None
    ) -> SampledRegions:
        """Return on which regions the heads learn, and what. At most a quarter of an image's lie on an instance; the
        true boxes take part.

        Args:
            regions: the region proposals, settled.
            instances: what is on the images.
            quotas: on how many regions of each image is learned; by default as many as its instances ask for.
            draws: (B, K + G) float32, random numbers from 0 to 1 that decide it; by default they are drawn here.
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
        # Those on an instance first, then those beside, each in random order.
        draws = torch.rand(is_box.shape, device=self.device) if draws is None else draws
        keys = draws + torch.where(positive, 0.0, torch.where(negative, 1.0, 2.0))
        order = keys.argsort(dim=1)

        quota, of_instances, of_masks = quotas.each.unbind(1)
        on_instance = positive.sum(1)
        taken = torch.minimum(on_instance, of_instances)
        beside = torch.minimum(negative.sum(1), quota - taken)
        image_of, slot, is_slot = _slots(quota, quotas.regions)
        # Behind those on an instance come those beside: as many of the former as are too many are passed over.
        taken_there = taken[image_of]
        rank = torch.where(slot < taken_there, slot, on_instance[image_of] + slot - taken_there)
        region = order[image_of, rank.clamp(max=order.shape[1] - 1)]
        used = is_slot & (slot < taken_there + beside[image_of])
        found_labels = torch.where(used, labels[image_of, region], 0)
        rois = boxes[image_of, region]
        truth = instances.boxes[image_of, matched[image_of, region]]
        corrections = torch.where((found_labels > 0)[:, None], encode(truth, rois, heads.box_coder.weights), 0.0)
        drawn = SampledRegions(image_of, torch.where(used[:, None], rois, 0.0), used, found_labels, corrections)
        if not heads.has_mask():
            return drawn
        image_of, slot, is_slot = _slots(of_masks, quotas.masks)
        region = order[image_of, slot.clamp(max=order.shape[1] - 1)]
        used = is_slot & (slot < taken[image_of])
        rois = torch.where(used[:, None], boxes[image_of, region], 0.0)
        of_instance = matched[image_of, region]
        wanted = mask_targets(instances, image_of, of_instance, rois, 2 * heads.mask_roi_pool.output_size[0])
        mask_labels = torch.where(used, labels[image_of, region], 0)
        return replace(drawn, masks=SampledMasks(image_of, rois, used, mask_labels, wanted))

    def quotas(self, instances: Instances, *, is_rounded: bool = False) -> Quotas:
        """Return on how much of each image the heads learn: on as many regions as `roi_samples` says or its instances
        ask for, and on all masks of these or a few of each instance."""
        fraction = self.model.roi_heads.fg_bg_sampler.positive_fraction
        rows = []
        for count in instances.counts:
            regions = self.roi_samples or samples_for(count)
            most = int(regions * fraction)
            masks = most if self.roi_samples else min(most, MASKS_PER_INSTANCE * count)
            rows.append([regions, most, masks if count else 0])
        slots = [max(1, sum(row[at] for row in rows)) for at in (0, 2)]
        if is_rounded:
            slots = [rounded(count, MIN_SLOTS) for count in slots]
        return Quotas(upload(torch.tensor(rows), self.device), *slots)

    def losses_of(self, inputs: PassInputs, proposed: Proposals, regions: Regions) -> dict[str, Tensor]:
        """Return the losses by torchvision's names, each a scalar float32: a mean over the images, of an image's mean.

        Args:
            inputs: what the pass began with.
            proposed: what `propose` returned.
            regions: the region proposals, settled.
        """
        drawn = self.draw(regions, inputs.instances, inputs.quotas, inputs.region_draws)
        return self._head_losses(proposed, drawn) | self._proposal_losses(proposed)

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
        found = {"loss_classifier": classifier, "loss_box_reg": box}
        if drawn.masks is not None:
            masks = drawn.masks
            # In float32 once more: kept from above, they and their gradients would take up more memory for longer.
            levels = heads.mask_roi_pool.levels_of(proposed.features)
            pooled = heads.mask_roi_pool.pool(levels, masks.rois, masks.image_of, [proposed.shape])
            logits = heads.mask_predictor(heads.mask_head(pooled))
            side = logits.shape[-1]
            of_class = logits.gather(1, masks.labels[:, None, None, None].expand(-1, 1, side, side))[:, 0]
            each = F.binary_cross_entropy_with_logits(of_class, masks.wanted, reduction="none").mean(dim=(1, 2))
            weights = _loss_weights(masks.used, masks.image_of, images)
            # Each image that has any has weights that add up to 1.
            found["loss_mask"] = (each * weights).sum() / weights.sum().clamp(min=1)
        return found

    def _proposal_losses(self, proposed: Proposals) -> dict[str, Tensor]:
        samples = proposed.samples
        on_instance = samples.corrections.shape[1]
        weights = samples.used / samples.used.sum(dim=1, keepdim=True).clamp(min=1) / len(samples.used)
        logits = proposed.objectness.gather(1, samples.places)
        wanted = (torch.arange(logits.shape[1], device=logits.device) < on_instance).to(logits.dtype).expand_as(logits)
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        moves = proposed.moves.gather(1, samples.places[:, :on_instance, None].expand(-1, -1, 4))
        return {
            "loss_objectness": (each * weights).sum(),
            "loss_rpn_box_reg": (_smooth_l1(moves, samples.corrections) * weights[:, :on_instance]).sum(),
        }


def _slots(quotas: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each of `count` slots which image it belongs to, its number there, and whether there is any such.

    Args:
        quotas: (B,) int64, how many slots each image has, one image's behind the other's.
        count: of slots, as many as all images have or more.
    """
    ends = quotas.cumsum(0)
    slots = torch.arange(count, device=quotas.device)
    image_of = torch.searchsorted(ends, slots, right=True).clamp(max=len(quotas) - 1)
    return image_of, slots - (ends - quotas)[image_of], slots < ends[-1]


def _of_anchors(moves: Tensor, per_cell: int) -> Tensor:
    """Return a level's moves, (B, 4 x per_cell, H, W), anchor by anchor: (B, H x W x per_cell, 4)."""
    images, _, height, width = moves.shape
    return moves.view(images, per_cell, 4, height, width).permute(0, 3, 4, 1, 2).reshape(images, -1, 4)


def _smooth_l1(moves: Tensor, wanted: Tensor) -> Tensor:
    """Return each box's loss, (...), as torchvision weighs it."""
    return F.smooth_l1_loss(moves, wanted, beta=1 / 9, reduction="none").sum(dim=-1)


def _loss_weights(used: Tensor, image_of: Tensor, images: int) -> Tensor:
    """Return what each slot counts for in the mean over its image: (R,) float32, 0 where it does not count.

    Args:
        used: (R,) bool, which slots count.
        image_of: (R,) int64, which image each belongs to.
        images: how many there are.
    """
    counts = torch.zeros(images, device=used.device).scatter_add_(0, image_of, used.to(torch.float32))
    return used / counts.clamp(min=1)[image_of]
