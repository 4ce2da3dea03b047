"""Random samples of an image depend only on the seed and on the image, not on the other images of its batch.

So a batch gives the same gradients whether it passes through the network at once, in micro-batches or in several
processes. There are two exceptions. BatchNorm that learns depends on the micro-batch. And images of different padded
sizes get more padding in a larger batch: padding adds anchors, and then other anchors are sampled.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flawmask.model.targets import Target


def generator_for(target: Target, device: torch.device) -> torch.Generator:
    """Return the random generator of one image, on the device."""
    return torch.Generator(device).manual_seed(_seed(target))


@contextmanager
def seeded_for(target: Target, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global generators for one image inside this context, on the CPU and on the device."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_seed(target))
        yield


def _seed(target: Target) -> int:
    """Return a seed made from PyTorch's last seed and the image's id."""
    key = f"{torch.initial_seed()} {int(target['image_id'])}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big", signed=True)
