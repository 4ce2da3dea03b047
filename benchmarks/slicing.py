"""Flawmask's tiles against SAHI and supervision's slicer, with the same network and images: a section of
docs/benchmarks.md.

    pip install --no-deps sahi fire shapely termcolor
    python benchmarks/slicing.py --model run/best.pt --dataset_dir DATA

All use the checkpoint's tiles. SAHI and supervision get the network's predictions of each tile and put them together as
they do by default: SAHI by greedy merging of what overlaps, supervision by suppressing boxes. Each runs in a process of
its own. `--picture` writes a picture of one scratch, as Flawmask and as SAHI see it.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import tyro
from measuring import table
from peak import peak_megabytes

from flawmask import images, masks
from flawmask.coco import CocoSplit, instance_rles, read_split
from flawmask.draw import PREDICTION, TRUTH, outline, side_by_side, title_bar
from flawmask.inference.backend import Backend, detect, prepared
from flawmask.inference.config import InferenceSettings
from flawmask.inference.predictor import load
from flawmask.launch import own_process
from flawmask.prediction import Prediction, post_process

Image = npt.NDArray[np.uint8]
Rle = dict[str, Any]
Slicer = Callable[[Image], list[Rle]]

WIDTH = 1000
"""The largest width of the picture's panels, in pixels."""

CONF = 0.5
"""Predictions with at least this score are compared."""

MARGIN = 2
"""A prediction is of a defect if at least half of its pixels lie in the defect or at most so many pixels beside it."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The network and the images."""

    model: Path
    """The checkpoint, trained with tiles."""
    dataset_dir: Path
    """The COCO folder that holds the split."""
    split: str = "val"
    """The split."""
    images: int = 1000
    """At most so many images, spread over the split."""
    only: str | None = None
    """Run only this one of the slicers, in this process, and print its result as JSON."""
    picture: Path | None = None
    """Write a picture of one defect, as Flawmask and as SAHI see it, to this file."""
    of: str | None = None
    """The image file of the picture. By default, the one with the longest defect."""


def flawmask(backend: Backend, image: Image) -> list[Rle]:
    """Return the masks that Flawmask predicts."""
    return [one.rle for one in detect(backend, image).defects(CONF)]


def of_tile(backend: Backend, image: Image) -> Prediction:
    """Return the network's instances of one tile, as Flawmask gets them before it puts tiles together.

    Nothing is joined, and the branch for pixels does not change scores: Flawmask does both once, for the whole image.
    """
    (raw,) = backend.infer([prepared(image, backend)])
    return post_process(dataclasses.replace(raw, maps=None), backend.spec.classes, *image.shape[:2], join="off")


def supervision(backend: Backend, image: Image) -> list[Rle]:
    """Return the masks that supervision's slicer gives, with its defaults but for tile and overlap."""
    import supervision as sv

    def callback(tile: Image) -> Any:
        found = of_tile(backend, tile)
        return found[found.scores >= CONF].to_supervision() if len(found) else sv.Detections.empty()

    spec = backend.spec
    assert spec.tile is not None
    slicer = sv.InferenceSlicer(callback, slice_wh=spec.tile, overlap_wh=spec.overlap)
    found = slicer(image)
    dense: Any = found.mask if found.mask is not None else []
    return [masks.to_rle(np.asarray(mask, dtype=bool)) for mask in dense]


