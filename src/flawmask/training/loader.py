"""From a split on disk to batches of tensors, in an order that the seed and the epoch alone decide."""

import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from flawmask import images
from flawmask.coco import CocoSplit, annotation, instance_masks, one_by_one
from flawmask.errors import FlawmaskError
from flawmask.launch import cores_of_each_process, own_process, usable_cores
from flawmask.model import targets
from flawmask.model.layers import padded_shape, stacked, upload
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target, make_target
from flawmask.runtime import keep_freed_memory
from flawmask.settings import require
from flawmask.training.cache import PixelCache

SORT_WINDOW = 8
"""So many batches are sorted by their images' ratio together: more pad less, and draw an image's neighbours less
freely."""

MAX_WORKERS = 16
"""Reading processes of one that trains on a GPU, by default: each holds a batch or two of images ready."""

Item = tuple[Tensor, Target]

Transform = Callable[
    [npt.NDArray[np.uint8], npt.NDArray[np.bool_], list[str], np.random.Generator],
    tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], list[str]],
]
"""What makes another image of a training image, each time that it is shown.

It takes the image, (height, width, 3) uint8 RGB, the masks of its N instances, (N, height, width) bool, their N class
names, and a generator, which follows from seed, epoch and image: whoever draws from no other, goes on with an
interrupted training to the bit. It returns image, masks and names, of any size, of any number of instances, and may
change what it was given. Processes that read images call it: where these are not forked, it has to be a function of a
module.
"""


@dataclass(frozen=True)
class Augmenting:
    """A transform, and the seed of what it draws."""

    transform: Transform
    seed: int


@dataclass(frozen=True)
class Batch:
    """Images and what is to be learned of them, in one piece of memory that a GPU takes at once.

    Attributes:
        pixels: (B, H, W, 3) uint8: each image in the upper left corner of its own, 0 beyond it. H and W are multiples
            of `STRIDE`.
        sizes: height and width of each image.
        targets: of each image.
    """

    pixels: Tensor
    sizes: list[tuple[int, int]]
    targets: list[Target]

    @classmethod
    def of(cls, items: Sequence[Item]) -> "Batch":
        """Return the (3, H, W) uint8 images and targets as a batch."""
        pixels, sizes = stacked([image for image, _ in items])
        return cls(pixels, sizes, [target for _, target in items])

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.sizes)

    @property
    def images(self) -> list[Tensor]:
        """The images without padding, (3, height, width) uint8 each; no copies."""
        pairs = zip(self.pixels, self.sizes, strict=True)
        return [pixels[:height, :width].permute(2, 0, 1) for pixels, (height, width) in pairs]

    def parts(self, at_most: int) -> Iterator["Batch"]:
        """Yield the batch in micro-batches of at most so many images, none padded for those of another."""
        for start in range(0, len(self), at_most):
            part = slice(start, start + at_most)
            height, width = padded_shape(self.sizes[part])
            yield Batch(self.pixels[part, :height, :width], self.sizes[part], self.targets[part])

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; the loader asks for that."""
        pinned = [{name: tensor.pin_memory() for name, tensor in target.items()} for target in self.targets]
        return replace(self, pixels=self.pixels.pin_memory(), targets=pinned)

    def on(self, device: torch.device) -> tuple[list[Tensor], list[Target]]:
        """Return the images and all that is computed with of their targets on the device."""
        moved = replace(self, pixels=upload(self.pixels, device))
        return moved.images, [targets.to_device(one, device) for one in self.targets]


class SplitDataset(Dataset[Item]):
    """The images of a split at the size at which the network sees them, with what it learns from.

    An item is a (3, H, W) uint8 image and its `Target`.
    """

    def __init__(
        self,
        split: CocoSplit,
        spec: ModelSpec,
        cache: PixelCache | None = None,
        augmenting: Augmenting | None = None,
    ) -> None:
        """Take the split; images are read when they are asked for.

        Args:
            split: what to read.
            spec: the network's, which says how images are resized.
            cache: where resized images are kept, laid out for `resized_shapes`; None keeps none.
            augmenting: what is made of each image; its places are those of an `Order` that marks epochs.
        """
        self.split, self.spec = split, spec
        self.shapes = resized_shapes(split, spec)
        self.cache, self.augmenting = cache, augmenting

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.split.images)

    def __getitem__(self, place: int) -> Item:
        """Return the image and target at a place in the split's order.

        Raises:
            FlawmaskError: the image cannot be read, or does not fit its record.
        """
        if self.augmenting is not None:
            return self._augmented(self.augmenting, *divmod(place, len(self)))
        record = self.split.images[place]
        where = str(self.split.image_path(record))
        pixels = self.cache.get(place) if self.cache else None
        if pixels is None:
            pixels = self._read(place)
            if self.cache:
                self.cache.put(place, pixels)
        original = (record["height"], record["width"])
        annotations = self.split.annotations[record["id"]]
        target = make_target(annotations, self.split.labels, record["id"], original, self.shapes[place], where)
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1), target

    def _augmented(self, augmenting: Augmenting, epoch: int, place: int) -> Item:
        record = self.split.images[place]
        path, names = self.split.image_path(record), {label: name for name, label in self._labels.items()}
        single = one_by_one(self.split.annotations[record["id"]])
        masks = instance_masks(single, record["height"], record["width"], str(path))
        kept = [(mask, one) for mask, one in zip(masks, single, strict=True) if mask.any()]
        pixels, changed, labels = augmenting.transform(
            self._whole(place).copy(),
            np.array([mask for mask, _ in kept], dtype=bool).reshape(-1, record["height"], record["width"]),
            [names[self.split.labels[one["category_id"]]] for _, one in kept],
            np.random.default_rng([augmenting.seed, epoch, record["id"]]),
        )
        size = pixels.shape[:2]
        fits = pixels.dtype == np.uint8 and pixels.shape[2:] == (3,) and changed.shape == (len(labels), *size)
        require(fits and changed.dtype == bool, f"{path}: the transform returned no image with masks of its size")
        strange = set(labels) - self._labels.keys()
        require(not strange, f"{path}: the transform returned {', '.join(map(repr, strange))}, which is no class")
        shown = self.spec.resized(*size)
        records = [
            annotation(mask, id=number, image_id=record["id"], category_id=self._labels[name])
            for number, (mask, name) in enumerate(zip(changed, labels, strict=True))
            if mask.any()
        ]
        own = {label: label for label in names}
        target = make_target(records, own, record["id"], size, shown, str(path))
        return torch.from_numpy(images.resize(pixels, shown)).permute(2, 0, 1), target

    @property
    def _labels(self) -> dict[str, int]:
        """The network's label of each class name."""
        return {name: label for label, name in enumerate(self.split.class_names, start=1)}

    def _read(self, place: int) -> npt.NDArray[np.uint8]:
        return images.resize(self._whole(place), self.shapes[place])

    def _whole(self, place: int) -> npt.NDArray[np.uint8]:
        record = self.split.images[place]
        path = self.split.image_path(record)
        pixels = images.read_image(path, self.spec.intensity)
        height, width = pixels.shape[:2]
        if (record["height"], record["width"]) != (height, width):
            raise FlawmaskError(f"{path} is {width}x{height} but its record says {record['width']}x{record['height']}")
        return pixels


