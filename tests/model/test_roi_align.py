"""The pyramid's RoIAlign equals torchvision's, forward and backward."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import counted, pooled_as_on_a_gpu
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from flawmask.model.roi_align import PyramidRoIAlign

NAMES = ["0", "1", "2", "3"]
SIZES = [(128, 96), (100, 160)]
"""The images' sizes. Padded to one size, they are 128 x 160."""


def pyramid(dtype: torch.dtype = torch.float32, channels: int = 5, levels: int = 4) -> dict[str, Tensor]:
    maps = {
        NAMES[level]: torch.randn(len(SIZES), channels, 128 // 2 ** (2 + level), 160 // 2 ** (2 + level)).to(dtype)
        for level in range(levels)
    }
    maps["pool"] = torch.randn(len(SIZES), channels, 2, 3)  # a level that no region is pooled from
    return {name: one.requires_grad_() for name, one in maps.items()}


def random_boxes(count: int, reach: float = 30.0) -> Tensor:
    """Return boxes of all sizes, some without width, some beyond the image's edges."""
    corners = torch.rand(count, 2) * torch.tensor([160 + 2 * reach, 128 + 2 * reach]) - reach
    sides = torch.rand(count, 2) ** 3 * torch.tensor([200.0, 160.0])
    sides[::5] = 0
    return torch.cat((corners, corners + sides), dim=1)


class OnAGPU(PyramidRoIAlign):
    """Computes as on a GPU."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        with pooled_as_on_a_gpu():
            return super().forward(x, boxes, image_shapes)


def pooled_both_ways(
    maps: dict[str, Tensor],
    boxes: list[Tensor],
    size: int | tuple[int, int] = 7,
    samples: int = 2,
    ours: type[PyramidRoIAlign] = PyramidRoIAlign,
) -> tuple[tuple[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]:
    """Return the pooled features and the gradients of the levels, ours and torchvision's."""
    both = []
    names = [name for name in NAMES if name in maps]
    weights = None
    for kind in (ours, MultiScaleRoIAlign):
        align = kind(names, [size, size] if isinstance(size, int) else list(size), samples)
        pooled = align(maps, boxes, SIZES)
        weights = torch.randn_like(pooled) if weights is None else weights
        gradients = torch.autograd.grad(
            (pooled * weights).sum(), [maps[name] for name in names], allow_unused=True, materialize_grads=True
        )
        both.append((pooled, list(gradients)))
    return both[0], both[1]


def assert_same(boxes: Sequence[Tensor], size: int | tuple[int, int], samples: int, levels: int) -> None:
    """Both the CPU's and the GPU's computation are tested."""
    maps = pyramid(levels=levels)
    for ours in (PyramidRoIAlign, OnAGPU):
        (pooled, gradients), (expected, wanted) = pooled_both_ways(maps, list(boxes), size, samples, ours)
        assert pooled.shape == expected.shape
        torch.testing.assert_close(pooled, expected, atol=1e-4, rtol=1e-4)
        for found, one in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(found, one, atol=1e-4, rtol=1e-4)


@given(
    seed=st.integers(0, 10**6),
    counts=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    size=st.sampled_from([7, 14, (3, 5)]),
    samples=st.integers(1, 3),
    levels=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_regions_and_gradients_are_those_of_torchvision(
    seed: int, counts: tuple[int, int], size: int | tuple[int, int], samples: int, levels: int
) -> None:
    torch.manual_seed(seed)
    assert_same([random_boxes(count) for count in counts], size, samples, levels)


def test_regions_at_and_beyond_the_edges_are_those_of_torchvision() -> None:
    torch.manual_seed(0)
    edges = torch.tensor(
        [
            [0.0, 0.0, 160.0, 128.0],
            [-40.0, -40.0, 200.0, 170.0],
            [159.0, 127.0, 160.0, 128.0],
            [160.0, 128.0, 160.0, 128.0],
            [300.0, 300.0, 340.0, 340.0],
            [-90.0, 3.0, -80.0, 9.0],
            [-4.0, -4.0, 4.0, 4.0],
            [0.0, 60.0, 160.0, 60.5],
        ]
    )
    assert_same([edges, edges.flip(0)], 7, 2, 4)


def test_boxes_between_two_levels_get_torchvisions_level() -> None:
    torch.manual_seed(0)
    sides = torch.tensor([28.0, 56.0, 112.0, 224.0])[:, None] + torch.tensor([-1e-3, 0.0, 1e-3])
    corners = torch.zeros(12, 2)
    assert_same([torch.cat((corners, corners + sides.reshape(-1, 1)), dim=1), torch.zeros(0, 4)], 7, 2, 4)


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0)])
def test_images_without_regions_pool_nothing_and_every_level_has_a_gradient(counts: tuple[int, int]) -> None:
    torch.manual_seed(1)
    maps = pyramid()
    pooled = PyramidRoIAlign(NAMES, [7, 7], 2)(maps, [random_boxes(count) for count in counts], SIZES)
    assert pooled.shape == (sum(counts), 5, 7, 7)
    pooled.sum().backward()
    for name in NAMES:
        assert maps[name].grad is not None
    assert_same([random_boxes(count) for count in counts], 7, 2, 4)