def sahi(backend: Backend, image: Image) -> list[Rle]:
    """Return the masks that SAHI gives, with its defaults but for tile and overlap."""
    from sahi.models.base import DetectionModel
    from sahi.predict import get_sliced_prediction
    from sahi.prediction import ObjectPrediction

    class Model(DetectionModel):
        def check_dependencies(self, *_: Any, **__: Any) -> None:
            pass

        def load_model(self) -> None:
            self.category_mapping = {str(at): name for at, name in enumerate(backend.spec.classes)}

        def perform_inference(self, tile: Image) -> None:
            self._original_predictions = of_tile(backend, tile)

        def _create_object_prediction_list_from_original_predictions(
            self, shift_amount_list: Any = None, full_shape_list: Any = None
        ) -> None:
            shift, shape = (shift_amount_list or [[0, 0]])[0], (full_shape_list or [None])[0]
            found: Prediction = self._original_predictions
            self._object_prediction_list_per_image = [
                [
                    ObjectPrediction(
                        bbox=list(one.box),
                        segmentation=_polygons(one.mask),
                        category_id=backend.spec.classes.index(one.label),
                        category_name=one.label,
                        score=one.score,
                        shift_amount=shift,
                        full_shape=shape,
                    )
                    for one in found.defects(CONF)
                    if _polygons(one.mask)
                ]
            ]

    spec = backend.spec
    assert spec.tile is not None
    found = get_sliced_prediction(
        image,
        Model(confidence_threshold=CONF, load_at_init=True),
        slice_height=spec.tile,
        slice_width=spec.tile,
        overlap_height_ratio=spec.overlap / spec.tile,
        overlap_width_ratio=spec.overlap / spec.tile,
        perform_standard_pred=False,
        verbose=0,
    )
    height, width = image.shape[:2]
    polygons: list[Any] = [one.mask.segmentation for one in found.object_prediction_list if one.mask]
    return [masks.as_rle(one, height, width) for one in polygons]


