"""An image in, its instances out: at the image's own size, in float32, and the same whatever was asked before."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flawmask import images, masks, torchvision_alone  # noqa: F401  # before what imports torchvision
from flawmask.coco import GOOD
from flawmask.errors import FlawmaskError
from flawmask.inference.config import MAX_PROPOSALS, SCORE_FLOOR, InferenceSettings
from flawmask.inference.paste import grown, mask_changes, probabilities_in_box
from flawmask.masks import Mask
from flawmask.model import checkpoint
from flawmask.model.build import detector_of, made_fast, set_score_floor
from flawmask.model.layers import upload
from flawmask.model.spec import ModelSpec
from flawmask.runtime import choose_device, choose_precision, ieee_float32, keep_freed_memory, on_device
from flawmask.settings import Precision


@dataclass(frozen=True)
class Instance:
    """One thing found on an image.

    Attributes:
        label: the class's name.
        score: 0 to 1.
        box: (x1, y1, x2, y2) in pixels of the image, edges of the box.
        rle: the mask as compressed COCO RLE at the image's size; of a detector without masks, the box's pixels.
        area: how many pixels these are.
        probabilities: (28, 28) float32, how likely each cell of the box belongs to it; None: only the mask is known.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    rle: dict[str, Any]
    area: int
    probabilities: npt.NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    @property
    def is_defect(self) -> bool:
        """Whether the class is a defect."""
        return self.label != GOOD

    @property
    def xywh(self) -> list[float]:
        """The box as COCO writes it: [x, y, width, height]."""
        x1, y1, x2, y2 = self.box
        return [x1, y1, x2 - x1, y2 - y1]

    @property
    def mask(self) -> Mask:
        """The mask: (height, width) bool, at the image's size."""
        return masks.decode(self.rle, *self.rle["size"])


@dataclass(frozen=True)
class Verdict:
    """Good or defect.

    Attributes:
        is_defect: whether the image is rejected.
        score: the highest score of a defect instance, 0 where there is none.
    """

    is_defect: bool
    score: float


@dataclass(frozen=True)
class Prediction:
    """What was found on one image.

    Attributes:
        height: the image's, in pixels.
        width: the image's, in pixels.
        instances: everything above the score floor, 0.05 by default, of every class, the highest score first.
        has_masks: whether the network outlines what it finds; if not, boxes stand in for masks.
    """

    height: int
    width: int
    instances: tuple[Instance, ...]
    has_masks: bool = True

    def defects(self, conf: float = 0.0, min_area: int = 0) -> list[Instance]:
        """Return the defect instances that score at least `conf` and cover at least `min_area` pixels."""
        return [
            instance
            for instance in self.instances
            if instance.is_defect and instance.score >= conf and instance.area >= min_area
        ]

    def verdict(self, conf: float = 0.5, min_area: int = 0) -> Verdict:
        """Return whether any defect instance scores at least `conf` and covers at least `min_area` pixels."""
        score = max((instance.score for instance in self.defects(min_area=min_area)), default=0.0)
        return Verdict(bool(self.defects(conf, min_area)), score)

    def defect_mask(self, conf: float = 0.5, min_area: int = 0) -> Mask:
        """Return the union of the defect instances' masks: (height, width) bool."""
        return masks.decode(self._union(conf, min_area), self.height, self.width)

    def defect_area(self, conf: float = 0.5, min_area: int = 0) -> int:
        """Return how many pixels the defect instances cover together, without laying out a mask."""
        return masks.area(self._union(conf, min_area))

    def _union(self, conf: float, min_area: int) -> dict[str, Any]:
        return masks.union([one.rle for one in self.defects(conf, min_area)], self.height, self.width)

    def score_map(self, min_area: int = 0) -> npt.NDArray[np.float32]:
        """Return how sure the network is of a defect at each pixel: (height, width), 0 to 1, 0 outside all boxes.

        It is the highest score x mask probability over the defect instances whose box holds the pixel; an instance of
        which only the mask is known has a probability of 1 in it.
        """
        scores = np.zeros((self.height, self.width), dtype=np.float32)
        for instance in self.defects(min_area=min_area):
            if instance.probabilities is None:
                window, local = np.s_[0 : self.height, 0 : self.width], instance.mask.astype(np.float32)
            else:
                (box,) = grown(np.array([instance.box], dtype=np.float32), len(instance.probabilities))
                local, x, y = probabilities_in_box(instance.probabilities, box, self.height, self.width)
                window = np.s_[y : y + local.shape[0], x : x + local.shape[1]]
            scores[window] = np.maximum(scores[window], np.float32(instance.score) * local)
        return scores

    def within(self, region: Mask) -> "Prediction":
        """Return the prediction with defects cut to the region; those wholly outside it are gone.

        Args:
            region: (height, width) bool, True where defects count.

        Raises:
            FlawmaskError: the region is of another size than the image.
        """
        if region.shape != (self.height, self.width):
            raise FlawmaskError(
                f"the region of interest is {region.shape[1]}x{region.shape[0]} but the image is "
                f"{self.width}x{self.height}: draw it at the images' size"
            )
        rle = masks.to_rle(region)
        return replace(self, instances=tuple(cut for one in self.instances if (cut := _cut(one, rle)) is not None))


