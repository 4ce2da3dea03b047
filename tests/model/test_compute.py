"""Folded norms and lower precision change how fast a network is, not what it computes."""

import copy
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from random_network import REGIONS, SPEC, network, patchwork, resized
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from flawmask.coco import annotation
from flawmask.model import rcnn
from flawmask.model.arch import Arch
from flawmask.model.build import build, for_inference
from flawmask.model.layers import to_device
from flawmask.model.rcnn import train_in
from flawmask.model.rcnn_losses import losses
from flawmask.model.spec import ModelSpec, Norm, anchors_for
from flawmask.model.targets import Target, make_target

CPU = torch.device("cpu")


def lively(spec: ModelSpec, seed: int = 0) -> Any:
    """Return a random network whose norms shift and scale, like those of a trained one."""
    torch.manual_seed(seed)
    model = build(spec)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.7, 1.3)  # type: ignore[union-attr]
    return model


def one_defect(height: int, width: int, y: int, x: int, high: int, wide: int) -> Target:
    mask: npt.NDArray[np.bool_] = np.zeros((height, width), dtype=bool)
    mask[y : y + high, x : x + wide] = True
    record: dict[str, Any] = annotation(mask, id=1, image_id=1, category_id=2)
    return make_target([record], {2: 2}, 1, (height, width), (height, width), "an image")