def resized_shapes(split: CocoSplit, spec: ModelSpec) -> list[tuple[int, int]]:
    """Return the height and width at which the network sees each image."""
    return [spec.resized(image["height"], image["width"]) for image in split.images]


class Order(Sampler[list[int]]):
    """The places of each batch of an epoch, one share of each for every process that takes part.

    A batch of the epoch is `batch_size` images over all processes; the last one takes what is left, and is joined to
    the one before where it would leave a process without an image. No image is shown twice.

    Images of one batch are padded to a common size. So those that the seed puts near to each other are sorted by their
    height to width ratio before they are cut into batches: of magnetic tiles, whose sides differ by up to 2.7 times,
    random batches of 4 have 1.97 times the pixels of their images, and these 1.20 times. torchvision's references
    sort for the same reason, into groups once and for all.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        batch_size: int,
        *,
        seed: int | None,
        rank: int = 0,
        processes: int = 1,
        marks_epochs: bool = False,
    ) -> None:
        """Lay out the batches.

        Args:
            shapes: height and width of each image, as `resized_shapes` returns them.
            batch_size: images per step, over all processes.
            seed: decides the order of each epoch; None sorts all images by their ratio, in the split's own order.
            rank: which process this is, from 0.
            processes: how many take part.
            marks_epochs: add, for each epoch, the number of images to each place: who takes them learns the epoch.
        """
        self.marks_epochs = marks_epochs
        self.ratios = [height / width for height, width in shapes]
        self.batch_size, self.seed, self.rank, self.processes = batch_size, seed, rank, processes
        ends = list(range(batch_size, len(shapes), batch_size))
        if ends and len(shapes) - ends[-1] < processes:
            ends.pop()
        self.bounds = list(zip([0, *ends], [*ends, len(shapes)], strict=True))
        self.epoch, self.done = 1, 0

    def __len__(self) -> int:
        """Return how many batches an epoch has."""
        return len(self.bounds)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process' places of each batch of the epoch that `epoch` says, counted from 1, behind the first
        `done`."""
        for batch in self._batches()[self.done :]:
            marked = self.epoch * len(self.ratios) if self.marks_epochs else 0
            yield [marked + place for place in batch[self.rank :: self.processes]]

    def _batches(self) -> list[list[int]]:
        """Return the places of each batch of the epoch, over all processes."""
        count = len(self.ratios)
        if self.seed is None:
            places = sorted(range(count), key=self.ratios.__getitem__)
            return [places[start:end] for start, end in self.bounds]
        draw = np.random.default_rng([self.seed, self.epoch])
        drawn, near = draw.permutation(count).tolist(), SORT_WINDOW * self.batch_size
        windows = (sorted(drawn[at : at + near], key=self.ratios.__getitem__) for at in range(0, count, near))
        places = [place for window in windows for place in window]
        batches = [places[start:end] for start, end in self.bounds]
        # A smaller batch stays the last. Before it, a window's tall images are not always followed by its wide ones.
        return [*(batches[at] for at in draw.permutation(len(batches) - 1)), batches[-1]]


