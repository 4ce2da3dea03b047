"""The architectures: heads, norms, frozen stages, anchors, and torchvision's own settings at 800 pixels."""

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from random_network import ARCHITECTURES, BUILDABLE, MASK_REGIONS, REGIONS, patchwork, resized, spec_of
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.ops import FrozenBatchNorm2d

from flawmask.errors import FlawmaskError
from flawmask.model.arch import Arch
from flawmask.model.build import build, detector_of, freeze, set_score_floor
from flawmask.model.layers import count_parameters, to_device
from flawmask.model.spec import ModelSpec, Norm, anchors_for

CLASSES = ("good", "crack", "scratch")


@cache
def network(arch: Arch, norm: Norm = "frozen", image_size: int = 800) -> Any:
    """Return a cached network for tests that do not change it."""
    return build(ModelSpec(arch, CLASSES, image_size=image_size, norm=norm, anchor_sizes=anchors_for(image_size)))


@cache
def outline(arch: Arch, norm: Norm = "frozen") -> Any:
    """Return a network on the meta device if its kind can be built there: its layers are enough for these tests."""
    spec = ModelSpec(arch, CLASSES, norm=norm)
    if arch.startswith(("yolo", "rfdetr")):
        return build(spec)
    with torch.device("meta"):
        return build(spec)


@pytest.mark.parametrize("arch", REGIONS)
def test_both_heads_have_an_output_for_each_class_and_the_background(arch: Arch) -> None:
    heads = outline(arch).roi_heads
    assert heads.box_predictor.cls_score.out_features == len(CLASSES) + 1
    assert heads.box_predictor.bbox_pred.out_features == 4 * (len(CLASSES) + 1)
    assert heads.has_mask() == (arch in MASK_REGIONS)
    if heads.has_mask():
        assert heads.mask_predictor.mask_fcn_logits.out_channels == len(CLASSES) + 1


def test_one_stage_heads_score_each_class_and_torchvisions_also_the_background() -> None:
    outputs = len(CLASSES) + 1
    assert outline("retinanet_resnet50_fpn").head.classification_head.cls_logits.out_channels == 9 * outputs
    assert outline("fcos_resnet50_fpn").head.classification_head.cls_logits.out_channels == outputs
    for arch, boxes in (("ssd300_vgg16", (4, 6, 6, 6, 4, 4)), ("ssdlite320_mobilenet_v3_large", (6,) * 6)):
        heads = outline(arch).head.classification_head.module_list
        found = [[one.out_channels for one in head.modules() if isinstance(one, nn.Conv2d)][-1] for head in heads]
        assert found == [count * outputs for count in boxes]
    for arch in ("yolo11n", "yolo11n-seg"):
        assert [head[-1].out_channels for head in outline(arch).model[-1].cv3] == [len(CLASSES)] * 3


@pytest.mark.parametrize("arch", BUILDABLE)
def test_every_architecture_predicts_the_given_classes(arch: Arch) -> None:
    spec = spec_of(arch, proposals=20)
    torch.manual_seed(0)
    detector, model = detector_of(spec), build(spec).eval()
    set_score_floor(model, 0.0)
    with torch.inference_mode():
        (found,) = detector.infer(model, *resized(spec, patchwork(70, 90)))
    assert 0 < len(found["labels"]) <= spec.max_detections
    assert set(found["labels"].tolist()) <= {1, 2, 3}
    optional = {"masks": spec.has_masks, "maps": spec.semantic_head}
    assert found.keys() == {"boxes", "labels", "scores"} | {name for name, is_there in optional.items() if is_there}
    if spec.has_masks:
        assert found["masks"].shape == (len(found["labels"]), 1, 28, 28)


@pytest.mark.parametrize("arch", BUILDABLE)
@pytest.mark.parametrize(("norm", "kind"), [("frozen", FrozenBatchNorm2d), ("group", nn.GroupNorm)])
def test_norms_are_replaced_everywhere(arch: Arch, norm: Norm, kind: type[nn.Module]) -> None:
    modules = list(outline(arch, norm).modules())
    replaced = [one for one in modules if isinstance(one, kind)]
    there_before = [one for one in outline(arch, "batch").modules() if isinstance(one, kind)]
    left = [one for one in outline(arch, "batch").modules() if isinstance(one, nn.BatchNorm2d)]
    assert len(replaced) - len(there_before) == len(left)
    assert (len(left) == 0) == (arch == "ssd300_vgg16" or arch.startswith("rfdetr"))
    assert not any(isinstance(one, nn.BatchNorm2d) for one in modules)


