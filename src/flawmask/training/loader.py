"""Reads a split from disk as batches of tensors. The order depends on the seed and the epoch only."""

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
from flawmask.coco import CocoSplit, Record, annotation, instance_masks, without_crowds
from flawmask.errors import FlawmaskError
from flawmask.launch import cores_of_each_process, own_process, usable_cores
from flawmask.model import targets
from flawmask.model.layers import padded_shape, stacked, upload
from flawmask.model.spec import ModelSpec
from flawmask.model.targets import Target, make_target
from flawmask.runtime import keep_freed_memory
from flawmask.settings import require
from flawmask.training.augmentation import Augmentation
from flawmask.training.cache import PixelCache

SORT_WINDOW = 8
"""Batches per aspect-ratio sorting window. Larger windows mean less padding and a less random order."""

MAX_WORKERS = 16
"""The most reading processes per training process on a GPU, by default. Each keeps a batch or two of images ready."""

Item = tuple[Tensor, Target]

Transform = Callable[
    [npt.NDArray[np.uint8], npt.NDArray[np.bool_], list[str], np.random.Generator],
    tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], list[str]],
]
"""An augmentation: a function that changes a training image each time that it is shown.

It takes the image, (height, width, 3) uint8 RGB; the masks of its N instances, (N, height, width) bool; their N class
names; and a random generator. It returns an image, masks and names. These may have any size and any number of
instances, and the inputs may be changed in place.

The generator is seeded by the seed, the epoch and the image. If all randomness comes from it, a resumed training gives
the same result to the bit. Processes that read images call the function. Where they are not forked, it must be
picklable: a function of a module, for example.
"""


@dataclass(frozen=True)
class Augmenting:
    """A transform, and the seed of its random generators."""

    transform: Transform
    seed: int

    @property
    def of_resized(self) -> Augmentation | None:
        """The transform, if it can be applied to resized images with their targets; None if it cannot."""
        transform = self.transform
        return transform if type(transform) is Augmentation and not transform.needs_whole_images else None

    def generator(self, epoch: int, image_id: int) -> np.random.Generator:
        """Return the random generator of an image in an epoch."""
        return np.random.default_rng([self.seed, epoch, image_id])


@dataclass(frozen=True)
class Batch:
    """Images with their targets. The pixels are one tensor, so that a GPU receives them in one transfer.

    Attributes:
        pixels: (B, H, W, 3) uint8. Each image lies in the upper left corner of its slice, with zeros as padding. H and
            W are multiples of `STRIDE`.
        sizes: height and width of each image, without padding.
        targets: one for each image.
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
        """Return the number of images."""
        return len(self.sizes)

    @property
    def images(self) -> list[Tensor]:
        """The images without padding, (3, height, width) uint8 each; no copies."""
        pairs = zip(self.pixels, self.sizes, strict=True)
        return [pixels[:height, :width].permute(2, 0, 1) for pixels, (height, width) in pairs]

    def parts(self, at_most: int) -> Iterator["Batch"]:
        """Yield the batch as micro-batches of at most `at_most` images. Each is padded for its own images only."""
        for start in range(0, len(self), at_most):
            part = slice(start, start + at_most)
            height, width = padded_shape(self.sizes[part])
            yield Batch(self.pixels[part, :height, :width], self.sizes[part], self.targets[part])

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory. PyTorch's loader calls this."""
        pinned = [{name: tensor.pin_memory() for name, tensor in target.items()} for target in self.targets]
        return replace(self, pixels=self.pixels.pin_memory(), targets=pinned)

    def on(self, device: torch.device) -> tuple[list[Tensor], list[Target]]:
        """Return the images and the targets on the device; `targets.to_device` leaves some tensors on the CPU."""
        moved = replace(self, pixels=upload(self.pixels, device))
        return moved.images, [targets.to_device(one, device) for one in self.targets]