class _Carrier(Dataset[Any]):
    """A data set that hands over what went wrong instead of raising it.

    Raised in a worker process, an error would reach the user with that process's traceback pasted into its message.
    """

    def __init__(self, items: Dataset[Any]) -> None:
        self.items = items

    def __getitem__(self, place: int) -> Any:
        try:
            return self.items[place]
        except FlawmaskError as error:
            return error


def _collate(collate: Callable[[Sequence[Any]], Any], items: Sequence[Any]) -> Any:
    failed = next((item for item in items if isinstance(item, FlawmaskError)), None)
    return collate(items) if failed is None else failed


def read(batches: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of one epoch.

    Raises:
        FlawmaskError: an image cannot be read, or does not fit its record.
    """
    under_way = iter(batches)
    for worker in getattr(under_way, "_workers", ()):
        # PyTorch terminates one that has not ended after seconds, and Python one that is left at its own end, which
        # `_prepared` lets it ignore: one that hangs in a read, on a mount that is gone, would be waited for for ever.
        # It has nothing to put in order.
        worker._popen.terminate = partial(_kill, weakref.ref(under_way), worker._popen)
    for batch in under_way:
        if isinstance(batch, FlawmaskError):
            try:
                raise batch
            finally:
                del batch  # or the error and this frame hold each other, and the loader with its processes too
        yield batch


def _kill(iterator: Callable[[], Any], process: Any) -> None:
    """End a reading process that PyTorch need not mind: it raises, in whatever is done then, where one was killed."""
    under_way = iterator()
    if under_way is not None and under_way._worker_pids_set:
        torch._C._remove_worker_pids(id(under_way))
        under_way._worker_pids_set = False
    process.kill()


def make_loader(
    items: Dataset[Any],
    order: Sampler[list[int]],
    *,
    workers: int | None,
    pin: bool,
    collate: Callable[[Sequence[Any]], Any] = Batch.of,
) -> DataLoader[Any]:
    """Return a loader of batches, to be gone through with `read`.

    Args:
        items: what to read.
        order: in which batches.
        workers: reading processes; None for as many as `default_workers` returns; 0 reads in this process.
        pin: hand tensors over in page-locked memory, for CUDA.
        collate: makes a batch of a list of items; of a `SplitDataset`'s, a `Batch`.
    """
    count = default_workers(on_cuda=pin) if workers is None else workers
    return DataLoader(
        _Carrier(items),
        batch_sampler=order,
        num_workers=count,
        collate_fn=partial(_collate, collate),
        pin_memory=pin,
        persistent_workers=count > 0,
        # The loader draws a seed for its workers: from its own generator, not from the one that the network draws from.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_prepared,
    )


def default_workers(*, on_cuda: bool) -> int:
    """Return how many processes read for one that trains: one less than it has cores, 4 at most where it computes on
    the same cores, and 16 at most beside a GPU."""
    if on_cuda:
        return min(MAX_WORKERS, cores_of_each_process() - 1)
    return min(4, usable_cores() - 1)


def _prepared(_: int) -> None:
    """Keep a reading process' memory for its next image, and let it live on when the whole group is told to stop: the
    one that it reads for ends it."""
    own_process()
    keep_freed_memory(torch.device("cpu"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