def test_frozen_norms_keep_the_architectures_epsilon_by_default() -> None:
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
"""The layers of each stage, by their places in the body."""
VGG_STAGES = (range(4), range(4, 9), range(9, 16), range(16, 23))
SSDLITE_STAGES = (range(2), range(2, 4), range(4, 7), range(7, 14))
YOLO_STAGES = (range(1), range(1, 3), range(3, 5), range(5, 7), range(7, 11))


def stages_of(arch: Arch) -> list[list[str]]:
    """Return the prefixes of the parameters' names in each stage of the backbone."""
    if arch == "ssd300_vgg16":
        return [*([f"backbone.features.{at}." for at in stage] for stage in VGG_STAGES), ["backbone.extra.0."]]
    if arch.startswith("ssdlite"):
        return [*([f"backbone.features.0.{at}." for at in stage] for stage in SSDLITE_STAGES), ["backbone.features.1."]]
    if arch.startswith("yolo"):
        return [[f"model.{at}." for at in stage] for stage in YOLO_STAGES]
    if arch.startswith("rfdetr"):
        encoder = "backbone.0.encoder.encoder."
        layers = [[f"{encoder}encoder.layer.{at}." for at in range(start, start + 3)] for start in range(0, 12, 3)]
        return [[f"{encoder}embeddings."], *layers[:3], [*layers[3], f"{encoder}layernorm."]]
    if "efficientnet" in arch:
        starts = [0, 2, 4, 6, 12, 17] if "lite0" in arch else [0, 2, 5, 8, 16, 22]
        return [[f"backbone.body.{at}." for at in range(start, end)] for start, end in pairwise(starts)]
    of_body = MOBILENET_STAGES if "mobilenet" in arch else RESNET_STAGES
    return [[f"backbone.body.{name}." for name in stage] for stage in of_body]


@pytest.mark.parametrize("arch", BUILDABLE)
@pytest.mark.parametrize("trainable", range(6))
def test_freezing_spares_the_stages_nearest_the_heads_and_all_layers_outside_the_body(
    arch: Arch, trainable: int
) -> None:
    model = outline(arch, "group")
    before = {name for name, one in model.named_parameters() if one.requires_grad}
    try:
        freeze(model, ModelSpec(arch, CLASSES), trainable)
        after = {name for name, one in model.named_parameters() if one.requires_grad}
    finally:
        for name, one in model.named_parameters():
            one.requires_grad_(name in before)
    frozen = [start for stage in stages_of(arch)[: 5 - trainable] for start in stage]
    assert len(stages_of(arch)) == 5
    assert before - after == {name for name in before if name.startswith(tuple(frozen))}
    assert (before == after) == (trainable == 5)
    assert after <= before


def test_parameters_that_are_not_frozen_are_counted() -> None:
    model = network("maskrcnn_resnet18_fpn", "group")
    everything = sum(one.numel() for one in model.parameters())
    assert count_parameters(model) == everything
    freeze(model, ModelSpec("maskrcnn_resnet18_fpn", CLASSES), 0)
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
    [
        ("maskrcnn_resnet50_fpn", maskrcnn_resnet50_fpn),
        ("maskrcnn_resnet50_fpn_v2", maskrcnn_resnet50_fpn_v2),
        ("fasterrcnn_resnet50_fpn", fasterrcnn_resnet50_fpn),
    ],
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
        *(
            [("roi_heads.mask_roi_pool", ("output_size", "sampling_ratio", "featmap_names"))]
            if arch in MASK_REGIONS
            else []
        ),
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
def test_the_longer_side_is_limited_in_torchvisions_proportion(size: int, longest: int) -> None:
    assert ModelSpec("maskrcnn_resnet18_fpn", CLASSES, image_size=size).max_size == longest


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch.startswith(("retina", "fcos", "ssd"))])
def test_max_detections_reaches_a_one_stage_network(arch: Arch) -> None:
    with torch.device("meta"):
        assert build(ModelSpec(arch, CLASSES, max_detections=7)).detections_per_img == 7


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


def test_an_unknown_architecture_is_refused_with_a_list_of_the_known_ones() -> None:
    with pytest.raises(FlawmaskError, match="there is no architecture yolo99: there are ") as caught:
        ModelSpec("yolo99", CLASSES)  # type: ignore[arg-type]
    assert all(arch in str(caught.value) for arch in ARCHITECTURES)


def test_convolutions_are_laid_out_channels_last_on_the_device() -> None:
    model = to_device(build(ModelSpec("maskrcnn_resnet18_fpn", CLASSES)), torch.device("cpu"))
    assert model.backbone.body.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