def learned(model: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the losses of an image, and the gradients."""
    image = torch.from_numpy(patchwork(64, 80, 3).copy()).permute(2, 0, 1)
    torch.manual_seed(5)
    found = losses(model, [image], [one_defect(64, 80, 20, 10, 25, 30)], 16)
    torch.autograd.backward(list(found.values()))
    grown = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {name: float(one.detach()) for name, one in found.items()}, grown


@pytest.mark.parametrize("arch", ["maskrcnn_resnet18_fpn", "maskrcnn_mobilenet_v3_large_fpn"])
def test_frozen_norms_folded_away_give_the_same_losses_and_gradients(arch: Arch) -> None:
    plain = lively(replace(SPEC, arch=arch, norm="frozen", norm_eps=0.01)).train()
    folded = copy.deepcopy(plain)
    train_in(folded, CPU, torch.float32)
    expected, wanted = learned(plain)
    found, ours = learned(folded)
    assert found == pytest.approx(expected, rel=1e-3)
    assert ours.keys() == wanted.keys()
    longest = max(float(one.abs().max()) for one in wanted.values())
    for name, one in ours.items():
        torch.testing.assert_close(one, wanted[name], atol=1e-4 * longest, rtol=1e-2, msg=name)
    norms = [one for one in folded.modules() if isinstance(one, FrozenBatchNorm2d)]
    image = torch.rand(2, 999, 3, 3)
    assert all(one(image) is image for one in norms), "a norm is still computed"
    assert folded.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(one, plain.state_dict()[name]) for name, one in folded.state_dict().items())


def test_batch_norm_that_learns_still_uses_and_updates_batch_statistics() -> None:
    plain = lively(replace(SPEC, norm="batch")).train()
    ours = copy.deepcopy(plain)
    train_in(ours, CPU, torch.float32)
    assert learned(ours)[0] == learned(plain)[0]
    for name, one in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], one), name
    assert int(ours.backbone.body.bn1.num_batches_tracked) == 1


def test_a_defect_of_one_pixel_keeps_its_box_while_the_layers_train_in_bfloat16() -> None:
    spec = ModelSpec("maskrcnn_resnet18_fpn", ("good", "defect"), image_size=300, norm="group", proposals=20)
    torch.manual_seed(0)
    model: Any = build(spec).train()
    train_in(model, CPU, torch.bfloat16)
    inside: list[torch.dtype] = []
    model.roi_heads.box_head.fc6.register_forward_hook(lambda _, __, output: inside.append(output.dtype))
    # In bfloat16 both edges would be 284. The width would be 0 and the regression target not finite.
    target = one_defect(300, 300, 31, 284, 1, 1)
    assert target["boxes"].tolist() == [[284, 31, 285, 32]]
    found = losses(model, [torch.randint(0, 256, (3, 300, 300), dtype=torch.uint8)], [target], None)
    assert inside == [torch.bfloat16]
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in found.values()), found


@pytest.mark.parametrize("norm", get_args(Norm))
def test_layers_compute_in_bfloat16_and_boxes_and_scores_in_float32(norm: Norm) -> None:
    model = lively(replace(SPEC, norm=norm)).train()
    train_in(to_device(model, CPU), CPU, torch.bfloat16)
    input_types: dict[str, torch.dtype] = {}
    heads = model.roi_heads
    watched = {
        "body": model.backbone.body.layer1[0].conv1,
        "rpn": model.rpn.head.cls_logits,
        "fc": heads.box_head.fc7,
        "mask": heads.mask_head[0][0],
        "score": heads.box_predictor.cls_score,
        "box": heads.box_predictor.bbox_pred,
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda _, __, output, name=name: input_types.update({name: output.dtype}))
    output_types = {}
    for name, module in {"rpn": model.rpn.head, "masks": heads.mask_predictor}.items():
        module.register_forward_hook(
            lambda _, __, output, name=name: output_types.update(
                {name: {one.dtype for one in ([output] if isinstance(output, Tensor) else output[0] + output[1])}}
            )
        )
    found, grown = learned(model)
    low, full = torch.bfloat16, torch.float32
    assert input_types == {"body": low, "rpn": full, "fc": low, "mask": low, "score": full, "box": full}
    assert output_types == {"rpn": {full}, "masks": {full}}
    assert {one.dtype for one in grown.values()} == {full}
    exact = copy.deepcopy(lively(replace(SPEC, norm=norm))).train()
    assert found == pytest.approx(learned(exact)[0], rel=0.2, abs=0.03)


def test_an_interrupt_within_a_pass_leaves_autocast_off() -> None:
    """Otherwise the next cells of a notebook would compute in bfloat16, with weights that were cast before."""
    model = lively(SPEC).train()
    train_in(to_device(model, CPU), CPU, torch.bfloat16)

    def interrupt(*_: Any) -> None:
        assert torch.is_autocast_enabled("cpu")
        raise KeyboardInterrupt

    hook = model.backbone.body.layer2.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        learned(model)
    assert not torch.is_autocast_enabled("cpu")
    hook.remove()
    again = learned(model)[0]
    fresh = lively(SPEC).train()
    train_in(to_device(fresh, CPU), CPU, torch.bfloat16)
    assert again == learned(fresh)[0]


def detections(model: Any, image: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        (found,) = model([image])
    return dict(found.items())


# Every architecture with one norm, and every norm for two: one has norms in the body only, the other in the heads too.
@pytest.mark.parametrize(
    ("arch", "norm"),
    [
        *((arch, "frozen") for arch in REGIONS),
        *(
            (arch, norm)
            for arch in ("maskrcnn_resnet18_fpn", "maskrcnn_resnet50_fpn_v2")
            for norm in ("batch", "group")
        ),
        ("maskrcnn_mobilenet_v3_large_fpn", "batch"),
    ],
)
def test_the_network_for_inference_predicts_the_same_and_shares_no_memory(arch: Arch, norm: Norm) -> None:
    spec = replace(SPEC, arch=arch, norm=norm, proposals=20)
    model = lively(spec, seed=2).eval()
    with torch.no_grad():  # low scores everywhere, so that many instances are predicted
        model.roi_heads.box_predictor.cls_score.weight *= 0.01
    before = {name: one.clone() for name, one in model.state_dict().items()}
    image = torch.from_numpy(patchwork(64, 80, 1).copy()).permute(2, 0, 1) / 255
    fast = for_inference(model, spec, CPU, torch.float32)
    expected, found = detections(model, image), detections(fast, image)
    assert len(expected["scores"]) > 0
    torch.testing.assert_close(found["scores"], expected["scores"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found["boxes"], expected["boxes"], atol=1e-2, rtol=0)
    assert torch.equal(found["labels"], expected["labels"])
    assert found.keys() == expected.keys()
    if spec.has_masks:
        torch.testing.assert_close(found["masks"], expected["masks"], atol=5e-3, rtol=0)

    assert not fast.training
    assert not any(one.requires_grad for one in fast.parameters())
    memory = {one.data_ptr() for one in [*model.parameters(), *model.buffers()] if one.numel()}
    assert not memory & {one.data_ptr() for one in [*fast.parameters(), *fast.buffers()] if one.numel()}
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    again = detections(model, image)
    assert all(torch.equal(again[name], one) for name, one in expected.items())


def test_a_copy_for_inference_does_not_stop_training() -> None:
    spec = replace(SPEC, norm="frozen", proposals=20)
    model = lively(spec, seed=2).train()
    plain = copy.deepcopy(model).eval()
    train_in(to_device(model, CPU), CPU, torch.float32)
    image = torch.from_numpy(patchwork(64, 80, 1).copy()).permute(2, 0, 1) / 255
    expected, found = detections(plain, image), detections(for_inference(model, spec, CPU, torch.float32), image)
    torch.testing.assert_close(found["scores"], expected["scores"], atol=1e-4, rtol=0)
    assert model.training
    assert all(one.requires_grad for one in model.backbone.fpn.parameters())


def test_scores_are_float32_without_ties_in_bfloat16() -> None:
    spec = replace(SPEC, max_detections=100, proposals=200)
    model = network(spec)
    fast = for_inference(model, spec, CPU, torch.bfloat16)
    inside: list[torch.dtype] = []
    fast.roi_heads.box_head.fc7.register_forward_hook(lambda _, __, output: inside.append(output.dtype))
    scores: list[Tensor] = []
    for seed in range(4):
        found = detections(fast, torch.from_numpy(patchwork(64, 80, seed).copy()).permute(2, 0, 1) / 255)
        assert (found["scores"].dtype, found["boxes"].dtype, found["masks"].dtype) == (torch.float32,) * 3
        scores.append(found["scores"])
    assert set(inside) == {torch.bfloat16}
    together = torch.cat(scores)
    high = together[together > 0.5]
    assert len(high) > 20
    assert len(set(high.tolist())) > 0.9 * len(high)
    assert float((high.bfloat16().float() != high).float().mean()) > 0.9


def test_anchors_are_float32_whatever_the_features_are() -> None:
    spec = replace(SPEC, image_size=300, anchor_sizes=anchors_for(300))
    fast = for_inference(build(spec), spec, CPU, torch.bfloat16)
    made: list[Tensor] = []
    fast.rpn.anchor_generator.register_forward_hook(lambda _, __, output: made.extend(output))
    detections(fast, torch.rand(3, 300, 300))
    assert made[0].dtype == torch.float32
    assert len(set(made[0][:, 0].tolist())) > 200


def test_region_counts_on_a_gpu_are_padded_to_few_different_numbers() -> None:
    found = [rcnn.whole_blocks(count) for count in range(5000)]
    assert all(count <= more < count + max(32, count / 8) for count, more in enumerate(found) if count)
    assert found[0] == 0
    assert all(more % 32 == 0 for more in found)
    assert len({more for more in found if 1024 < more <= 2048}) == 8


def test_padding_with_zero_regions_does_not_change_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = resized(SPEC, patchwork(60, 90, 1), patchwork(60, 90, 2))
    with torch.inference_mode():
        expected = rcnn.infer(network(), *inputs)
        monkeypatch.setattr(rcnn, "in_blocks", lambda pooled: rcnn.padded_to(pooled, rcnn.whole_blocks(len(pooled))))
        found = rcnn.infer(network(), *inputs)
    assert sum(len(one["scores"]) for one in expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], atol=1e-4, rtol=0)


def test_no_region_is_padded_on_a_cpu() -> None:
    pooled = torch.rand(5, 4, 7, 7)
    assert rcnn.in_blocks(pooled) is pooled
