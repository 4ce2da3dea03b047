"""Predictions, and how they are computed from a network's output. The module needs no PyTorch: any runtime can use it.

>>> detections = RawDetections(np.float32([[4, 2, 8, 6], [0, 0, 3, 9]]), np.array([2, 2]), np.float32([0.8, 0.4]))
>>> prediction = post_process(detections, ("good", "crack"), height=20, width=30)
>>> prediction.is_defect, prediction.labels.tolist(), prediction.boxes[0].tolist()
(True, ['crack', 'crack'], [4.0, 2.0, 8.0, 6.0])
>>> len(prediction[prediction.scores > 0.5]), prediction.verdict(conf=0.9).is_defect
(1, False)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flawmask import joining, masks
from flawmask.errors import FlawmaskError
from flawmask.good_names import GOOD
from flawmask.inference import maps
from flawmask.inference.calibration import Calibration
from flawmask.inference.paste import expand_boxes, mask_changes, probabilities_in_box
from flawmask.masks import Mask

if TYPE_CHECKING:
    import PIL.Image

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RawDetections:
    """The output of a network for one image, as NumPy arrays.

    Attributes:
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels of the original image, not of the network's input.
        labels: (N,) integers; 1 is the first class.
        scores: (N,) float32, 0 to 1, in any order.
        masks: (N, M, M) float32, the probability that each cell of the box belongs to the instance, for any M; None
            for a network that predicts only boxes.
        maps: (D, rows, columns) float32, the probability of each of the D classes of defects, in the order of their
            labels, in each cell of a grid over the image; None for a network that scores only instances.
    """

    boxes: Floats
    labels: npt.NDArray[np.integer[Any]]
    scores: Floats
    masks: Floats | None = None
    maps: Floats | None = None


@dataclass(frozen=True)
class Instance:
    """One predicted instance.

    Attributes:
        label: the name of its class.
        score: the network's confidence, 0 to 1.
        box: (x1, y1, x2, y2), the edges of the box in pixels of the image.
        rle: the mask as COCO's compressed RLE (https://cocodataset.org/#format-results) at the image's size: `size`,
            [height, width], and `counts`, text. For a detector without masks, it holds the pixels of the box.
        area: the number of pixels of the mask.
        probabilities: (M, M) float32, the probability that each cell of the box belongs to the instance; None where
            only the mask is known.
        parts: the network's own instances, if it was joined from several of them (`Prediction.joined`).
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    rle: dict[str, Any]
    area: int
    probabilities: Floats | None = field(default=None, compare=False, repr=False)
    parts: tuple["Instance", ...] = field(default=(), compare=False, repr=False)

    @property
    def is_defect(self) -> bool:
        """Whether the class is a defect, that is, not `good`."""
        return self.label != GOOD

    @property
    def xywh(self) -> list[float]:
        """The box as COCO writes it: [x, y, width, height] in pixels of the image."""
        x1, y1, x2, y2 = self.box
        return [x1, y1, x2 - x1, y2 - y1]

    @property
    def mask(self) -> Mask:
        """The mask, (height, width) bool, at the image's size. Each access decodes it."""
        return masks.decode(self.rle, *self.rle["size"])


