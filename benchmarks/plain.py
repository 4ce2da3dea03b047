"""The plain way, with which Flawmask's speed is compared: torchvision's documented fine-tuning loop.

It follows the "TorchVision Object Detection Finetuning Tutorial" and torchvision's `references/detection`: eager mode,
float32 (with autocast on a GPU), full-size masks, torchvision's own RoIAlign, 512 sampled regions per image, SGD, and
inference image by image. Data set, network and weights are the same as Flawmask's.

    python benchmarks/plain.py --dataset_dir DATA --output_dir RUN --minutes 45 --image_size 224

trains for that long and writes a `best.pt` for `flawmask evaluate`.
"""

import argparse
import contextlib
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from flawmask import images
from flawmask.coco import CocoSplit, instance_masks, read_split
from flawmask.model import checkpoint
from flawmask.model.build import build
from flawmask.model.spec import ModelSpec, anchors_for
from flawmask.model.weights import from_file, load_matching

Item = tuple[Tensor, dict[str, Tensor]]


class PlainDataset(torch.utils.data.Dataset[Item]):
    """Reads images as (3, H, W) float32, 0 to 1, with boxes, labels and masks of the image's size."""

    def __init__(self, split: CocoSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, place: int) -> Item:
        record = self.split.images[place]
        pixels = images.read_image(self.split.image_path(record))
        annotations = self.split.annotations[record["id"]]
        height, width = pixels.shape[:2]
        found = np.array([*instance_masks(annotations, height, width, "")], dtype=bool).reshape(-1, height, width)
        corners = []
        for mask in found:
            ys, xs = np.nonzero(mask)
            corners.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        target = {
            "boxes": torch.tensor(np.array(corners), dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([self.split.labels[one["category_id"]] for one in annotations], dtype=torch.int64),
            "masks": torch.from_numpy(found.astype(np.uint8)),
            "image_id": torch.tensor([record["id"]]),
        }
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, target


def flipped(batch: list[Item]) -> list[Item]:
    """Return the images, each flipped left to right with probability 0.5, as in the tutorial."""
    return [mirrored(*item) if random.random() < 0.5 else item for item in batch]


def mirrored(image: Tensor, target: dict[str, Tensor]) -> Item:
    """Return an image and its instances, flipped left to right."""
    boxes = target["boxes"][:, [2, 1, 0, 3]]
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [0, 2]]
    return image.flip(-1), target | {"boxes": boxes, "masks": target["masks"].flip(-1)}


def plain_network(spec: ModelSpec) -> Any:
    """Return Flawmask's network with torchvision's own parts instead of Flawmask's replacements."""
    model: Any = build(spec)
    own = model.rpn.anchor_generator
    model.rpn.anchor_generator = AnchorGenerator(own.sizes, own.aspect_ratios)
    for name in ("box_roi_pool", "mask_roi_pool"):
        pool = getattr(model.roi_heads, name)
        setattr(model.roi_heads, name, MultiScaleRoIAlign(pool.featmap_names, pool.output_size, pool.sampling_ratio))
    del model.transform.resize  # it replaces the class's method, because Flawmask's networks get resized images
    # torchvision draws one of a list of one size for each image. Do the same, so that later random numbers agree.
    model.transform.torch_choice = lambda sizes: sizes[0]
    return model


def autocast(device: torch.device) -> Any:
    """Return autocast on a GPU, as in torchvision's reference scripts with `--amp`, and no autocast on a CPU."""
    return torch.autocast("cuda", torch.float16) if device.type == "cuda" else contextlib.nullcontext()


def plain_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: list[Item],
    device: torch.device,
    scaler: torch.amp.GradScaler | None = None,
) -> float:
    """Take one step as in torchvision's `references/detection/engine.py` and return the loss."""
    found = [image.to(device) for image, _ in batch]
    targets = [{name: tensor.to(device) for name, tensor in target.items()} for _, target in batch]
    with autocast(device):
        losses = model(found, targets)
        loss = sum(losses.values())
    value = float(loss.item())
    if not math.isfinite(value):
        raise SystemExit(f"the plain loop stopped: its loss is {value}")
    optimizer.zero_grad()
    if scaler is not None:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    else:
        loss.backward()
        optimizer.step()
    return value


def main() -> None:
    """Train for the given time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--arch", default="maskrcnn_resnet18_fpn")
    parser.add_argument("--image_size", type=int, default=800)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--weights", type=Path, help="a file of weights; none by default")
    parser.add_argument("--adamw", action="store_true", help="AdamW at 0.0005 instead of SGD at 0.005")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    begun = time.monotonic()
    end = begun + 60 * options.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    split = read_split(options.dataset_dir, "train")
    spec = ModelSpec(
        options.arch,
        split.class_names,
        image_size=options.image_size,
        norm="frozen" if options.weights else "batch",
        anchor_sizes=anchors_for(options.image_size),
    )
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    model = plain_network(spec)
    if options.weights:
        load_matching(model, from_file(options.weights, spec.arch))
    model.to(device).train()
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=0.005, momentum=0.9, weight_decay=0.0005)
    if options.adamw:
        optimizer = torch.optim.AdamW(parameters, lr=0.0005, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cuda") if device.type == "cuda" else None
    batches = torch.utils.data.DataLoader(
        PlainDataset(split), options.batch_size, shuffle=True, num_workers=1, collate_fn=list
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, total_iters=min(1000, len(batches) - 1))
    rate = optimizer.param_groups[0]["initial_lr"]
    epoch, seen = 0, 0
    while time.monotonic() < end:
        epoch += 1
        total = 0.0
        steps = 0
        for batch in batches:
            total += plain_step(model, optimizer, flipped(batch), device, scaler)
            steps += 1
            seen += len(batch)
            if epoch == 1:
                warmup.step()
            # The reference scripts train 26 epochs and lower the rate tenfold at 16 and 22. Use the same shares.
            done = (time.monotonic() - begun) / (end - begun)
            if epoch > 1:
                optimizer.param_groups[0]["lr"] = rate * (1 if done < 16 / 26 else 0.1 if done < 22 / 26 else 0.01)
            if done >= 1:
                break
        print(f"epoch {epoch}: loss {total / steps:.4f}, {seen} images, {(time.monotonic() - begun) / 60:.1f} min")
    checkpoint.save(options.output_dir / "best.pt", model, spec, epoch=epoch, train_loss=total / steps, val_loss=None)


if __name__ == "__main__":
    main()
