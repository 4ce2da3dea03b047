"""An image in, its instances out: at the image's own size, in float32, and the same whatever was asked before."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN

from flawmask import images, masks
from flawmask.coco import GOOD
from flawmask.errors import FlawmaskError
from flawmask.masks import Mask
from flawmask.model import checkpoint
from flawmask.model.build import ModelSpec, to_device
from flawmask.runtime import choose_device

MASK_THRESHOLD = 0.5
"""A pixel belongs to an instance where the network holds that more likely than not."""


@dataclass(frozen=True)
class Instance:
    """One thing found on an image.

    Attributes:
        label: the class's name.
        score: 0 to 1.
        box: (x1, y1, x2, y2) in pixels of the image, edges of the box.
        rle: the mask as compressed COCO RLE at the image's size.
        area: how many pixels the mask has.
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
        instances: everything above the model's score floor of 0.05, of every class, the highest score first.
    """

    height: int
    width: int
    instances: tuple[Instance, ...]

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
        union = np.zeros((self.height, self.width), dtype=bool)
        for instance in self.defects(conf, min_area):
            union |= instance.mask
        return union

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
                box = torch.tensor(instance.box)
                local, x, y = _in_box(torch.from_numpy(instance.probabilities), box, self.height, self.width)
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
        return replace(self, instances=tuple(cut for one in self.instances if (cut := _cut(one, region)) is not None))


def _cut(instance: Instance, region: Mask) -> Instance | None:
    """Return the instance with its mask cut to the region; None for a defect of which nothing is left."""
    if not instance.is_defect:
        return instance
    mask = instance.mask & region
    if not mask.any():
        return None
    x, y, width, height = masks.box_of(mask)
    box = (float(x), float(y), float(x + width), float(y + height))
    return replace(instance, box=box, rle=masks.to_rle(mask), area=int(mask.sum()), probabilities=None)


class Predictor:
    """A trained network that says what is wrong with an image.

    >>> predictor = Predictor("best.pt")                  # doctest: +SKIP
    >>> prediction = predictor("part.png")                # doctest: +SKIP
    >>> prediction.verdict(conf=0.5).is_defect            # doctest: +SKIP
    True
    """

    def __init__(self, model: str | Path, device: str | None = None) -> None:
        """Load a checkpoint.

        Args:
            model: `best.pt` or `last.pt` of a run, or a state dict of torchvision's maskrcnn_resnet50_fpn.
            device: `cuda`, `cuda:1`, `mps` or `cpu`; by default the first that is there.

        Raises:
            FlawmaskError: the file is no checkpoint, or the device is not there.
        """
        self.device = choose_device(device)
        network, self.spec = checkpoint.load(Path(model))
        self.network = to_device(network, self.device)

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


def detect(network: MaskRCNN, spec: ModelSpec, pixels: npt.NDArray[np.uint8]) -> Prediction:
    """Return what the network, in evaluation mode, finds on one image: (height, width, 3) uint8 RGB.

    Raises:
        ValueError: the array is of another shape or type.
    """
    return finish(infer(network, pixels), spec, *pixels.shape[:2])


@torch.inference_mode()
def infer(network: MaskRCNN, pixels: npt.NDArray[np.uint8]) -> dict[str, Tensor]:
    """Return what torchvision's Mask R-CNN finds, but for the last step, on the CPU: `boxes` (N, 4) in pixels of the
    image, `labels` (N,), `scores` (N,), `masks` (N, 1, 28, 28) probabilities inside the box.

    These are the steps of `GeneralizedRCNN.forward`. The last would paste each mask into a float image of its own,
    400 MB for 100 detections on 1024 x 1024; see `finish`.

    Raises:
        ValueError: the array is not (height, width, 3) uint8.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"an image is (height, width, 3) uint8 RGB, not {pixels.shape} {pixels.dtype}")
    height, width = pixels.shape[:2]
    device = next(network.parameters()).device
    image = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(2, 0, 1).float() / 255
    batch, _ = network.transform([image])
    features = network.backbone(batch.tensors)
    proposals, _ = network.rpn(batch, features)
    (found,), _ = network.roi_heads(features, proposals, batch.image_sizes)
    resized_height, resized_width = batch.image_sizes[0]
    # In float32, as torchvision does it: the last bit decides which pixel a box's edge falls on.
    ratio = torch.tensor([width / resized_width, height / resized_height] * 2, dtype=torch.float32, device=device)
    return {name: tensor.cpu() for name, tensor in {**found, "boxes": found["boxes"] * ratio}.items()}


def finish(found: dict[str, Tensor], spec: ModelSpec, height: int, width: int) -> Prediction:
    """Return what `infer` found as instances, whose masks never leave their boxes.

    Args:
        found: what `infer` returned.
        spec: the network's, for the classes' names.
        height: the image's.
        width: the image's.
    """
    instances = [
        _instance(spec.classes[int(label) - 1], float(score), box, mask[0], height, width)
        for label, score, box, mask in zip(
            found["labels"], found["scores"], found["boxes"], found["masks"], strict=True
        )
    ]
    return Prediction(height, width, tuple(sorted(instances, key=lambda instance: -instance.score)))


def _instance(label: str, score: float, box: Tensor, probabilities: Tensor, height: int, width: int) -> Instance:
    local, x, y = mask_in_box(probabilities, box, height, width)
    x1, y1, x2, y2 = (float(side) for side in box)
    rle = masks.place_rle(local, x, y, height, width)
    return Instance(label, score, (x1, y1, x2, y2), rle, int(local.sum()), probabilities.numpy())


def mask_in_box(probabilities: Tensor, box: Tensor, height: int, width: int) -> tuple[Mask, int, int]:
    """Return the mask of a detection inside its box, cut to the image, and where its corner (x, y) lies.

    The pixels are those of torchvision's `paste_masks_in_image`: the probabilities get a border of zeros, the box
    grows with them and is rounded towards zero, and they are interpolated over the pixels it then covers.

    Args:
        probabilities: (28, 28) float, 0 to 1.
        box: (4,) float, x1 y1 x2 y2 in pixels of the image.
        height: the image's.
        width: the image's.
    """
    local, x, y = _in_box(probabilities, box, height, width)
    return local > MASK_THRESHOLD, x, y


def _in_box(probabilities: Tensor, box: Tensor, height: int, width: int) -> tuple[npt.NDArray[np.float32], int, int]:
    """Return the probabilities at the pixels that the mask's box covers, and where its corner (x, y) lies."""
    side = probabilities.shape[-1]
    centre, half = (box[2:] + box[:2]) * 0.5, (box[2:] - box[:2]) * 0.5 * ((side + 2) / side)
    x1, y1 = (centre - half).to(torch.int64).tolist()
    x2, y2 = (centre + half).to(torch.int64).tolist()
    size = (max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1))
    padded = F.pad(probabilities, (1, 1, 1, 1))[None, None]
    whole = F.interpolate(padded, size=size, mode="bilinear", align_corners=False)[0, 0]
    left, top = max(x1, 0), max(y1, 0)
    cut = whole[top - y1 : max(min(y2 + 1, height) - y1, 0), left - x1 : max(min(x2 + 1, width) - x1, 0)]
    if not cut.numel():  # the box lies outside the image, by a rounding
        return np.zeros((1, 1), dtype=np.float32), min(left, width - 1), min(top, height - 1)
    return cut.numpy(), left, top


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
