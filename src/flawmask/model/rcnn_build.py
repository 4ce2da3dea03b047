"""Builds Mask R-CNN (He et al., ICCV 2017) and Faster R-CNN (Ren et al., NeurIPS 2015)."""

from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN

from flawmask.good_names import GOOD
from flawmask.model.layers import Float32Anchors, replace_norms, skip_resize
from flawmask.model.roi_align import PyramidRoIAlign
from flawmask.model.semantic import SemanticHead
from flawmask.model.spec import ModelSpec


def build(spec: ModelSpec) -> FasterRCNN:
    """Return the network that the spec describes, with random weights."""
    limits: dict[str, Any] = {
        "min_size": spec.image_size,
        "max_size": spec.max_size,
        "box_detections_per_img": spec.max_detections,
        "rpn_pre_nms_top_n_train": 2 * spec.proposals,
        "rpn_post_nms_top_n_train": 2 * spec.proposals,
        "rpn_pre_nms_top_n_test": spec.proposals,
        "rpn_post_nms_top_n_test": spec.proposals,
    }
    model: FasterRCNN = spec.architecture.network(len(spec.classes) + 1, limits)
    ratios = model.rpn.anchor_generator.aspect_ratios
    model.rpn.anchor_generator = Float32Anchors(_anchors_per_level(spec.anchor_sizes, levels=len(ratios)), ratios)
    for name in ("box_roi_pool", "mask_roi_pool") if spec.has_masks else ("box_roi_pool",):
        pool = getattr(model.roi_heads, name)
        setattr(model.roi_heads, name, PyramidRoIAlign(pool.featmap_names, list(pool.output_size), pool.sampling_ratio))
    if spec.semantic_head:
        defects = [label for label, name in enumerate(spec.classes, start=1) if name != GOOD]
        model.semantic_head = SemanticHead(model.backbone.out_channels, defects)
    replace_norms(model, spec.norm, spec.norm_eps)
    skip_resize(model)
    return model


def _anchors_per_level(sizes: tuple[int, ...], levels: int) -> tuple[tuple[int, ...], ...]:
    """Return the anchor sizes of each pyramid level: one per level. If there are fewer levels than sizes, each level
    gets all sizes, as in torchvision."""
    return tuple((size,) for size in sizes) if levels == len(sizes) else (sizes,) * levels


def stages(model: Any) -> list[list[nn.Module]]:
    """Return the five stages of the backbone, the one nearest to the image first, each as a list of modules."""
    children = dict(model.backbone.body.named_children())
    if "layer1" in children:
        return [[children["conv1"], children["bn1"]], *([children[f"layer{number}"]] for number in range(1, 5))]
    # MobileNetV3: a stage begins at each block that halves the resolution. Such a block has `_is_cn` set.
    blocks = list(children.values())
    starts = [0, *(place for place, block in enumerate(blocks) if getattr(block, "_is_cn", False))]
    return [blocks[start:end] for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True)]