def test_sums_and_gradients_of_bfloat16_features_are_float32() -> None:
    torch.manual_seed(2)
    maps = pyramid(torch.bfloat16)
    # Many regions on the same cells: in bfloat16, the sum of 400 gradients would stop growing at 256.
    boxes = [torch.tensor([[8.0, 8.0, 40.0, 40.0]]).repeat(400, 1), torch.zeros(0, 4)]
    pooled = PyramidRoIAlign(NAMES, [7, 7], 2)(maps, boxes, SIZES)
    assert pooled.dtype == torch.float32
    in_float32 = {name: one.detach().float().requires_grad_() for name, one in maps.items()}
    expected = MultiScaleRoIAlign(NAMES, [7, 7], 2)(in_float32, boxes, SIZES)
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
    pooled.sum().backward()
    expected.sum().backward()
    gradient, wanted = maps["0"].grad, in_float32["0"].grad
    assert gradient is not None
    assert wanted is not None
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), wanted, atol=1e-3, rtol=2**-8)
    assert float(wanted.max()) > 256


def test_features_may_have_any_memory_layout() -> None:
    torch.manual_seed(3)
    maps = pyramid()
    boxes = [random_boxes(9), random_boxes(4)]
    align = PyramidRoIAlign(NAMES, [7, 7], 2)
    last = {name: one.contiguous(memory_format=torch.channels_last) for name, one in maps.items()}
    assert torch.equal(align(maps, boxes, SIZES), align(last, boxes, SIZES))


def test_the_gpu_way_reads_nothing_from_the_device_and_the_other_way_does() -> None:
    torch.manual_seed(4)
    maps, boxes = pyramid(), [random_boxes(9), random_boxes(4)]
    counts = []
    for kind in (OnAGPU, PyramidRoIAlign):
        with counted() as of_kind:
            kind(NAMES, [7, 7], 2)(maps, boxes, SIZES).sum().backward()
        counts.append(of_kind.total())
    assert counts[0] == 0 < counts[1]


def test_the_gpu_way_sums_gradients_of_bfloat16_features_in_float32() -> None:
    torch.manual_seed(2)
    maps = pyramid(torch.bfloat16)
    boxes = [torch.tensor([[8.0, 8.0, 40.0, 40.0]]).repeat(400, 1), torch.zeros(0, 4)]
    pooled = OnAGPU(NAMES, [7, 7], 2)(maps, boxes, SIZES)
    assert pooled.dtype == torch.float32
    pooled.sum().backward()
    gradient = maps["0"].grad
    assert gradient is not None
    assert gradient.dtype == torch.bfloat16
    assert float(gradient.max()) > 256, "in bfloat16 it would have stopped growing there"