@dataclass(frozen=True)
class Verdict:
    """Good or defect.

    Attributes:
        is_defect: whether the image is rejected.
        score: the image's score, 0 to 1: the highest score of a defect instance, or 0 without one.
        defect_probability: the probability that the image is defective, 0 to 1, from the calibration of the score; None
            without a calibration.
    """

    is_defect: bool
    score: float
    defect_probability: float | None = None


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Its length is the number of instances, and it can be indexed like an array: `prediction[prediction.scores > 0.7]`
    has the instances that score more than 0.7, and `prediction[0]` the one with the highest score.

    Attributes:
        height: the height of the image in pixels.
        width: the width of the image in pixels.
        instances: all instances above the score floor, 0.05 by default, the highest score first. They include those of
            a class `good`, if the network has one; `defects` leaves them out. If the network scores pixels, there is
            always at least one defect, perhaps with a score close to 0.
        has_masks: whether the network predicts masks; if not, boxes take their place.
        classes: the names of the network's classes in the order of its labels 1, 2, ...
        conf: the default threshold of the verdict, 0 to 1.
        min_area: the default number of pixels that a defect must have to count.
        maps: see `RawDetections`.
        factor: what the maps' opinion multiplied the scores of defects by; 0 where it made the only defect.
        image: the predicted image, (height, width, 3) uint8 RGB; None where it was not kept.
        calibration: gives the probability of a defect from the image's score; None without a calibration.
    """

    height: int
    width: int
    instances: tuple[Instance, ...]
    has_masks: bool = True
    classes: tuple[str, ...] = ()
    conf: float = 0.5
    min_area: int = 0
    maps: Floats | None = field(default=None, compare=False, repr=False)
    factor: float = field(default=1.0, repr=False)
    image: npt.NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    calibration: Calibration | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self.instances)

    def __getitem__(self, which: Any) -> "Prediction":
        """Return the prediction with some of its instances.

        Args:
            which: an index of a NumPy array with an entry for each instance: a number, a slice, an array of numbers, or
                an array with a bool for each instance.

        Raises:
            IndexError: there is no such instance, or the number of bools is wrong.
        """
        places = np.atleast_1d(np.arange(len(self.instances))[which])
        return replace(self, instances=tuple(self.instances[place] for place in places))

    @property
    def is_defect(self) -> bool:
        """Whether the image is rejected with the prediction's own `conf` and `min_area`."""
        return self.verdict().is_defect

    @property
    def defect_probability(self) -> float | None:
        """The probability that the image is defective, 0 to 1, see `Verdict`."""
        return self.verdict().defect_probability

    @property
    def labels(self) -> npt.NDArray[np.str_]:
        """(N,) text, the class names of the instances."""
        return np.array([one.label for one in self.instances], dtype=np.str_)

    @property
    def scores(self) -> Floats:
        """(N,) float32, the scores of the instances, 0 to 1, the highest first."""
        return np.array([one.score for one in self.instances], dtype=np.float32)

    @property
    def boxes(self) -> Floats:
        """(N, 4) float32, the boxes of the instances, x1 y1 x2 y2 in pixels of the image."""
        return np.array([one.box for one in self.instances], dtype=np.float32).reshape(-1, 4)

    @property
    def masks(self) -> Mask:
        """(N, height, width) bool, the masks of the instances. Each access decodes them."""
        decoded = np.zeros((len(self.instances), self.height, self.width), dtype=bool)
        for mask, instance in zip(decoded, self.instances, strict=True):
            mask[:] = instance.mask
        return decoded

    def defects(self, conf: float = 0.0, min_area: int = 0) -> list[Instance]:
        """Return the defect instances that score at least `conf` and cover at least `min_area` pixels.

        Args:
            conf: the lowest score, 0 to 1. The default is 0, not the prediction's own.
            min_area: in pixels. The default is 0, not the prediction's own.
        """
        return [
            instance
            for instance in self.instances
            if instance.is_defect and instance.score >= conf and instance.area >= min_area
        ]

    def verdict(self, conf: float | None = None, min_area: int | None = None) -> Verdict:
        """Return whether the image is rejected, and its score.

        It is rejected if a defect instance scores at least `conf` and covers at least `min_area` pixels.

        Args:
            conf: the threshold, 0 to 1; by default the prediction's own.
            min_area: in pixels; by default the prediction's own.
        """
        conf, min_area = self._limits(conf, min_area)
        score = max((instance.score for instance in self.defects(min_area=min_area)), default=0.0)
        is_defect = bool(self.defects(conf, min_area))
        probability = None if self.calibration is None else float(self.calibration.probability(score))
        return Verdict(is_defect, score, probability)

    def defect_mask(self, conf: float | None = None, min_area: int | None = None) -> Mask:
        """Return the union of the masks of the defect instances that `verdict` counts: (height, width) bool.

        Args:
            conf: the threshold, 0 to 1; by default the prediction's own.
            min_area: in pixels; by default the prediction's own.
        """
        return masks.decode(self.defect_rle(conf, min_area), self.height, self.width)

    def defect_rle(self, conf: float | None = None, min_area: int | None = None) -> dict[str, Any]:
        """Return `defect_mask` as COCO's compressed RLE, without decoding a mask.

        Args:
            conf: the threshold, 0 to 1; by default the prediction's own.
            min_area: in pixels; by default the prediction's own.
        """
        defects = self.defects(*self._limits(conf, min_area))
        return masks.union([one.rle for one in defects], self.height, self.width)

    def defect_area(self, conf: float | None = None, min_area: int | None = None) -> int:
        """Return the number of pixels of `defect_mask`, without decoding a mask.

        Args:
            conf: the threshold, 0 to 1; by default the prediction's own.
            min_area: in pixels; by default the prediction's own.
        """
        return masks.area(self.defect_rle(conf, min_area))

    def _limits(self, conf: float | None, min_area: int | None) -> tuple[float, int]:
        return self.conf if conf is None else conf, self.min_area if min_area is None else min_area

    def score_map(self, min_area: int = 0) -> Floats:
        """Return the defect score of each pixel, (height, width) float32, 0 to 1.

        If the network scores pixels, it is the network's map, interpolated. Otherwise it is 0 outside all boxes.
        Inside, it is the highest score x mask probability of the defect instances whose box holds the pixel. Where only
        an instance's mask is known, the probability is 1 in the mask. Each part of a joined instance counts with its
        own score.

        Args:
            min_area: defect instances with fewer pixels do not count.
        """
        if self.maps is not None:
            return maps.interpolated(self.maps.max(axis=0), self.height, self.width)
        scores = np.zeros((self.height, self.width), dtype=np.float32)
        for instance in (part for one in self.defects(min_area=min_area) for part in one.parts or (one,)):
            if instance.probabilities is None:
                window, local = np.s_[0 : self.height, 0 : self.width], instance.mask.astype(np.float32)
            else:
                (box,) = expand_boxes(np.array([instance.box], dtype=np.float32), len(instance.probabilities))
                local, x, y = probabilities_in_box(instance.probabilities, box, self.height, self.width)
                window = np.s_[y : y + local.shape[0], x : x + local.shape[1]]
            scores[window] = np.maximum(scores[window], np.float32(instance.score) * local)
        return scores

    def joined(self, rule: joining.Join = "touching") -> "Prediction":
        """Return the prediction with one instance for each defect.

        Instances that are parts of one defect become one instance. Its mask is the union of their masks, its box is
        that of the union, and its score is the highest of theirs. The image's score and `score_map` do not change.
        (With a `min_area`, they may become higher, because the area of the whole defect counts, not that of each part.)

        Args:
            rule: `touching`, see `joining.same_defect`; `off` joins nothing. Boxes of a network without masks are never
                joined, because boxes overlap where their defects do not.
        """
        if rule == "off" or not self.has_masks:
            return self
        instances = self.instances
        by_defect = joining.same_defect(
            [one.rle for one in instances], [one.label for one in instances], [one.score for one in instances]
        )
        defects = [union_of([instances[place] for place in places]) for places in by_defect]
        return replace(self, instances=tuple(sorted(defects, key=lambda one: -one.score)))

    def within(self, region: Mask) -> "Prediction":
        """Return the prediction with all defects cut to the region.

        Defects outside the region are dropped. The boxes are those of the cut masks. Instances of the class `good` stay
        as they are. If the network scores pixels, only those inside the region count.

        Args:
            region: (height, width) bool, True where defects count.

        Raises:
            FlawmaskError: the region and the image differ in size.
        """
        if region.shape != (self.height, self.width):
            raise FlawmaskError(
                f"the region of interest is {region.shape[1]}x{region.shape[0]} but the image is "
                f"{self.width}x{self.height}: draw it at the images' size"
            )
        rle, own = masks.to_rle(region), self.instances
        if self.maps is not None:  # take the maps' opinion of the whole image out of the scores
            own = tuple(
                replace(one, score=one.score / self.factor) if one.is_defect else one
                for one in own
                if self.factor or not one.is_defect
            )
        cut = replace(self, instances=tuple(cut for one in own if (cut := _cut(one, rle)) is not None))
        return cut if self.maps is None else with_second_opinion(cut, maps.within(self.maps, region), rle)

    def to_dict(self, conf: float | None = None, min_area: int | None = None) -> dict[str, Any]:
        """Return the image's record in `predictions.json`, as JSON values.

        Keys: `width`, `height`; `verdict`, `good` or `defect`; `score`, the highest score of a defect;
        `defect_probability`, the probability that the image is defective, None without a calibration; `instances`, the
        defects that score at least the threshold and cover at least `min_area` pixels, each with `class`, `score`,
        `box` [x, y, width, height], `area` in pixels and `segmentation`, compressed COCO RLE at the image's size;
        `defect_area_px` and `defect_area_percent`, the area of their union. For a network without masks,
        `segmentation`, `defect_area_px` and `defect_area_percent` are None, and `area` is that of the box.

        Args:
            conf: the threshold, 0 to 1; by default the prediction's own.
            min_area: in pixels; by default the prediction's own.
        """
        conf, min_area = self._limits(conf, min_area)
        verdict = self.verdict(conf, min_area)
        area = self.defect_area(conf, min_area) if self.has_masks else None
        return {
            "width": self.width,
            "height": self.height,
            "verdict": "defect" if verdict.is_defect else "good",
            "score": verdict.score,
            "defect_probability": verdict.defect_probability,
            "defect_area_px": area,
            "defect_area_percent": None if area is None else 100 * area / (self.height * self.width),
            "instances": [
                {
                    "class": one.label,
                    "score": one.score,
                    "box": one.xywh,
                    "area": one.area,
                    "segmentation": one.rle if self.has_masks else None,
                }
                for one in self.defects(conf, min_area)
            ],
        }

    def to_coco(self, image_id: int, category_ids: dict[str, int] | None = None) -> list[dict[str, Any]]:
        """Return all instances in COCO's results format (https://cocodataset.org/#format-results).

        Each record has `image_id`, `category_id`, `bbox` [x, y, width, height], `score` and, for a network with masks,
        `segmentation`, compressed RLE.

        Args:
            image_id: the image's id in the data set.
            category_ids: the id of each class in the data set, by its name; by default the network's own labels.

        Raises:
            KeyError: `category_ids` lacks a class; or it is not given, and the prediction has no `classes`.
        """
        ids = category_ids or {name: label for label, name in enumerate(self.classes, start=1)}
        return [
            {
                "image_id": image_id,
                "category_id": ids[one.label],
                "bbox": one.xywh,
                "score": one.score,
                **({"segmentation": one.rle} if self.has_masks else {}),
            }
            for one in self.instances
        ]

    def to_supervision(self) -> Any:
        """Return all N instances as `supervision.Detections` (https://supervision.roboflow.com/latest/detection/core).

        `xyxy` is (N, 4) float32 in pixels of the image. `mask` is (N, height, width) bool; None without masks.
        `confidence` is (N,) float32, 0 to 1. `class_id` is (N,) integers, the network's labels, which start at 1.
        `data["class_name"]` is (N,) text.

        Raises:
            FlawmaskError: the package `supervision` is not installed.
            ValueError: the prediction has no `classes`.
        """
        try:
            import supervision
        except ImportError:
            raise FlawmaskError("supervision is not installed: pip install supervision") from None
        names = list(self.classes)
        return supervision.Detections(
            xyxy=self.boxes,
            mask=self.masks if self.has_masks and self.instances else None,
            confidence=self.scores,
            class_id=np.array([names.index(one.label) + 1 for one in self.instances], dtype=int),
            data={"class_name": self.labels},
        )

    def overlay(self, image: npt.NDArray[np.uint8] | None = None) -> "PIL.Image.Image":
        """Return an RGB picture of the image with its defects outlined, enlarged or shrunk to suit a screen.

        It shows the defects that count for the verdict with the prediction's own `conf` and `min_area`. They are tagged
        with class and score where there is room.

        Args:
            image: (height, width, 3) uint8 RGB; by default the predicted image.

        Raises:
            FlawmaskError: the predicted image was not kept, and none is given.
        """
        from PIL import Image

        from flawmask.draw import PREDICTION
        from flawmask.inference.overlay import draw_instances, viewing_size

        shown = self.image if image is None else image
        if shown is None:
            raise FlawmaskError("this prediction does not hold its image: give it to overlay()")
        defects = self.defects(self.conf, self.min_area)
        return Image.fromarray(draw_instances(shown, defects, PREDICTION, viewing_size(shown)))


