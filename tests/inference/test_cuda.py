"""A network has the same outputs on a GPU and on a CPU."""

from typing import Any

import pytest
import torch
from random_network import BUILDABLE, SPEC, infer, patchwork, random_network, spec_of, tensors_of
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

from flawmask.model.arch import Arch
from flawmask.model.build import for_inference, set_score_floor
from flawmask.model.spec import ModelSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")

Detections = dict[str, Tensor]

SIZES = [(60, 80), (120, 160), (64, 90)]
"""Padded to one size."""


def both(spec: ModelSpec) -> tuple[Any, Any]:
    """A random network for inference in float32, on the CPU and on the GPU."""
    model = random_network(spec)
    places = (torch.device(name) for name in ("cpu", "cuda"))
    here, there = (for_inference(model, spec, place, torch.float32) for place in places)
    for network in (here, there):
        set_score_floor(network, 0.05)
    return here, there


def paired(ours: Detections, theirs: Detections, longest: int) -> tuple[Detections, Detections]:
    """Return both in an order in which partners are in the same place: of one label, near, and equally sure.

    Args:
        ours: what `infer` returned for an image.
        theirs: as many from elsewhere.
        longest: pixels of the image's longer side.
    """
    pairs = (ours[name][:, None] - theirs[name][None] for name in ("boxes", "scores", "labels"))
    boxes, scores, labels = (one.abs() for one in pairs)
    order, partners = linear_sum_assignment(boxes.amax(dim=-1) / longest + scores + 10 * (labels != 0))
    return {name: one[order] for name, one in ours.items()}, {name: one[partners] for name, one in theirs.items()}


@pytest.mark.parametrize("arch", BUILDABLE)
def test_scores_and_boxes_are_within_a_ten_thousandth_of_the_cpus_and_masks_within_rounding(arch: Arch) -> None:
    spec = spec_of(arch)
    here, there = both(spec)
    batch = [patchwork(*size, seed) for seed, size in enumerate(SIZES)]
    on_both = [[tensors_of(one) for one in infer(network, spec, batch)] for network in (here, there)]
    for expected, found, size in zip(*on_both, SIZES, strict=True):
        assert len(expected["scores"]) > 0
        assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in expected.items()}
        assert not any(one.is_pinned() for one in found.values())
        ours, theirs = paired(expected, found, max(size))
        assert torch.equal(theirs["labels"], ours["labels"])
        torch.testing.assert_close(theirs["scores"], ours["scores"], atol=1e-4, rtol=0)
        apart = (theirs["boxes"] - ours["boxes"]).abs().amax(dim=1)
        others = torch.where(apart > 1e-4 * max(size))[0]
        # Of two that overlap and are equally sure, suppression may keep either.
        assert len(others) <= 1, apart
        for at in others:
            assert float(box_iou(theirs["boxes"][[at]], ours["boxes"][[at]])) > 0.5
        if spec.has_masks:
            same = [at for at in range(len(apart)) if at not in others]
            # These networks magnify rounding: without oneDNN, the CPU's own probabilities differ by up to 1.2e-3.
            torch.testing.assert_close(theirs["masks"][same], ours["masks"][same], atol=2e-3, rtol=0)


def test_the_global_settings_of_pytorch_stay_as_they_are() -> None:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.allow_tf32
    _, there = both(SPEC)
    infer(there, SPEC, [patchwork(60, 80)])
    assert cudnn.allow_tf32 == before
