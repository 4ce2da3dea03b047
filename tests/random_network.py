"""A small random network that is sure of some of what it sees, and something for it to look at."""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flawmask.model.build import ModelSpec, anchors_for, build

SPEC = ModelSpec(
    "maskrcnn_resnet18_fpn",
    ("good", "crack", "scratch"),
    image_size=64,
    norm="group",
    anchor_sizes=anchors_for(64),
    max_detections=20,
    proposals=50,
)


@cache
def network(spec: ModelSpec = SPEC) -> Any:
    """A random network that finds defects of all scores and is sure of some; nobody may change it."""
    torch.manual_seed(4)
    model = build(spec).eval()
    with torch.no_grad():
        model.rpn.head.bbox_pred.weight *= 10
        model.roi_heads.box_predictor.bbox_pred.weight *= 10
        model.roi_heads.mask_predictor.mask_fcn_logits.weight *= 3
        scores = model.roi_heads.box_predictor.cls_score.weight
        scores *= 10
        if len(spec.classes) > 2:  # background and good stand back
            scores[0], scores[1] = scores[1:].mean(dim=0), scores[2:].mean(dim=0)
    return model


def patchwork(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A patchwork, since a network sees but one grey in fine noise."""
    patches = np.random.default_rng(seed).integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return patches.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
