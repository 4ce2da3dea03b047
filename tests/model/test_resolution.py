"""Scores and coordinates have float32 precision with bfloat16 layers, in every network, in training too.

bfloat16 has 8 bits: between a half and 1 there are 128 scores, and above 256 no odd coordinate.
"""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from random_network import KINDS_AND_MORE, patchwork, random_network, resized, spec_of
from torch import Tensor

from flawmask.model.arch import Arch
from flawmask.model.build import Detector, detector_of, for_inference, set_score_floor
from flawmask.model.layers import to_device
from flawmask.model.spec import ModelSpec, anchors_for

CPU = torch.device("cpu")
SIZE = (170, 201)


@dataclass(frozen=True)
class Case:
    """A random network that predicts something. It must not be changed."""

    spec: ModelSpec
    detector: Detector
    network: Any


@pytest.fixture(scope="module", params=KINDS_AND_MORE)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Build one network of each architecture, one after the other."""
    arch: Arch = request.param
    spec = spec_of(arch, max_detections=300)
    if spec.fixed_size is None:
        spec = replace(spec, image_size=160, anchor_sizes=anchors_for(160), proposals=300)
    yield Case(spec, detector_of(spec), lively(spec))


def lively(spec: ModelSpec) -> Any:
    model = random_network(spec)
    if hasattr(model, "bbox_embed"):  # RF-DETR's initial weights move no box
        torch.nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.01)
    return to_device(model, CPU)


def last_layers(model: Any) -> list[Any]:
    """Return the layers that output scores, boxes and masks."""
    if hasattr(model, "roi_heads"):
        heads = model.roi_heads
        masks = [heads.mask_predictor.mask_fcn_logits] if heads.has_mask() else []
        predictor = heads.box_predictor
        return [model.rpn.head.cls_logits, model.rpn.head.bbox_pred, predictor.cls_score, predictor.bbox_pred, *masks]
    if hasattr(model, "class_embed"):
        return [model.class_embed, model.bbox_embed.layers[-1], model.segmentation_head.spatial_features_proj]
    if hasattr(model, "model"):  # an ultralytics network
        head = model.model[-1]
        masks = [*(tower[-1] for tower in head.cv4), head.proto.cv3] if hasattr(head, "cv4") else []
        return [*(tower[-1] for tower in (*head.cv2, *head.cv3)), *masks]
    classes, boxes = model.head.classification_head, model.head.regression_head
    if hasattr(classes, "module_list"):
        levels = [*classes.module_list, *boxes.module_list]
        return [level[-1] if isinstance(level, torch.nn.Sequential) else level for level in levels]
    return [classes.cls_logits, boxes.bbox_reg, *([boxes.bbox_ctrness] if hasattr(boxes, "bbox_ctrness") else [])]


def share_of_fine(values: Tensor) -> float:
    """Return the share of numbers that bfloat16 cannot represent."""
    return float((values.to(torch.bfloat16).to(values.dtype) != values).float().mean())


def record_outputs(layers: list[Any], outputs: dict[int, Tensor]) -> list[Any]:
    """Record the outputs of layers by their names."""

    def noting(at: int) -> Any:
        return lambda _, __, output: outputs.update({at: output.detach()})

    return [layer.register_forward_hook(noting(at)) for at, layer in enumerate(layers)]


def test_scores_and_boxes_have_float32_precision_with_bfloat16_layers(case: Case) -> None:
    fast = for_inference(case.network, case.spec, CPU, torch.bfloat16)
    set_score_floor(fast, 0.0)
    outputs: dict[int, Tensor] = {}
    layers = last_layers(fast)
    record_outputs(layers, outputs)
    with torch.inference_mode():
        (found,) = case.detector.infer(fast, *resized(case.spec, patchwork(*SIZE, 2)))
    assert len(outputs) == len(layers)
    for at, values in outputs.items():
        assert share_of_fine(values) > 0.9, layers[at]
    scores, boxes = found["scores"], found["boxes"]
    assert len(scores) > 20
    # Without 0 and 1, to which many may be rounded.
    between = scores[(scores > 1e-6) & (scores < 1 - 1e-6)]
    assert len(set(between.tolist())) > 0.95 * len(between)
    assert len(between) > 0.5 * len(scores)
    inside = boxes[(boxes > 0) & (boxes < torch.tensor([SIZE[1], SIZE[0]] * 2))]
    assert share_of_fine(inside) > 0.7  # FCOS has some that lie where the grid does


def test_inputs_of_losses_have_float32_precision_with_bfloat16_layers(case: Case) -> None:
    model = lively(case.spec).train()
    layers = last_layers(model)
    case.detector.train_in(model, CPU, torch.bfloat16)
    outputs: dict[int, Tensor] = {}
    record_outputs(layers, outputs)
    size = case.spec.resized(*SIZE)
    image = torch.from_numpy(patchwork(*size, 2).copy()).permute(2, 0, 1)
    whole = torch.ones(50 * 40, dtype=torch.uint8)
    target = {
        "boxes": torch.tensor([[20.0, 30.0, 70.0, 70.0]]),
        "labels": torch.tensor([2]),
        "image_id": torch.tensor([1]),
        "windows": torch.tensor([[20, 30, 50, 40]]),
        "mask_pixels": whole,
    }
    with torch.no_grad():
        found = case.detector.losses(model, [image], [target], None)
    assert all(bool(torch.isfinite(loss)) for loss in found.values())
    assert len(outputs) == len(layers)
    for at, values in outputs.items():
        assert share_of_fine(values) > 0.9, layers[at]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_is_freed_with_its_last_reference(case: Case, dtype: torch.dtype) -> None:
    """Each validation makes a network. If it waited for the cyclic garbage collector, GPU memory would fill up."""
    gc.collect()
    gc.disable()
    try:
        fast = for_inference(case.network, case.spec, CPU, dtype)
        with torch.inference_mode():
            case.detector.infer(fast, *resized(case.spec, patchwork(*SIZE, 2)))
        # Ultralytics' networks share one activation, which has no tensors.
        there = [weakref.ref(one) for one in fast.modules() if [*one.parameters(recurse=False)]]
        del fast
        assert [one() for one in there if one() is not None] == []
    finally:
        gc.enable()
