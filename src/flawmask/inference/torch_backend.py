"""The backend that runs networks with PyTorch, on a CPU or a GPU. Its outputs are float32, and do not depend on earlier
calls."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flawmask import torchvision_alone  # noqa: F401  # before what imports torchvision
from flawmask.inference.backend import Resized, check_padding
from flawmask.inference.config import MAX_PROPOSALS, SCORE_FLOOR
from flawmask.model import checkpoint
from flawmask.model.build import detector_of, optimise_for_inference, set_score_floor
from flawmask.model.layers import upload
from flawmask.model.spec import ModelSpec
from flawmask.prediction import RawDetections
from flawmask.runtime import (
    choose_device,
    choose_precision,
    ieee_float32,
    is_out_of_memory,
    keep_freed_memory,
    on_device,
)
from flawmask.settings import Precision

log = logging.getLogger(__name__)

BATCH_ON_CUDA = 8
"""The default batch size on CUDA. A CPU is no faster with more than one image."""


class TorchBackend:
    """A network in PyTorch. See `Backend` for its attributes and for `infer`."""

    resizes = False

    def __init__(self, network: nn.Module, spec: ModelSpec) -> None:
        """Take a network that `build.for_inference` or `build.optimise_for_inference` returned, and its spec."""
        self.network = network
        self.spec = spec
        self.device = next(network.parameters()).device
        self.uses_cores = self.device.type != "cuda"
        self.batch_size = 1 if self.uses_cores else BATCH_ON_CUDA
        self._micro_batch_size = 2**31
        """The largest batch that fits into memory, as far as is known."""

    @classmethod
    def load(
        cls,
        model: Path,
        device: str | None = None,
        *,
        precision: Precision = "auto",
        score_floor: float = SCORE_FLOOR,
        max_proposals: int = MAX_PROPOSALS,
    ) -> "TorchBackend":
        """Return the backend of a checkpoint; see `Predictor` for the arguments.

        Raises:
            FlawmaskError: the file is no checkpoint, or the device or the precision is not there.
        """
        chosen = choose_device(device)
        keep_freed_memory(chosen)
        with on_device(chosen):
            dtype = choose_precision(precision, chosen)
            network, spec = checkpoint.load(model, max_proposals)
            network = optimise_for_inference(network, spec, chosen, dtype)
            set_score_floor(network, score_floor)
        return cls(network, spec)

    def infer(self, batch: Sequence[Resized], /) -> list[RawDetections]:
        """Return the detections of each image. If memory runs out, the batch is split into micro-batches of half the
        size, from then on."""
        check_padding(batch, self.spec)
        detections: list[RawDetections] = []
        before = self._micro_batch_size
        while len(detections) < len(batch):
            part = batch[len(detections) : len(detections) + self._micro_batch_size]
            try:
                detections += self._infer(part)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
            torch.cuda.empty_cache()  # not inside the except clause: the error keeps the allocated tensors alive
            self._micro_batch_size = math.ceil(len(part) / 2)
        if self._micro_batch_size < before:
            log.warning("out of memory: continuing with micro-batches of %d images", self._micro_batch_size)
        return detections

    @torch.inference_mode()
    def _infer(self, batch: Sequence[Resized]) -> list[RawDetections]:
        """Return the detections of each image of a batch that fits into memory. All images are copied to a GPU at once,
        as integers in pinned memory, and all outputs are copied back at once."""
        sizes = [(image.height, image.width) for image in batch]
        with on_device(self.device), ieee_float32():
            images = uploaded([image.pixels for image in batch], self.device)
            outputs = detector_of(self.spec).infer(self.network, images, sizes)
            return [_raw(output) for output in (outputs if self.device.type == "cpu" else downloaded(outputs))]


def _raw(output: dict[str, Tensor]) -> RawDetections:
    masks = output["masks"].numpy()[:, 0] if "masks" in output else None
    maps = output["maps"].numpy() if "maps" in output else None
    return RawDetections(output["boxes"].numpy(), output["labels"].numpy(), output["scores"].numpy(), masks, maps)


def uploaded(batch: Sequence[npt.NDArray[np.uint8]], device: torch.device) -> list[Tensor]:
    """Return (height, width, 3) uint8 images as (3, height, width) on the device. They are copied there at once."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1) for pixels in batch]
    flat = torch.empty(sum(pixels.size for pixels in batch), dtype=torch.uint8, pin_memory=device.type == "cuda")
    parts = torch.split(flat, [pixels.size for pixels in batch])
    for part, pixels in zip(parts, batch, strict=True):
        part.numpy()[:] = pixels.ravel()
    moved = torch.split(upload(flat, device), [pixels.size for pixels in batch])
    return [one.view(pixels.shape).permute(2, 0, 1) for one, pixels in zip(moved, batch, strict=True)]


def downloaded(outputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the outputs for the images of a batch on the CPU. They are copied there at once.

    Copying each tensor by itself would make the CPU wait for the GPU once for each tensor.

    Args:
        outputs: tensors by name, the same names for each image, of float32 or of integers below 2^24.
    """
    tensors = [tensor for one in outputs for tensor in one.values()]
    flat = torch.cat([tensor.to(torch.float32).flatten() for tensor in tensors])
    host = torch.empty(flat.shape, dtype=torch.float32, pin_memory=flat.device.type == "cuda")
    # `clone` copies them out of pinned memory, which is scarce: predictions may be kept for long.
    parts = iter(torch.split(host.copy_(flat).clone(), [tensor.numel() for tensor in tensors]))
    return [{name: next(parts).view(tensor.shape).to(tensor.dtype) for name, tensor in one.items()} for one in outputs]