def _cut(instance: Instance, region: dict[str, Any]) -> Instance | None:
    """Return the instance with its mask cut to the region, an RLE; None for a defect outside the region."""
    if not instance.is_defect:
        return instance
    rle = masks.intersection(instance.rle, region)
    area = masks.area(rle)
    if not area:
        return None
    x, y, width, height = masks.box_of_rle(rle)
    box = (float(x), float(y), float(x + width), float(y + height))
    return replace(instance, box=box, rle=rle, area=area, probabilities=None, parts=())


def union_of(instances: Sequence[Instance]) -> Instance:
    """Return one instance that joins the given ones."""
    if len(instances) == 1:
        return instances[0]
    best = max(instances, key=lambda one: one.score)
    rle = masks.union([one.rle for one in instances], *best.rle["size"])
    x, y, width, height = masks.box_of_rle(rle)
    box = (float(x), float(y), float(x + width), float(y + height))
    parts = tuple(part for one in instances for part in one.parts or (one,))
    return Instance(best.label, best.score, box, rle, masks.area(rle), parts=parts)


def post_process(
    detections: RawDetections, classes: Sequence[str], height: int, width: int, *, join: joining.Join = "off"
) -> Prediction:
    """Return the prediction for a network's output, its instances with the highest score first.

    Masks have the pixels of torchvision's `paste_masks_in_image` with a probability above 0.5. They never leave their
    boxes.

    Args:
        detections: the network's output.
        classes: the names of its classes in the order of its labels 1, 2, ...
        height: the height of the image in pixels.
        width: the width of the image in pixels.
        join: which instances are one defect, see `Prediction.joined`.
    """
    make = _of_boxes if detections.masks is None else _of_masks
    instances = sorted(make(detections, classes, height, width), key=lambda instance: -instance.score)
    has_masks = detections.masks is not None
    prediction = Prediction(height, width, tuple(instances), has_masks=has_masks, classes=tuple(classes)).joined(join)
    return prediction if detections.maps is None else with_second_opinion(prediction, detections.maps)


