"""The architectures: heads, norms, frozen stages, anchors, and torchvision's own settings at 800 pixels."""

from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.ops import FrozenBatchNorm2d

from flawmask.errors import FlawmaskError
from flawmask.model.arch import Arch
from flawmask.model.build import ModelSpec, Norm, anchors_for, build, count_parameters, freeze, to_device

ARCHITECTURES: tuple[Arch, ...] = get_args(Arch)
CLASSES = ("good", "crack", "scratch")


@cache
def network(arch: Arch, norm: Norm = "frozen", image_size: int = 800) -> Any:
    """One network for all tests that only look at it."""
    return build(ModelSpec(arch, CLASSES, image_size=image_size, norm=norm, anchor_sizes=anchors_for(image_size)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_both_heads_have_an_output_for_each_class_and_the_background(arch: Arch) -> None:
    heads = network(arch).roi_heads
    assert heads.box_predictor.cls_score.out_features == len(CLASSES) + 1
    assert heads.box_predictor.bbox_pred.out_features == 4 * (len(CLASSES) + 1)
    assert heads.mask_predictor.mask_fcn_logits.out_channels == len(CLASSES) + 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_answers_in_the_classes_it_was_given(arch: Arch) -> None:
    torch.manual_seed(0)
    spec = ModelSpec(arch, CLASSES, image_size=64, norm="group", anchor_sizes=anchors_for(64), proposals=20)
    model = build(spec).eval()
    with torch.inference_mode():
        (found,) = model([torch.rand(3, 70, 90)])
    assert len(found["labels"])
    assert set(found["labels"].tolist()) <= {1, 2, 3}
    assert found["masks"].shape[1:] == (1, 70, 90)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("norm", "kind"), [("frozen", FrozenBatchNorm2d), ("group", nn.GroupNorm)])
def test_norms_are_replaced_everywhere(arch: Arch, norm: Norm, kind: type[nn.Module]) -> None:
    modules = list(network(arch, norm).modules())
    replaced = [one for one in modules if isinstance(one, kind)]
    left = [one for one in network(arch, "batch").modules() if isinstance(one, nn.BatchNorm2d)]
    assert len(replaced) == len(left) > 0
    assert not any(isinstance(one, nn.BatchNorm2d) for one in modules)


def test_frozen_norms_keep_the_epsilon_of_the_architecture_unless_another_is_given() -> None:
    def epsilons(spec: ModelSpec) -> set[float]:
        return {one.eps for one in build(spec).backbone.body.modules() if isinstance(one, FrozenBatchNorm2d)}

    assert epsilons(ModelSpec("maskrcnn_mobilenet_v3_large_fpn", CLASSES)) == {0.001}
    assert epsilons(ModelSpec("maskrcnn_resnet18_fpn", CLASSES)) == {1e-5}
    assert epsilons(ModelSpec("maskrcnn_resnet18_fpn", CLASSES, norm_eps=0.0)) == {0.0}


RESNET_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
MOBILENET_STAGES = (
    ("0", "1"),
    ("2", "3"),
    ("4", "5", "6"),
    ("7", "8", "9", "10", "11", "12"),
    ("13", "14", "15", "16"),
)
STAGES: dict[Arch, tuple[tuple[str, ...], ...]] = {
    "maskrcnn_resnet50_fpn": RESNET_STAGES,
    "maskrcnn_resnet50_fpn_v2": RESNET_STAGES,
    "maskrcnn_resnet18_fpn": RESNET_STAGES,
    "maskrcnn_mobilenet_v3_large_fpn": MOBILENET_STAGES,
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("trainable", range(6))
def test_freezing_leaves_the_stages_nearest_the_heads_and_all_outside_the_body(arch: Arch, trainable: int) -> None:
    model = network(arch, "group")
    model.requires_grad_(True)
    freeze(model, trainable)
    names = {name for name, one in model.named_parameters() if not one.requires_grad}
    frozen = [layer for stage in STAGES[arch][: 5 - trainable] for layer in stage]
    expected = {
        name for name, _ in model.named_parameters() if name.startswith(tuple(f"backbone.body.{at}." for at in frozen))
    }
    assert names == expected
    assert bool(expected) == (trainable < 5)
    model.requires_grad_(True)


def test_the_numbers_to_learn_are_those_that_are_not_frozen() -> None:
    model = network("maskrcnn_resnet18_fpn", "group")
    everything = sum(one.numel() for one in model.parameters())
    assert count_parameters(model) == everything
    freeze(model, 0)
    assert count_parameters(model) == everything - sum(one.numel() for one in model.backbone.body.parameters())
    model.requires_grad_(True)


@pytest.mark.parametrize(
    ("size", "anchors"),
    [
        (800, (32, 64, 128, 256, 512)),
        (400, (16, 32, 64, 128, 256)),
        (192, (8, 15, 31, 61, 123)),
        (64, (4, 5, 10, 20, 41)),
    ],
)
def test_anchors_shrink_with_the_image_and_never_vanish(size: int, anchors: tuple[int, ...]) -> None:
    assert anchors_for(size) == anchors
    model = network("maskrcnn_resnet18_fpn", image_size=size)
    assert model.rpn.anchor_generator.sizes == tuple((one,) for one in anchors)
    for size_, cells in zip(anchors, model.rpn.anchor_generator.cell_anchors, strict=True):
        sides = (cells[:, 2:] - cells[:, :2]).prod(dim=1).sqrt()  # rounded to whole pixels, hence the tolerance
        assert torch.allclose(sides, torch.full_like(sides, size_), atol=1.0)


def test_an_architecture_with_fewer_levels_has_all_anchors_on_each() -> None:
    generator = network("maskrcnn_mobilenet_v3_large_fpn", image_size=400).rpn.anchor_generator
    assert generator.sizes == (anchors_for(400),) * 3
    assert [len(cells) for cells in generator.cell_anchors] == [15, 15, 15]


@pytest.mark.parametrize(
    ("arch", "original"),
    [("maskrcnn_resnet50_fpn", maskrcnn_resnet50_fpn), ("maskrcnn_resnet50_fpn_v2", maskrcnn_resnet50_fpn_v2)],
)
def test_at_800_pixels_every_setting_is_torchvisions_own(arch: Arch, original: Any) -> None:
    ours = build(ModelSpec(arch, CLASSES, norm="batch"))
    theirs = original(weights=None, weights_backbone=None, num_classes=len(CLASSES) + 1)
    assert tuple(ours.transform.min_size) == tuple(theirs.transform.min_size) == (800,)
    assert ours.transform.max_size == theirs.transform.max_size == 1333
    for name in ("image_mean", "image_std", "size_divisible", "fixed_size"):
        assert getattr(ours.transform, name) == getattr(theirs.transform, name)
    for name in ("_pre_nms_top_n", "_post_nms_top_n", "nms_thresh", "score_thresh", "min_size"):
        assert getattr(ours.rpn, name) == getattr(theirs.rpn, name), name
    for name in ("score_thresh", "nms_thresh", "detections_per_img"):
        assert getattr(ours.roi_heads, name) == getattr(theirs.roi_heads, name), name
    for part, names in (
        ("rpn.fg_bg_sampler", ("batch_size_per_image", "positive_fraction")),
        ("rpn.proposal_matcher", ("high_threshold", "low_threshold", "allow_low_quality_matches")),
        ("roi_heads.fg_bg_sampler", ("batch_size_per_image", "positive_fraction")),
        ("roi_heads.proposal_matcher", ("high_threshold", "low_threshold", "allow_low_quality_matches")),
        ("roi_heads.box_coder", ("weights", "bbox_xform_clip")),
        ("roi_heads.box_roi_pool", ("output_size", "sampling_ratio", "featmap_names")),
        ("roi_heads.mask_roi_pool", ("output_size", "sampling_ratio", "featmap_names")),
    ):
        one, other = (_follow(model, part) for model in (ours, theirs))
        assert {name: getattr(one, name) for name in names} == {name: getattr(other, name) for name in names}, part
    assert ours.rpn.anchor_generator.sizes == theirs.rpn.anchor_generator.sizes
    assert ours.rpn.anchor_generator.aspect_ratios == theirs.rpn.anchor_generator.aspect_ratios
    cells = zip(ours.rpn.anchor_generator.cell_anchors, theirs.rpn.anchor_generator.cell_anchors, strict=True)
    assert all(torch.equal(one, other) for one, other in cells)
    shapes = [{name: one.shape for name, one in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def _follow(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
    return model


@pytest.mark.parametrize(("size", "longest"), [(800, 1333), (400, 666), (96, 160)])
def test_the_longer_side_may_have_torchvisions_share_more(size: int, longest: int) -> None:
    assert ModelSpec("maskrcnn_resnet18_fpn", CLASSES, image_size=size).max_size == longest


def test_limits_reach_the_network() -> None:
    model = build(ModelSpec("maskrcnn_resnet18_fpn", CLASSES, max_detections=7, proposals=30))
    assert model.roi_heads.detections_per_img == 7
    model.eval()
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()) == (30, 30)
    model.train()
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()) == (60, 60)


@pytest.mark.parametrize(
    "wrong",
    [{"arch": "yolo"}, {"norm": "layer"}, {"classes": ()}, {"anchor_sizes": (1, 2, 3)}],
)
def test_a_spec_that_describes_no_network_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FlawmaskError):
        ModelSpec(**{"arch": "maskrcnn_resnet18_fpn", "classes": CLASSES, **wrong})


def test_convolutions_are_laid_out_channels_last_on_the_device() -> None:
    model = to_device(build(ModelSpec("maskrcnn_resnet18_fpn", CLASSES)), torch.device("cpu"))
    assert model.backbone.body.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
