"""With torchvision's weights, its detectors have torchvision's settings, predictions and losses."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from random_network import SLOW, as_tensor, patchwork, resized, spec_of, torchvision_finds, wake
from torch import Tensor, nn
from torchvision.models import detection as torchvisions
from torchvision.ops import MultiScaleRoIAlign

from flawmask.model.arch import Arch
from flawmask.model.build import Detector, build, detector_of
from flawmask.model.layers import to_device
from flawmask.model.spec import TORCHVISION_ANCHORS, ModelSpec
from flawmask.model.targets import Target

CPU = torch.device("cpu")
SIZE = 160
"""The image sizes for networks that accept any size."""

DETECTIONS: dict[Arch, int] = {
    "fasterrcnn_resnet50_fpn": 100,
    "fasterrcnn_mobilenet_v3_large_fpn": 100,
    "retinanet_resnet50_fpn": 300,
    "fcos_resnet50_fpn": 100,
    "ssd300_vgg16": 200,
    "ssdlite320_mobilenet_v3_large": 300,
}
"""torchvision's default limit of predictions per image."""

OF_ONE_STAGE = tuple(arch for arch in DETECTIONS if "rcnn" not in arch)


def marked(archs: Iterable[str]) -> list[Any]:
    """Return architectures as parameters, the slow ones for `make test-services`."""
    return [pytest.param(arch, marks=[pytest.mark.services] if arch in SLOW else []) for arch in archs]


@dataclass(frozen=True)
class Pair:
    """Flawmask's network and torchvision's, with the same weights."""

    spec: ModelSpec
    detector: Detector
    ours: Any
    theirs: Any


@pytest.fixture(scope="module", params=marked(DETECTIONS))
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Build one network of each architecture, one after the other."""
    arch = request.param
    spec = spec_of(arch, norm="batch", max_detections=DETECTIONS[arch])
    limits: dict[str, Any] = {}
    if spec.fixed_size is None:
        spec = replace(spec, image_size=SIZE, anchor_sizes=TORCHVISION_ANCHORS, proposals=1000)
        limits |= {"min_size": SIZE, "max_size": spec.max_size}
    if "mobilenet" in arch and "rcnn" in arch:
        # Flawmask keeps MobileNetV3's own epsilon and uses all region proposals.
        limits["rpn_score_thresh"] = 0.0
    torch.manual_seed(3)
    theirs = builder(arch)(weights=None, weights_backbone=None, num_classes=len(spec.classes) + 1, **limits)
    wake(theirs, spec)
    measure_statistics(theirs, arch)
    ours = build(spec)
    ours.load_state_dict(theirs.state_dict())
    if "rcnn" in arch:  # ours sums in another order, so the last digits differ
        pool = ours.roi_heads.box_roi_pool
        ours.roi_heads.box_roi_pool = MultiScaleRoIAlign(pool.featmap_names, pool.output_size, pool.sampling_ratio)
    yield Pair(spec, detector_of(spec), to_device(ours, CPU), to_device(theirs, CPU))


def builder(arch: str) -> Callable[..., Any]:
    """Return torchvision's function of that name."""
    function: Callable[..., Any] = getattr(torchvisions, arch)
    return function


def measure_statistics(model: Any, arch: str) -> None:
    """Set each norm's statistics from an image, as in a trained network. Otherwise the signal would vanish."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.eps = 0.001 if "mobilenet" in arch else norm.eps
        norm.momentum = 1.0
    side = 320 if arch.startswith("ssd") else SIZE
    if norms:
        with torch.no_grad():
            images = [model.transform.normalize(as_tensor(patchwork(side, side, seed))) for seed in (7, 8)]
            model.train().backbone(torch.stack(images))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@pytest.mark.parametrize("size", [(75, 91), (160, 120)])
def test_predictions_equal_torchvisions(pair: Pair, size: tuple[int, int]) -> None:
    pixels = patchwork(*size, 1)
    with torch.inference_mode():
        (found,) = pair.detector.infer(pair.ours.eval(), *resized(pair.spec, pixels))
    expected = torchvision_finds(pair.theirs, pair.spec, pixels)
    known = expected["labels"] > 0  # no class of the data set has label 0
    assert known.sum() > 20
    assert torch.equal(found["labels"], expected["labels"][known])
    torch.testing.assert_close(found["scores"], expected["scores"][known], atol=1e-6, rtol=0)
    torch.testing.assert_close(found["boxes"], expected["boxes"][known], atol=1e-4, rtol=0)
    spread = expected["scores"].max() - expected["scores"].min()
    assert spread > 100 * 1e-6, "all the same score would compare nothing"


def targets_for(shapes: list[tuple[int, int]]) -> list[Target]:
    """Return the targets of an image with two instances and of one without any."""
    boxes = [torch.tensor([[20.0, 30.0, 90.0, 110.0], [60.0, 10.0, 150.0, 80.0]]), torch.zeros(0, 4)]
    labels = [torch.tensor([3, 2]), torch.zeros(0, dtype=torch.int64)]
    return [
        {"boxes": one, "labels": label, "image_id": torch.tensor([at])}
        for at, (one, label, _) in enumerate(zip(boxes, labels, shapes, strict=True))
    ]


@pytest.mark.parametrize("pair", marked(OF_ONE_STAGE), indirect=True)
def test_losses_equal_torchvisions(pair: Pair) -> None:
    side = pair.spec.fixed_size
    shapes = [(side, side), (side, side)] if side else [(SIZE, SIZE + 16), (SIZE, SIZE)]
    images = [(as_tensor(patchwork(*shape, at)) * 255).byte() for at, shape in enumerate(shapes)]
    targets = targets_for(shapes)
    with torch.no_grad():
        found = pair.detector.losses(pair.ours.train(), images, targets, None)
        # torchvision changes its inputs.
        given = [{name: one[name].clone() for name in ("boxes", "labels")} for one in targets]
        expected: dict[str, Tensor] = pair.theirs.train()([image / 255 for image in images], given)
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert float(loss) == pytest.approx(float(expected[name]), rel=1e-5), name
        assert float(loss) > 0


@pytest.mark.parametrize("arch", OF_ONE_STAGE)
def test_all_other_settings_equal_torchvisions(arch: Arch) -> None:
    with torch.device("meta"):
        ours = build(ModelSpec(arch, ("good", "crack"), norm="batch", max_detections=DETECTIONS[arch]))
        theirs = builder(arch)(weights=None, weights_backbone=None, num_classes=3)
    for name in ("min_size", "max_size", "image_mean", "image_std", "size_divisible", "fixed_size"):
        assert getattr(ours.transform, name) == getattr(theirs.transform, name), name
    names = [name for name in vars(theirs) if isinstance(vars(theirs)[name], int | float)]
    assert {"score_thresh", "nms_thresh", "detections_per_img", "topk_candidates"} <= set(names)
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    shapes = [{name: one.shape for name, one in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    norms = [
        [(one.eps, one.momentum) for one in model.modules() if isinstance(one, nn.BatchNorm2d)]
        for model in (ours, theirs)
    ]
    assert norms[0] == norms[1]
