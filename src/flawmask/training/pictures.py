"""Pictures of a training: the first batches with their labels, and predictions on validation images."""

import io
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from flawmask import images
from flawmask.coco import CocoSplit, Record
from flawmask.draw import (
    TRUTH,
    Colour,
    Picture,
    box_labels,
    contact_sheet,
    fit,
    fit_mask,
    outline,
)
from flawmask.files import write_bytes
from flawmask.fonts import first_writable
from flawmask.good_names import GOOD
from flawmask.inference.backend import Backend, detect
from flawmask.inference.overlay import truth_beside_prediction
from flawmask.model.build import Detector
from flawmask.model.targets import Target, crops
from flawmask.training.loader import Batch

BATCHES = 3
"""The number of batches in `train_batch.jpg`."""

MAX_PER_BATCH = 8
"""The most images that are shown of a batch. They form one row."""

SHEET_WIDTH, MAX_CELL = 1920, 480
"""The width of `train_batch.jpg` and the largest width of an image in it, in pixels."""

CLASS_COLOURS: tuple[Colour, ...] = (TRUTH, (0, 114, 178), (230, 159, 0), (204, 121, 167), (86, 180, 233))
"""Colours of the defect classes, from Okabe and Ito's palette. Further classes start again from the first."""

GOOD_COLOUR: Colour = (160, 160, 160)

EXAMPLES = 4
"""The number of validation images that are drawn after each epoch."""


def draw_train_batch(network: Any, detector: Detector, batches: Iterable[Batch], split: CocoSplit, path: Path) -> None:
    """Write the first three batches as the network sees them: resized, padded, with masks, boxes and classes.


    Args:
        network: the network whose input is shown; its weights do not matter.
        detector: the functions for its kind of network.
        batches: training batches, as the loader returns them.
        split: the split that the batches come from.
        path: the JPEG to write.
    """
    names = {image["id"]: str(image["file_name"]) for image in split.images}
    shown: list[tuple[Picture, Target, str]] = []
    for number, batch in enumerate(islice(batches, BATCHES), start=1):
        for picture, target in _network_input(network, detector, batch):
            name = Path(names[int(target["image_id"])]).name
            shown.append((picture, target, first_writable(f"batch {number}: {name}", f"batch {number}: ")))
    # The first batch is never the smallest: only the last one may have fewer images.
    columns = sum(caption.startswith("batch 1:") for *_, caption in shown)
    width = min(MAX_CELL, SHEET_WIDTH // columns)
    tallest = max(picture.shape[0] / picture.shape[1] for picture, *_ in shown)
    cell = (width, max(1, round(width * min(tallest, 2.0))))
    pictures = [_labelled(picture, target, split.class_names, cell) for picture, target, _ in shown]
    sheet = contact_sheet(pictures, columns, cell, [caption for *_, caption in shown])
    jpeg = io.BytesIO()
    Image.fromarray(sheet).save(jpeg, "JPEG", quality=90, subsampling=0)  # chroma subsampling would blur the outlines
    write_bytes(path, jpeg.getvalue())


def _network_input(network: Any, detector: Detector, batch: Batch) -> list[tuple[Picture, Target]]:
    """Return the first images of the batch as the network sees them, padding included, with their targets."""
    colours = detector.network_input(network, batch.images[:MAX_PER_BATCH]).clamp(0, 1) * 255
    pictures = colours.round().byte().permute(0, 2, 3, 1).numpy()
    return list(zip(pictures, batch.targets, strict=False))


def _labelled(picture: Picture, target: Target, classes: tuple[str, ...], cell: tuple[int, int]) -> Picture:
    """Return the picture at the size of a cell, with the box and class of each instance and the mask of each defect."""
    drawn = fit(picture, *cell)
    scale = drawn.shape[1] / picture.shape[1]
    names = [classes[int(label) - 1] for label in target["labels"]]
    corners = [tuple(round(float(corner) * scale) for corner in box) for box in target["boxes"]]
    for name, crop, (left, top, *_) in zip(names, crops(target), target["windows"].tolist(), strict=True):
        if name != GOOD:  # its mask is usually the whole image, which would all turn grey
            mask = np.zeros(picture.shape[:2], dtype=bool)
            mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop.numpy() > 0
            drawn = outline(drawn, fit_mask(mask, *cell), _colour(name, classes))
    drawn = drawn.copy()
    for name, (left, top, right, bottom) in zip(names, corners, strict=True):
        cv2.rectangle(drawn, (left, top), (right - 1, bottom - 1), _colour(name, classes))
    for one in sorted(set(names)):  # tags come last, so that nothing covers them
        tag = first_writable(one, "")
        places = [(tag, left, top) for name, (left, top, *_) in zip(names, corners, strict=True) if name == one]
        drawn = box_labels(drawn, places, _colour(one, classes))
    return drawn


def _colour(name: str, classes: tuple[str, ...]) -> Colour:
    if name == GOOD:
        return GOOD_COLOUR
    defects = [one for one in classes if one != GOOD]
    return CLASS_COLOURS[defects.index(name) % len(CLASS_COLOURS)]


def draw_predictions(backend: Backend, split: CocoSplit, conf: float = 0.5) -> dict[str, Picture]:
    """Return pictures of ground truth beside prediction, by file name.

    Up to four images with a defect are drawn, the same ones each time. If the split has no defect, good images are
    drawn.

    Args:
        backend: the network that predicts.
        split: the split of the images.
        conf: the score threshold for drawing an instance.
    """
    shown = [image for image in split.images if split.is_defective(image)] or list(split.images)
    places = np.linspace(0, len(shown) - 1, min(EXAMPLES, len(shown))).round().astype(int)
    return {str(shown[place]["file_name"]): _predicted(backend, split, shown[place], conf) for place in places}


def _predicted(backend: Backend, split: CocoSplit, image: Record, conf: float) -> Picture:
    pixels = images.read_image(split.image_path(image), backend.spec.intensity)
    prediction = detect(backend, pixels)
    defects = prediction.defects(conf)
    title = f"{len(defects)} predicted at {conf:g} or more, best score {prediction.verdict(conf).score:.2f}"
    captions = first_writable(f"truth: {split.type_of(image)}", "truth: as marked"), title
    return truth_beside_prediction(split, image, pixels, defects, captions)
