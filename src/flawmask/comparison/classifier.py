"""A baseline: an EfficientNet-Lite0 that classifies whole images as good or defective. A detector has to beat it.

It has the body of the default detector on a CPU. It is trained with that detector's optimiser and schedule
(`training/step.py`), on the same images, augmented in the same way.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, Dataset, RandomSampler

from flawmask import images
from flawmask.coco import CocoSplit
from flawmask.comparison import features
from flawmask.comparison.config import CLASSIFIER, CompareConfig
from flawmask.comparison.entry import ImageScore, TrainingSummary
from flawmask.images import UPPER_BITS, Levels
from flawmask.model.compute import Layers, compute_in, is_slow
from flawmask.model.layers import count_parameters, to_device
from flawmask.model.weights import load_file, save_file
from flawmask.progress import track
from flawmask.runtime import choose_device, choose_precision, seed_everything
from flawmask.training.augmentation import Augmentation
from flawmask.training.config import seconds_in
from flawmask.training.loader import instances_of, make_loader, read
from flawmask.training.step import Schedule, parameter_groups

BATCH_SIZE = 16
"""Images per step."""

Image = npt.NDArray[np.uint8]


class _Images(Dataset[tuple[Tensor, float]]):
    """The images of a split as the network sees them, (3, S, S) uint8, with 1.0 for a defective image, else 0.0."""

    def __init__(self, split: CocoSplit, size: int, levels: Levels, augmentation: Augmentation | None) -> None:
        self._split, self._size, self._levels, self._augmentation = split, size, levels, augmentation

    def __len__(self) -> int:
        return len(self._split.images)

    def __getitem__(self, at: int) -> tuple[Tensor, float]:
        image = self._split.images[at]
        pixels = images.read_image(self._split.image_path(image), self._levels)
        if self._augmentation is not None:
            draw = np.random.default_rng(int(torch.randint(2**62, ())))  # each process that reads has its own seed
            if self._augmentation.needs_whole_images:
                masks, names = instances_of(self._split, image)
            else:
                pixels = images.resize(pixels, (self._size, self._size))
                masks, names = np.zeros((0, *pixels.shape[:2]), dtype=bool), []
            pixels, *_ = self._augmentation(pixels, masks, names, draw)
        return _resized_to_square(pixels, self._size), float(self._split.is_defective(image))


def _collate(items: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, Tensor]:
    return torch.stack([pixels for pixels, _ in items]), torch.tensor([defective for _, defective in items])


def _resized_to_square(pixels: Image, size: int) -> Tensor:
    return torch.from_numpy(images.resize(pixels, (size, size))).permute(2, 0, 1)


def train(config: CompareConfig, training: CocoSplit, path: Path, levels: Levels = UPPER_BITS) -> TrainingSummary:
    """Train the classifier with the budget of the settings and write it to `path`.

    Args:
        config: the settings.
        training: the images; the only label used is whether an image is defective.
        path: the file to write, `.pt`.
        levels: the values that become black and white in images of more than 8 bits.

    Raises:
        MissingRequirementError: the settings name no weights, and those of pip are not installed.
        FlawmaskError: the weights that the settings name cannot be loaded, or an image cannot be read.
    """
    device = choose_device(config.device)
    dtype = choose_precision(config.precision, device)
    dtype = torch.float32 if dtype == torch.float16 else dtype  # float16 would need a gradient scaler
    seed_everything(config.seed)
    size = _image_size(config, training)
    body, norm = features.pretrained_body(config.weights_of(CLASSIFIER), offline=config.offline)
    model = to_device(_network(body), device).train()
    _compute_in(model, device, dtype)
    began = time.perf_counter()
    schedule = Schedule(config.lr / 10, config.scheduler, config.warmup_steps)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=schedule.rate, weight_decay=0.01)
    augmentation = None if config.train_augment == "off" else Augmentation(config.train_augment)
    items = _Images(training, size, levels, augmentation)
    order = BatchSampler(RandomSampler(items, generator=torch.Generator().manual_seed(config.seed)), BATCH_SIZE, False)
    batches = make_loader(items, order, workers=config.workers, pin=False, collate=_collate)
    budget = seconds_in(config.time_budget) if config.time_budget else None
    epochs = steps = 0
    while epochs < config.epochs if budget is None else time.perf_counter() - began < budget:
        for at, (pixels, defective) in enumerate(track(read(batches), f"epoch {epochs + 1}", total=len(batches))):
            spent = (time.perf_counter() - began) / budget if budget else 0.0
            progress = spent if budget else (epochs + at / len(batches)) / config.epochs
            if progress >= 1:
                break
            rate = schedule.at(progress, steps)
            _step(model, optimizer, rate, pixels.to(device), defective.to(device))
            steps += 1
        epochs += 1
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    save_file(path, {"classifier": "efficientnet_lite0", "norm": norm, "image_size": size, "model_state_dict": state})
    defective_images = sum(training.is_defective(image) for image in training.images)
    return TrainingSummary(
        seconds=time.perf_counter() - began,
        epochs=epochs,
        image_size=size,
        parameters=count_parameters(model),
        protocol=f"learns from {len(training.images)} images that are labelled good or defective "
        f"({defective_images} defective); predicts no masks",
    )


def _image_size(config: CompareConfig, training: CocoSplit) -> int:
    """Return the side of the network's square input: at most `--image_size`, and about as large as the images."""
    side = float(np.median([min(image["height"], image["width"]) for image in training.images]))
    return max(32, min(config.image_size, math.ceil(side / 32) * 32))


def _network(body: nn.Sequential) -> nn.Module:
    """Return the body with one output, the logit of a defect."""
    return nn.Sequential(
        OrderedDict(body=body, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), last=nn.Linear(features.CHANNELS, 1))
    )


def _compute_in(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Make the body compute in `dtype`, unless that is slower. The last layer computes in float32."""
    compute_in(Layers([], [] if is_slow(model.body, device) else [model.body]), device, dtype)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float,
    pixels: Tensor,
    defective: Tensor,
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    logits = _logits(model, pixels)
    loss = F.binary_cross_entropy_with_logits(logits, defective)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()


def _logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the logits, (B,) float32, of (B, 3, S, S) uint8 images."""
    batch = features.normalised(pixels).contiguous(memory_format=torch.channels_last)
    logits: Tensor = model(batch)
    return logits[:, 0]


def load(config: CompareConfig, path: Path) -> Callable[[Sequence[Image]], list[ImageScore]]:
    """Return a function that scores images, each (height, width, 3) uint8 RGB.

    Raises:
        FlawmaskError: the file is damaged.
    """
    content = load_file(path)
    device = choose_device(config.device)
    dtype = choose_precision(config.precision, device)
    model = _network(features.empty_body(content["norm"]))
    model.load_state_dict(content["model_state_dict"])
    model = to_device(model.eval(), device)
    _compute_in(model, device, dtype)

    @torch.inference_mode()
    def score(batch: Sequence[Image]) -> list[ImageScore]:
        pixels = torch.stack([_resized_to_square(one, content["image_size"]) for one in batch]).to(device)
        return [ImageScore(one) for one in _logits(model, pixels).sigmoid().tolist()]

    return score