class SplitDataset(Dataset[Item]):
    """The images of a split, resized as the network needs them, with their targets.

    An item is a (3, H, W) uint8 image and its `Target`.
    """

    def __init__(
        self,
        split: CocoSplit,
        spec: ModelSpec,
        cache: PixelCache | None = None,
        augmenting: Augmenting | None = None,
    ) -> None:
        """Take the split. Images are read on access.

        Args:
            split: the split to read.
            spec: of the network; it says how images are resized.
            cache: for resized images, or for whole ones to augment, made for `cached_shapes`; None caches nothing.
            augmenting: the augmentation of each image. It needs the places of an `Order` with `marks_epochs`.
        """
        self.split, self.spec = split, spec
        self.shapes = resized_shapes(split, spec)
        self.cache, self.augmenting = cache, augmenting

    @property
    def changes(self) -> bool:
        """Whether an epoch shows other pixels than the epoch before."""
        return self.augmenting is not None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.split.images)

    def lies_on_its_side(self, epoch: int, place: int) -> bool:
        """Return whether the image at a place has its rows and columns exchanged in an epoch, as far as that can be
        known without reading it."""
        transform = self.augmenting.of_resized if self.augmenting is not None else None
        if self.augmenting is None or transform is None:
            return False
        return transform.transposes(self.augmenting.generator(epoch, self.split.images[place]["id"]))

    def __getitem__(self, place: int) -> Item:
        """Return the image and target at a place in the split's order.

        Raises:
            FlawmaskError: the image cannot be read, or its size differs from its record.
        """
        if self.augmenting is None:
            pixels, target = self._resized(place)
            return torch.from_numpy(np.array(pixels)).permute(2, 0, 1), target
        epoch, place = divmod(place, len(self))
        transform = self.augmenting.of_resized
        if transform is None:
            return self._augmented(self.augmenting, epoch, place)
        draw = self.augmenting.generator(epoch, self.split.images[place]["id"])
        pixels, target = transform.of_resized(*self._resized(place), draw)
        return torch.from_numpy(pixels).permute(2, 0, 1), target

    def _resized(self, place: int) -> tuple[npt.NDArray[np.uint8], Target]:
        """Return a resized image, not to be written to, and its target. The cache has to be one of resized images."""
        record = self.split.images[place]
        where = str(self.split.image_path(record))
        pixels = self.cache.get(place) if self.cache else None
        if pixels is None:
            pixels = self._read_resized(place)
            if self.cache:
                self.cache.put(place, pixels)
        original = (record["height"], record["width"])
        annotations = self.split.annotations[record["id"]]
        return pixels, make_target(annotations, self.split.labels, record["id"], original, self.shapes[place], where)

    def _augmented(self, augmenting: Augmenting, epoch: int, place: int) -> Item:
        record = self.split.images[place]
        path = self.split.image_path(record)
        changed = self._transformed(
            augmenting,
            self._read_whole(place).copy(),
            *instances_of(self.split, record),
            augmenting.generator(epoch, record["id"]),
            str(path),
        )
        return self._item(*changed, record["id"], str(path))

    def _transformed(
        self,
        augmenting: Augmenting,
        pixels: npt.NDArray[np.uint8],
        stack: npt.NDArray[np.bool_],
        names: list[str],
        draw: np.random.Generator,
        where: str,
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], list[str]]:
        """Return what the transform makes of an image, after checking it."""
        pixels, changed, labels = augmenting.transform(pixels, stack, names, draw)
        fits = (
            pixels.dtype == np.uint8 and pixels.shape[2:] == (3,) and changed.shape == (len(labels), *pixels.shape[:2])
        )
        require(fits and changed.dtype == bool, f"{where}: the transform returned no image with masks of its size")
        unknown = set(labels) - self._labels.keys()
        require(not unknown, f"{where}: the transform returned {', '.join(map(repr, unknown))}, which is no class")
        return pixels, changed, labels

    def _item(
        self, pixels: npt.NDArray[np.uint8], stack: npt.NDArray[np.bool_], names: list[str], image_id: int, where: str
    ) -> Item:
        """Return an image, resized, and the target of its instances: their masks, (N, height, width), and classes."""
        size = pixels.shape[:2]
        resized = self.spec.resized(*size)
        records = [
            annotation(mask, id=number, image_id=image_id, category_id=self._labels[name])
            for number, (mask, name) in enumerate(zip(stack, names, strict=True))
            if mask.any()
        ]
        same_labels = {label: label for label in self._labels.values()}
        target = make_target(records, same_labels, image_id, size, resized, where)
        return torch.from_numpy(images.resize(pixels, resized)).permute(2, 0, 1), target

    @property
    def _labels(self) -> dict[str, int]:
        """The network's label of each class name."""
        return {name: label for label, name in enumerate(self.split.class_names, start=1)}

    def _read_whole(self, place: int) -> npt.NDArray[np.uint8]:
        """Return an image as it is, not to be written to. The cache has to be one of whole images."""
        pixels = self.cache.get(place) if self.cache else None
        if pixels is None:
            pixels = self._read_original(place)
            if self.cache:
                self.cache.put(place, pixels)
        return pixels

    def _read_resized(self, place: int) -> npt.NDArray[np.uint8]:
        return images.resize(self._read_original(place), self.shapes[place])

    def _read_original(self, place: int) -> npt.NDArray[np.uint8]:
        record = self.split.images[place]
        path = self.split.image_path(record)
        pixels = images.read_image(path, self.spec.intensity)
        height, width = pixels.shape[:2]
        if (record["height"], record["width"]) != (height, width):
            recorded = f"{record['width']}x{record['height']}"
            raise FlawmaskError(
                f"{path} is {width}x{height} but its record says {recorded}: export the annotations again"
            )
        return pixels


