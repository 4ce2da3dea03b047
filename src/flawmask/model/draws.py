"""What is drawn at random of an image: it follows from the seed and from the image, not from what passes beside it.

So a batch of images of one padded size teaches the same whether it passes through the network at once, in parts, or in
several processes, unless norms look at the batch. Padding adds anchors, and with them other ones are drawn.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flawmask.model.targets import Target


def generator_for(target: Target, device: torch.device) -> torch.Generator:
    """Return what draws of one image, on the device."""
    return torch.Generator(device).manual_seed(_seed(target))


@contextmanager
def drawing_for(target: Target, device: torch.device) -> Iterator[None]:
    """Within, PyTorch's own generators draw of one image, on the CPU and on the device."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_seed(target))
        yield


def _seed(target: Target) -> int:
    """Return what follows from the seed that PyTorch was given last and from the image's id."""
    key = f"{torch.initial_seed()} {int(target['image_id'])}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big", signed=True)