def _cut(instance: Instance, region: dict[str, Any]) -> Instance | None:
    """Return the instance with its mask cut to the region, an RLE; None for a defect of which nothing is left."""
    if not instance.is_defect:
        return instance
    rle = masks.intersection(instance.rle, region)
    area = masks.area(rle)
    if not area:
        return None
    x, y, width, height = masks.box_of_rle(rle)
    box = (float(x), float(y), float(x + width), float(y + height))
    return replace(instance, box=box, rle=rle, area=area, probabilities=None)


class Predictor:
    """A trained network that says what is wrong with an image.

    >>> predictor = Predictor("best.pt")                  # doctest: +SKIP
    >>> prediction = predictor("part.png")                # doctest: +SKIP
    >>> prediction.verdict(conf=0.5).is_defect            # doctest: +SKIP
    True
    """

    def __init__(
        self,
        model: str | Path,
        device: str | None = None,
        *,
        precision: Precision = "auto",
        score_floor: float = SCORE_FLOOR,
        max_proposals: int = MAX_PROPOSALS,
    ) -> None:
        """Load a checkpoint.

        Args:
            model: `best.pt` or `last.pt` of a run, or a state dict of torchvision's maskrcnn_resnet50_fpn.
            device: `cuda`, `cuda:1`, `mps` or `cpu`; by default the first that is there.
            precision: what the layers compute in; boxes and scores are float32 in any case.
            score_floor: detections that score no more than this are dropped, 0 to 1.
            max_proposals: regions of an image that the heads look at; never more than the checkpoint says.

        Raises:
            FlawmaskError: the file is no checkpoint, or the device or the precision is not there.
        """
        self.device = choose_device(device)
        keep_freed_memory(self.device)
        with on_device(self.device):
            dtype = choose_precision(precision, self.device)
            network, self.spec = checkpoint.load(Path(model), max_proposals)
            self.network = made_fast(network, self.spec, self.device, dtype)
            set_score_floor(self.network, score_floor)

    @classmethod
    def of(cls, model: Path, settings: InferenceSettings) -> "Predictor":
        """Load a checkpoint with the settings of a stage."""
        return cls(
            model,
            settings.device,
            precision=settings.precision,
            score_floor=settings.score_floor,
            max_proposals=settings.max_proposals,
        )

    def __call__(self, image: str | Path | npt.NDArray[np.uint8]) -> Prediction:
        """Return what is on the image.

        Args:
            image: a file, or (height, width, 3) uint8 RGB.

        Raises:
            ImageError: the file cannot be read as an image.
            ValueError: the array is of another shape or type.
        """
        pixels = image if isinstance(image, np.ndarray) else images.read_image(Path(image))
        return detect(self.network, self.spec, pixels)


def detect(network: nn.Module, spec: ModelSpec, pixels: npt.NDArray[np.uint8]) -> Prediction:
    """Return what the network, in evaluation mode, finds on one image: (height, width, 3) uint8 RGB.

    Raises:
        ValueError: the array is of another shape or type.
    """
    (found,) = infer(network, spec, [pixels])
    return finish(found, spec, *pixels.shape[:2])


def infer(network: nn.Module, spec: ModelSpec, batch: Sequence[npt.NDArray[np.uint8]]) -> list[dict[str, Tensor]]:
    """Return what the network finds on each image, on the CPU: `boxes` (N, 4) in pixels of the image, `labels` (N,),
    `scores` (N,) and, where it outlines what it finds, `masks` (N, 1, M, M) probabilities inside the box; see `finish`.

    Args:
        network: in evaluation mode.
        spec: what it was built from.
        batch: at least one image, each (height, width, 3) uint8 RGB, whose `ModelSpec.padded` is the same: an image
            among larger ones would be padded more than it is alone, which gives other results.

    Raises:
        ValueError: an array is not (height, width, 3) uint8, or one would be padded more than alone.
    """
    return infer_resized(network, spec, [resized(pixels, spec) for pixels in batch], [one.shape[:2] for one in batch])


