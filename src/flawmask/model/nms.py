"""Non-maximum suppression of many sets of boxes at once, without waiting for the device."""

import torch
from torch import Tensor

BLOCK = 256
"""The number of boxes of each set that are decided together. Larger blocks mean fewer steps but longer chains."""

ROUNDS = 16
"""The rounds within a block before anyone checks whether they were enough. Two thousand proposals needed 5 to 10 rounds
in trials: with untrained networks and around a few defects, with smooth and with noisy scores."""

MAX_PAIRS = 2**25
"""The most IoUs in memory at a time: 128 MiB for each of the few float32 matrices of a block."""


def keep_best(boxes: Tensor, valid: Tensor, threshold: float, rounds: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return which boxes greedy non-maximum suppression keeps, and whether the result is final.

    Greedy suppression goes from the best box to the worst. It keeps a box if its IoU with each kept box is at most the
    threshold. The result is the fixed point of this rule: a box is kept unless it overlaps a better box that is kept.
    Starting from "all boxes are kept" and applying the rule again and again leads to the fixed point (Zheng et al.,
    "Enhancing geometric factors in model learning and inference", 2020, "Cluster-NMS"). Each round decides at least one
    more box of the longest chain of boxes that suppress each other. Here this is done block by block, the best boxes
    first. So chains are short, and no matrix of all pairs is needed.

    The result is that of `torchvision.ops.nms` on each set, if boxes of equal score keep their order there.

    IoUs are compared with the threshold in float32, as torchvision does on CUDA.

    Args:
        boxes: (S, N, 4) float32, x1 y1 x2 y2: S sets of N boxes each, the best first.
        valid: (S, N) bool. Other boxes are not kept and suppress none.
        threshold: the IoU above which the worse of two boxes is suppressed.
        rounds: the number of rounds for each block. `BLOCK` is always enough, because no chain is longer.

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
            # In this order and in place, so that the result equals torchvision's to the bit.
            width = torch.minimum(x2[rows], x2[rest]).sub_(torch.maximum(x1[rows], x1[rest])).clamp_(min=0)
            height = torch.minimum(y2[rows], y2[rest]).sub_(torch.maximum(y1[rows], y1[rest])).clamp_(min=0)
            shared = width.mul_(height)
            union = (areas[rows] + areas[rest]).sub_(shared)
            overlaps = shared.div_(union) > threshold
            # A matrix product reads each overlap once. Its sums of ones may be rounded, but never to zero.
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