def instances_of(split: CocoSplit, record: Record) -> tuple[npt.NDArray[np.bool_], list[str]]:
    """Return the masks, (N, height, width) bool, and the class names of an image's instances, without crowds.

    Instances without a pixel are left out.
    """
    size = (record["height"], record["width"])
    single = without_crowds(split.annotations[record["id"]])
    masks = instance_masks(single, *size, str(split.image_path(record)))
    kept = [(mask, one) for mask, one in zip(masks, single, strict=True) if mask.any()]
    names = [split.class_names[split.labels[one["category_id"]] - 1] for _, one in kept]
    return np.array([mask for mask, _ in kept], dtype=bool).reshape(-1, *size), names


def resized_shapes(split: CocoSplit, spec: ModelSpec) -> list[tuple[int, int]]:
    """Return the height and width of each image after resizing for the network."""
    return [spec.resized(image["height"], image["width"]) for image in split.images]


class Order(Sampler[list[int]]):
    """The order of images in an epoch: the places of each batch, divided into one shard per process.

    A batch has `batch_size` images over all processes. The last batch takes the remaining images. If they are fewer
    than the processes, they join the batch before, so that each process has an image. No image is shown twice.

    The images of one batch are padded to a common size. To keep padding small, the shuffled images are sorted by aspect
    ratio within windows of `SORT_WINDOW` batches, and then cut into batches. For magnetic tiles, whose sides differ by
    up to 2.7 times, random batches of 4 have 1.97 times the pixels of their images; these batches have 1.20 times.
    If half of the images are laid on their sides, they are sorted as they lie: 1.16 instead of 1.68 times.
    torchvision's reference scripts sort images for the same reason, but into fixed groups.
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
        lies_on_its_side: Callable[[int, int], bool] | None = None,
    ) -> None:
        """Lay out the batches.

        Args:
            shapes: height and width of each image, as `resized_shapes` returns them.
            batch_size: images per step, over all processes.
            seed: decides the order of each epoch. None sorts all images by aspect ratio, the same in each epoch.
            rank: the number of this process, from 0.
            processes: the number of processes.
            marks_epochs: add `epoch * number of images` to each place, so that the data set can tell the epoch.
            lies_on_its_side: tells of an epoch and a place whether the image's rows and columns are exchanged.
        """
        self.marks_epochs, self.lies_on_its_side = marks_epochs, lies_on_its_side
        self.ratios = [height / width for height, width in shapes]
        self.batch_size, self.seed, self.rank, self.processes = batch_size, seed, rank, processes
        ends = list(range(batch_size, len(shapes), batch_size))
        if ends and len(shapes) - ends[-1] < processes:
            ends.pop()
        self.bounds = list(zip([0, *ends], [*ends, len(shapes)], strict=True))
        self.epoch, self.done = 1, 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self.bounds)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process' places of each batch of the epoch `epoch`, counted from 1. The first `done` batches are
        left out."""
        for batch in self._batches()[self.done :]:
            marked = self.epoch * len(self.ratios) if self.marks_epochs else 0
            yield [marked + place for place in batch[self.rank :: self.processes]]

    def _batches(self) -> list[list[int]]:
        """Return the places of each batch of the epoch, over all processes."""
        count = len(self.ratios)
        if self.seed is None:
            places = sorted(range(count), key=self.ratios.__getitem__)
            return [places[start:end] for start, end in self.bounds]
        draw, ratios = np.random.default_rng([self.seed, self.epoch]), self.ratios
        if self.lies_on_its_side is not None:
            turned = [self.lies_on_its_side(self.epoch, place) for place in range(count)]
            ratios = [1 / ratio if sideways else ratio for ratio, sideways in zip(ratios, turned, strict=True)]
        shuffled, length = draw.permutation(count).tolist(), SORT_WINDOW * self.batch_size
        windows = (sorted(shuffled[at : at + length], key=ratios.__getitem__) for at in range(0, count, length))
        places = [place for window in windows for place in window]
        batches = [places[start:end] for start, end in self.bounds]
        # Shuffle the batches, so that wide images do not always come before tall ones. A smaller batch stays the last.
        return [*(batches[at] for at in draw.permutation(len(batches) - 1)), batches[-1]]


