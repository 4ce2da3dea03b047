"""From a split on disk to batches of tensors, in an order that the seed alone decides."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from flawmask import images, masks
from flawmask.coco import CocoSplit, Record, instance_masks
from flawmask.errors import FlawmaskError

Target = dict[str, Tensor]
Batch = tuple[list[Tensor], list[Target]]
Item = tuple[Tensor, Target]


class SplitDataset(Dataset[Item]):
    """The images of a split with what torchvision's Mask R-CNN learns from.

    An item is a (3, H, W) float32 image, 0 to 1, and a target: `boxes` (N, 4) float32, x1 y1 x2 y2 along the outer
    edges of the mask; `labels` (N,) int64; `masks` (N, H, W) uint8, 0 or 1; `image_id` (1,) int64. An image without
    annotations has N = 0 and is as good an example as any.
    """

    def __init__(self, split: CocoSplit) -> None:
        """Take the split; images are read when they are asked for."""
        self.split = split

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.split.images)

    def __getitem__(self, place: int) -> Item:
        """Return the image and target at a place in the split's order.

        Raises:
            FlawmaskError: the image cannot be read, or does not fit its record.
        """
        record = self.split.images[place]
        path = self.split.image_path(record)
        pixels = images.read_image(path)
        height, width = pixels.shape[:2]
        if (record["height"], record["width"]) != (height, width):
            raise FlawmaskError(f"{path} is {width}x{height} but its record says {record['width']}x{record['height']}")
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, self._target(record, str(path))

    def _target(self, record: Record, where: str) -> Target:
        # A crowd is a region that nobody outlined one by one: there is no instance to learn.
        annotations = [one for one in self.split.annotations[record["id"]] if not one.get("iscrowd")]
        height, width = record["height"], record["width"]
        found = instance_masks(annotations, height, width, where)
        kept = [(one, mask) for one, mask in zip(annotations, found, strict=True) if mask.any()]
        boxes = np.array([masks.box_of(mask) for _, mask in kept], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        stacked = np.stack([mask for _, mask in kept]) if kept else np.zeros((0, height, width), dtype=bool)
        labels = self.split.labels
        return {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.tensor([labels[one["category_id"]] for one, _ in kept], dtype=torch.int64),
            "masks": torch.from_numpy(stacked.astype(np.uint8)),
            "image_id": torch.tensor([record["id"]], dtype=torch.int64),
        }


class _Carrier(Dataset[Item | FlawmaskError]):
    """A data set that hands over what went wrong instead of raising it.

    Raised in a worker process, an error would reach the user with that process's traceback pasted into its message.
    """

    def __init__(self, items: SplitDataset) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> Item | FlawmaskError:
        try:
            return self.items[place]
        except FlawmaskError as error:
            return error


def _collate(items: Sequence[Item | FlawmaskError]) -> Batch | FlawmaskError:
    read = []
    for item in items:
        if isinstance(item, FlawmaskError):
            return item
        read.append(item)
    return [image for image, _ in read], [target for _, target in read]


def read(batches: DataLoader[Any]) -> Iterator[Batch]:
    """Yield the batches of one epoch.

    Raises:
        FlawmaskError: an image cannot be read, or does not fit its record.
    """
    for batch in batches:
        if isinstance(batch, FlawmaskError):
            raise batch
        yield batch


def make_loader(
    split: CocoSplit, batch_size: int, *, shuffle: bool, seed: int, workers: int | None, pin: bool
) -> DataLoader[Any]:
    """Return a loader of `Batch`es, to be gone through with `read`.

    Args:
        split: what to read.
        batch_size: images per batch; the last one may be smaller.
        shuffle: draw a new order for each epoch.
        seed: decides these orders.
        workers: reading processes; None for one less than there are cores, 4 at most; 0 reads in this process.
        pin: hand tensors over in page-locked memory, for CUDA.
    """
    count = min(4, (os.cpu_count() or 1) - 1) if workers is None else workers
    # Nothing in a worker may call OpenCV: after a fork its thread pool, once used by prepare or augment, hangs.
    items = _Carrier(SplitDataset(split))
    # The loader draws from its own generator more or less often as it has worker processes: the order has another.
    order = RandomSampler(items, generator=torch.Generator().manual_seed(seed)) if shuffle else None
    return DataLoader(
        items,
        batch_size=batch_size,
        sampler=order,
        num_workers=count,
        collate_fn=_collate,
        pin_memory=pin,
        persistent_workers=count > 0,
        generator=torch.Generator().manual_seed(seed),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with all its tensors on the device."""
    found, targets = batch
    moved = [{name: tensor.to(device, non_blocking=True) for name, tensor in target.items()} for target in targets]
    return [image.to(device, non_blocking=True) for image in found], moved