def resized(pixels: npt.NDArray[np.uint8], spec: ModelSpec) -> npt.NDArray[np.uint8]:
    """Return the image, (height, width, 3) uint8 RGB, at the size at which the network sees it.

    Raises:
        ValueError: the array is of another shape or type.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"an image is (height, width, 3) uint8 RGB, not {pixels.shape} {pixels.dtype}")
    return images.resize(pixels, spec.resized(*pixels.shape[:2]))


@torch.inference_mode()
def infer_resized(
    network: nn.Module,
    spec: ModelSpec,
    batch: Sequence[npt.NDArray[np.uint8]],
    sizes: Sequence[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    """Return what `infer` returns, of images that are resized already.

    To a GPU they go as whole numbers, in one piece that the system may not move, and what is found comes back in one.

    Args:
        network: in evaluation mode.
        spec: what it was built from.
        batch: at least one image as `resized` returns it, all with the same `ModelSpec.padded`.
        sizes: height and width of each as it was.

    Raises:
        ValueError: an image would be padded more than alone.
    """
    for size in sizes:
        if spec.padded(*size) != spec.padded(*sizes[0]):
            one, other = spec.padded(*sizes[0]), spec.padded(*size)
            raise ValueError(f"images of one batch are of one size once they are padded, not {one} and {other}")
    device = next(network.parameters()).device
    with on_device(device), ieee_float32():
        found = detector_of(spec).infer(network, uploaded(batch, device), sizes)
        return found if device.type == "cpu" else downloaded(found)


def uploaded(batch: Sequence[npt.NDArray[np.uint8]], device: torch.device) -> list[Tensor]:
    """Return (height, width, 3) uint8 images as (3, height, width) on the device, copied there at once."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1) for pixels in batch]
    flat = torch.empty(sum(pixels.size for pixels in batch), dtype=torch.uint8, pin_memory=device.type == "cuda")
    parts = torch.split(flat, [pixels.size for pixels in batch])
    for part, pixels in zip(parts, batch, strict=True):
        part.numpy()[:] = pixels.ravel()
    there = torch.split(upload(flat, device), [pixels.size for pixels in batch])
    return [one.view(pixels.shape).permute(2, 0, 1) for one, pixels in zip(there, batch, strict=True)]


def downloaded(found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return what was found on each image of a batch on the CPU, copied there at once.

    One copy of each tensor would make the processor wait for the device as often as there are tensors.

    Args:
        found: tensors by name, the same names for each image, of float32 or of whole numbers below 2^24.
    """
    tensors = [tensor for one in found for tensor in one.values()]
    flat = torch.cat([tensor.to(torch.float32).flatten() for tensor in tensors])
    host = torch.empty(flat.shape, dtype=torch.float32, pin_memory=flat.device.type == "cuda")
    # Copied once more: memory that the system may not move is dear, and predictions may be kept for long.
    parts = iter(torch.split(host.copy_(flat).clone(), [tensor.numel() for tensor in tensors]))
    return [{name: next(parts).view(tensor.shape).to(tensor.dtype) for name, tensor in one.items()} for one in found]


def finish(found: dict[str, Tensor], spec: ModelSpec, height: int, width: int) -> Prediction:
    """Return what `infer` found as instances, whose masks never leave their boxes.

    Args:
        found: what `infer` returned for the image.
        spec: the network's, for the classes' names.
        height: the image's.
        width: the image's.
    """
    if "masks" not in found:
        return _of_boxes(found, spec, height, width)
    boxes, probabilities = found["boxes"].numpy(), found["masks"].numpy()[:, 0]
    instances = []
    for at, box in enumerate(grown(boxes, probabilities.shape[-1])):
        rle, area = masks.rle_of_changes(mask_changes(probabilities[at], box, height, width), height, width)
        x1, y1, x2, y2 = boxes[at].tolist()
        label, score = spec.classes[int(found["labels"][at]) - 1], float(found["scores"][at])
        instances.append(Instance(label, score, (x1, y1, x2, y2), rle, area, probabilities[at]))
    return Prediction(height, width, tuple(sorted(instances, key=lambda instance: -instance.score)))


def _of_boxes(found: dict[str, Tensor], spec: ModelSpec, height: int, width: int) -> Prediction:
    """Return boxes as instances: those that lie on the image, at least in part."""
    instances = []
    for (x1, y1, x2, y2), label, score in zip(
        found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
    ):
        box = (max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2))
        rle = masks.rle_of_box(box, height, width)
        if area := masks.area(rle):
            instances.append(Instance(spec.classes[label - 1], score, box, rle, area))
    return Prediction(height, width, tuple(sorted(instances, key=lambda instance: -instance.score)), has_masks=False)


def check_classes(spec: ModelSpec, class_names: Sequence[str], where: Path) -> None:
    """Refuse a model and a data set that do not speak of the same classes.

    Raises:
        FlawmaskError: the names differ.
    """
    if set(spec.classes) != set(class_names):
        raise FlawmaskError(
            f"the checkpoint knows the classes {', '.join(spec.classes)}, but {where} has {', '.join(class_names)}: "
            "they must be the same"
        )