class _ErrorsReturned(Dataset[Any]):
    """A data set that returns a `FlawmaskError` as an item instead of raising it.

    PyTorch would add the traceback of the worker process to the message of an error that is raised there.
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
        FlawmaskError: an image cannot be read, or its size differs from its record.
    """
    iterator = iter(batches)
    for worker in getattr(iterator, "_workers", ()):
        # PyTorch sends SIGTERM to a worker that does not end within seconds, and so does Python at exit. Workers ignore
        # SIGTERM (`_set_up_worker`), so one that hangs in a read, on a lost mount for example, would be waited for
        # forever. Killing it is safe, because it has nothing to clean up.
        worker._popen.terminate = partial(_kill, weakref.ref(iterator), worker._popen)
    for batch in iterator:
        if isinstance(batch, FlawmaskError):
            try:
                raise batch
            finally:
                # Otherwise the error and this frame refer to each other and keep the loader with its processes alive.
                del batch
        yield batch


def _kill(loader_iterator: Callable[[], Any], process: Any) -> None:
    """Kill a reading process. First PyTorch has to stop watching it: it raises an error when a watched process is
    killed, in whatever code runs at that moment."""
    iterator = loader_iterator()
    if iterator is not None and iterator._worker_pids_set:
        torch._C._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    process.kill()


def make_loader(
    items: Dataset[Any],
    order: Sampler[list[int]],
    *,
    workers: int | None,
    pin: bool,
    collate: Callable[[Sequence[Any]], Any] = Batch.of,
) -> DataLoader[Any]:
    """Return a loader of batches. Iterate over it with `read`.

    Args:
        items: the data set to read.
        order: the places of each batch.
        workers: the number of reading processes; None means `default_workers`; 0 reads in this process.
        pin: return tensors in page-locked memory, for CUDA.
        collate: makes a batch from a list of items. The default is for the items of a `SplitDataset`.
    """
    count = default_workers(on_cuda=pin) if workers is None else workers
    return DataLoader(
        _ErrorsReturned(items),
        batch_sampler=order,
        num_workers=count,
        collate_fn=partial(_collate, collate),
        pin_memory=pin,
        persistent_workers=count > 0,
        # The loader draws a seed for its workers. With a generator of its own, it leaves the network's generator alone.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_set_up_worker,
    )


def default_workers(*, on_cuda: bool) -> int:
    """Return the default number of reading processes per training process: its cores minus one.

    The limit is 4 where the network computes on the same cores, and 16 where it computes on a GPU.
    """
    if on_cuda:
        return min(MAX_WORKERS, cores_of_each_process() - 1)
    return min(4, usable_cores() - 1)


def _set_up_worker(_: int) -> None:
    """Prepare a reading process: it keeps its memory for the next image, and it ignores Ctrl-C and SIGTERM.

    These signals go to the whole process group. The training process saves first and then ends its reading processes.
    """
    own_process()
    keep_freed_memory(torch.device("cpu"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