def with_second_opinion(prediction: Prediction, of_network: Floats, region: dict[str, Any] | None = None) -> Prediction:
    """Return the prediction with the maps' opinion in the scores of its defects.

    The image's score becomes the mean of the highest score of a defect and the highest value of the maps. All defects
    are multiplied by the same factor, so their order stays. An image without any defect gets one: the region around the
    highest value. So the scores of images without a detection differ, too.

    Args:
        prediction: with the scores of the heads for regions.
        of_network: the maps, see `RawDetections`.
        region: RLE of the part of the image in which defects count; None for all of it.
    """
    peak = float(of_network.max())
    highest = max((one.score for one in prediction.defects()), default=0.0)
    score = (highest + peak) / 2
    factor = score / highest if highest else 0.0
    instances = [replace(one, score=one.score * factor) if one.is_defect else one for one in prediction.instances]
    if not highest and peak:
        number, rle = maps.region_of_peak(of_network, prediction.height, prediction.width)
        label = [name for name in prediction.classes if name != GOOD][number]
        whole = Instance(label, score, (0.0, 0.0, 0.0, 0.0), rle, masks.area(rle))
        # This also gives it a box. Where the region has no pixel's centre in the peak's cells, it is the region itself.
        cut = _cut(whole, rle if region is None else region) or _cut(replace(whole, rle=region or rle), region or rle)
        instances += [] if cut is None else [cut]
    instances.sort(key=lambda one: -one.score)
    return replace(prediction, instances=tuple(instances), maps=of_network, factor=factor)


def _of_masks(detections: RawDetections, classes: Sequence[str], height: int, width: int) -> list[Instance]:
    assert detections.masks is not None
    instances = []
    for at, box in enumerate(expand_boxes(detections.boxes, detections.masks.shape[-1])):
        probabilities = detections.masks[at]
        rle, area = masks.rle_of_changes(mask_changes(probabilities, box, height, width), height, width)
        x1, y1, x2, y2 = detections.boxes[at].tolist()
        label, score = classes[int(detections.labels[at]) - 1], float(detections.scores[at])
        instances.append(Instance(label, score, (x1, y1, x2, y2), rle, area, probabilities))
    return instances


def _of_boxes(detections: RawDetections, classes: Sequence[str], height: int, width: int) -> list[Instance]:
    """Return the boxes, without those that lie outside the image."""
    instances = []
    for (x1, y1, x2, y2), label, score in zip(
        detections.boxes.tolist(), detections.labels.tolist(), detections.scores.tolist(), strict=True
    ):
        box = (max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2))
        rle = masks.rle_of_box(box, height, width)
        if area := masks.area(rle):
            instances.append(Instance(classes[label - 1], score, box, rle, area))
    return instances