def _polygons(mask: masks.Mask) -> list[list[float]]:
    """Return a mask as the polygons that SAHI takes; holes are filled."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [contour.ravel().tolist() for contour in contours if len(contour) >= 3]


SLICERS: dict[str, Callable[[Backend, Image], list[Rle]]] = {
    "Flawmask": flawmask,
    "SAHI": sahi,
    "supervision": supervision,
}


def run(config: Config, name: str) -> dict[str, Any]:
    """Predict all images with one slicer. Return counts, seconds, peak memory, and the masks."""
    own_process()
    coarse = name == "Flawmask, coarse"
    given = InferenceSettings(tile_from="coarse" if coarse else "all")
    backend, split = load(config.model, given), read_split(config.dataset_dir, config.split)
    if name == "Flawmask, half a tile further":
        assert backend.spec.tile is not None
        backend.spec = dataclasses.replace(backend.spec, tile_shift=backend.spec.tile // 2)
    slicer = partial(SLICERS.get(name, flawmask), backend)
    counts, seconds, verdicts = np.zeros(5, dtype=int), 0.0, {}
    for image in split.images[:: -(-len(split.images) // config.images)]:
        pixels = images.read_image(split.image_path(image), backend.spec.intensity)
        start = time.perf_counter()
        found = slicer(pixels)
        seconds += time.perf_counter() - start
        verdicts[str(image["file_name"])] = bool(found)
        counts += compared(split, image, found)
    names = ("defects", "found", "fragments", "duplicates", "elsewhere")
    return {
        **dict(zip(names, counts.tolist(), strict=True)),
        "seconds": seconds / len(verdicts),
        "megabytes": peak_megabytes(),
        "verdicts": verdicts,
    }


def compared(split: CocoSplit, image: dict[str, Any], found: list[Rle]) -> npt.NDArray[np.int64]:
    """Return the number of defects, of those found, and of predictions that are fragments, duplicates or elsewhere.

    A defect is found if a mask of it has an IoU of at least 0.5. Of the other masks of a defect, those that share half
    of their pixels with the best one are duplicates, and the rest are fragments.
    """
    truth = instance_rles(split.defects(image), image["height"], image["width"], image["file_name"])
    counts = np.zeros(5, dtype=np.int64)
    counts[0], unused = len(truth), list(found)
    for rle in truth:
        near = rle
        for _ in range(MARGIN):
            near = masks.dilated(near)
        of_it = [one for one in unused if 2 * _shared(one, near) >= masks.area(one)]
        unused = [one for one in unused if one not in of_it]
        if not of_it:
            continue
        best = max(of_it, key=lambda one: _iou(one, rle))
        counts[1] += _iou(best, rle) >= 0.5
        duplicates = sum(2 * _shared(one, best) >= masks.area(one) for one in of_it if one is not best)
        counts[2] += len(of_it) - 1 - duplicates
        counts[3] += duplicates
    counts[4] = len(unused)
    return counts


def _shared(one: Rle, other: Rle) -> int:
    return masks.area(masks.intersection(one, other))


def _iou(one: Rle, other: Rle) -> float:
    shared = _shared(one, other)
    return shared / (masks.area(one) + masks.area(other) - shared)


def in_a_process(config: Config, name: str) -> dict[str, Any]:
    """Return the result of `run`, from a process of its own."""
    command = ["--model", str(config.model), "--dataset_dir", str(config.dataset_dir), "--split", config.split]
    command += ["--images", str(config.images), "--only", name]
    done = subprocess.run([sys.executable, __file__, *command], check=True, stdout=subprocess.PIPE, text=True)
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def draw_one(config: Config, path: Path) -> None:
    """Draw the longest defect of an image as Flawmask and as SAHI see it: each mask in a colour of its own."""
    colours = (PREDICTION, TRUTH, (86, 180, 233), (230, 159, 0), (204, 121, 167), (0, 114, 178), (240, 228, 66))
    backend, split = load(config.model, InferenceSettings()), read_split(config.dataset_dir, config.split)
    named = [image for image in split.images if config.of in (None, image["file_name"]) and split.defects(image)]
    longest = max(named, key=lambda image: max(max(one["bbox"][2:]) for one in split.defects(image)))
    x, y, wide, high = (
        int(side) for side in max((one["bbox"] for one in split.defects(longest)), key=lambda b: max(b[2:]))
    )
    pixels = images.read_image(split.image_path(longest), backend.spec.intensity)
    window = np.s_[max(0, y - 60) : y + high + 60, max(0, x - 60) : x + wide + 60]
    panels = []
    for name in ("Flawmask", "SAHI"):
        found, drawn = SLICERS[name](backend, pixels), pixels[window].copy()
        for number, rle in enumerate(found):
            mask = masks.decode(rle, *pixels.shape[:2])[window]
            drawn = outline(drawn, mask, colours[number % len(colours)])
        count = sum(bool(masks.decode(rle, *pixels.shape[:2])[window].any()) for rle in found)
        scale = min(1.0, WIDTH / drawn.shape[1])
        drawn = np.asarray(cv2.resize(drawn, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
        panels.append(title_bar(drawn, f"{name}: {count} instance{'' if count == 1 else 's'}"))
    images.write_png(path, np.vstack(panels) if wide > high else side_by_side(*panels))


def main(config: Config) -> None:
    """Compare and print the section."""
    if config.only is not None:
        print(json.dumps(run(config, config.only)))
        return
    names = [*SLICERS, "Flawmask, coarse", "Flawmask, half a tile further"]
    results = {name: in_a_process(config, name) for name in names}
    print("## Tiles against other slicers\n")
    columns = ("found", "fragments", "duplicates", "elsewhere")
    rows = [
        [name, *(str(one[column]) for column in columns), f"{one['seconds']:.2f}", f"{one['megabytes']:.0f}"]
        for name, one in results.items()
    ]
    count = results["Flawmask"]["defects"]
    print(table(["slicer", f"found of {count}", *columns[1:], "seconds per image", "peak memory, MB"], rows))
    verdicts = {name: one["verdicts"] for name, one in results.items()}
    for other in names[3:]:
        changed = [file for file, one in verdicts["Flawmask"].items() if one != verdicts[other][file]]
        print(f"\n{other}: {len(changed)} of {len(verdicts[other])} verdicts differ {', '.join(changed[:10])}".rstrip())
    if config.picture is not None:
        draw_one(config, config.picture)


if __name__ == "__main__":
    main(tyro.cli(Config))
