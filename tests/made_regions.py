"""Handmade region proposals and instances, and their targets in a form that can be compared."""

from collections.abc import Sequence
from typing import Any

import torch
from outlined_images import rectangle, target_of
from torch import Tensor

from flawmask.model.instances import Instances
from flawmask.model.matching import AnchorSamples
from flawmask.model.rcnn_batch import Regions
from flawmask.model.targets import Target

CPU = torch.device("cpu")
SIZE = (64, 96)
ALSO_COMPARED = torch.tensor([[60.0, 40, 70, 50], [70, 2, 95, 30], [2, 50, 30, 63]])


def instances_of(masks: Sequence[Sequence[Any]], size: tuple[int, int]) -> tuple[list[Target], Instances]:
    targets = [target_of(list(of_image), size) for of_image in masks]
    return targets, Instances.of(targets, CPU)


def made_regions(counts: Sequence[int], around: int, beside: int, seed: int = 0) -> tuple[Regions, Instances]:
    """Images with the given numbers of instances, with `around` boxes on each instance and `beside` boxes on none.

    Some boxes are invalid. No two boxes are the same, and the invalid ones have a corner at 0.
    """
    spots = [(4, 4, 16, 20), (6, 40, 18, 14), (36, 36, 20, 16)]  # y x height width
    _, instances = instances_of([[rectangle(SIZE, *spot) for spot in spots[:count]] for count in counts], SIZE)
    draw = torch.Generator().manual_seed(seed)

    def shaken(boxes: Tensor, times: int) -> Tensor:
        copies = boxes.repeat(times, 1)
        return copies + torch.rand(copies.shape, generator=draw) - 0.5

    most = max(counts) * around + 3 * beside
    boxes, valid = torch.zeros(len(counts), most, 4), torch.zeros(len(counts), most, dtype=torch.bool)
    for at, count in enumerate(counts):
        one = torch.cat((shaken(instances.boxes[at, :count], around), shaken(ALSO_COMPARED, beside)))
        order = torch.randperm(len(one), generator=draw)
        boxes[at, : len(one)], valid[at, : len(one)] = one[order], True
        gone = torch.randperm(len(one), generator=draw)[: len(one) // 10]
        boxes[at, gone, 0], valid[at, gone] = 0.0, False
    return Regions(boxes, valid, torch.ones((), dtype=torch.bool)), instances


def anchors_of(samples: AnchorSamples, at: int) -> Tensor:
    """Return the sampled anchors as sorted rows: place, whether positive, and regression target."""
    positive = samples.corrections.shape[1]
    rows = torch.zeros(samples.places.shape[1], 6)
    rows[:, 0] = samples.places[at]
    rows[:positive, 1], rows[:positive, 2:] = 1, samples.corrections[at]
    rows = rows[samples.used[at]]
    return rows[rows[:, 0].argsort()]
