"""Non-maximum suppression of many sets of boxes at once, without a question to the device."""

import torch
from torch import Tensor

BLOCK = 256
"""Boxes of each set that are decided together. More of them mean fewer steps, and longer chains within one."""

ROUNDS = 16
"""Rounds within a block that are taken before anybody looks whether they were enough. Two thousand proposals needed 5
to 10, of networks that know nothing and around a few defects, their scores smooth or noisy."""

MAX_PAIRS = 2**25
"""Overlaps that are held at a time: 128 MiB for each of the few float32 matrices of a block."""


def keep_best(boxes: Tensor, valid: Tensor, threshold: float, rounds: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return which boxes greedy non-maximum suppression keeps, and whether that is certain.

    Greedy suppression goes from the best box to the worst and keeps each that no kept one overlaps by more than the
    threshold. That is the fixed point of "kept unless a kept, better box overlaps", and repeating this sentence from
    "all are kept" leads there (Zheng et al., "Enhancing geometric factors in model learning and inference", 2020,
    "Cluster-NMS"): each round settles at least one more box of the longest chain of boxes that suppress each other.
    Here it is repeated block by block, best boxes first: chains are short, and no matrix of all pairs is held.

    The result is that of `torchvision.ops.nms` on each set alone, where boxes of one score come in their order here.

    Thresholds are compared in float32, as torchvision does on CUDA.

    Args:
        boxes: (S, N, 4) float32, x1 y1 x2 y2: S sets of N boxes each, the best first.
        valid: (S, N) bool: the others are neither kept nor suppress any.
        threshold: the IoU above which the worse of two boxes goes.
        rounds: how often each block is gone through; `BLOCK`, the longest that a chain can be, is always enough.

    Returns:
        kept: (S, N) bool.
        settled: () bool, whether the rounds were enough in all blocks. It stays on the device.
    """
    sets, count = valid.shape
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    areas = (x2 - x1) * (y2 - y1)
    kept = valid.clone()
    settled = torch.ones((), dtype=torch.bool, device=boxes.device)
    exact = torch.bfloat16 if boxes.device.type == "cuda" else torch.float32  # for 0 and 1
    chunk = max(1, MAX_PAIRS // max(1, BLOCK * count))
    for first in range(0, sets, chunk):
        of = slice(first, first + chunk)
        for start in range(0, count, BLOCK):
            end = min(start + BLOCK, count)
            rows, rest = (of, slice(start, end), None), (of, None, slice(start, None))
            # In this order, and in place: as torchvision computes it, to the bit.
            width = torch.minimum(x2[rows], x2[rest]).sub_(torch.maximum(x1[rows], x1[rest])).clamp_(min=0)
            height = torch.minimum(y2[rows], y2[rest]).sub_(torch.maximum(y1[rows], y1[rest])).clamp_(min=0)
            shared = width.mul_(height)
            union = (areas[rows] + areas[rest]).sub_(shared)
            overlaps = shared.div_(union) > threshold
            # A product of matrices reads each overlap once; sums of ones may be rounded, but never to nothing.
            inside = overlaps[:, :, : end - start].triu(1).to(exact)
            chosen = before = candidates = kept[of, None, start:end].to(exact)
            for _ in range(min(rounds, end - start)):
                before, chosen = chosen, candidates * (torch.bmm(chosen, inside) == 0)
            if rounds < end - start:
                settled &= (before == chosen).all()
            kept[of, start:end] = chosen[:, 0] > 0
            if end < count:
                kept[of, end:] &= torch.bmm(chosen, overlaps[:, :, end - start :].to(exact))[:, 0] == 0
    return kept, settled
