"""The images of the gallery: a small JPEG each, outlines as SVG paths, and the score of every detection."""

import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle_tools

from flawmask import images, masks
from flawmask.coco import CocoSplit, Record, instance_masks
from flawmask.draw import Picture, fit
from flawmask.images import UPPER_BITS, Levels
from flawmask.launch import usable_cores
from flawmask.masks import Mask
from flawmask.progress import track

ENOUGH, LEAST, MOST = 480, 320, 800
"""The longer side of a picture in pixels: 480 of 500 pictures, more of fewer, so that a page has 20 MB or so."""

QUALITY = 80  # of the JPEGs, 0 to 100
FINER = 3  # OpenCV traces pixel centres: on a mask enlarged this much they run close to the pixels' edges
TOLERANCE = 0.7  # in pixels of the picture: how far a simplified outline may leave the mask's edge
UNITS = 4  # of an outline's coordinates per pixel of the picture


def gallery(
    split: CocoSplit,
    detections: dict[int, list[Record]],
    conf: float,
    min_area: int,
    limit: int | None = None,
    levels: Levels = UPPER_BITS,
) -> list[dict[str, Any]]:
    """Return an entry per image, as JSON values, in the order of the gallery: wrong verdicts first.

    Each has `file`, `type`, `truth` (whether it is defective) and `found`: its detections, the highest score first,
    with `score`, `label` and `area` (in pixels of the image). Those with a picture also have `jpeg` (base64),
    `width`, `height` (of the picture), `outlines` (SVG paths of the true defects) and in `found` a `path` and the upper
    left `corner` of its box, in pixels of the picture; both are empty for an empty mask.

    Args:
        split: the truth.
        detections: the defect detections of each image id.
        conf: detections below this score do not count for the order.
        min_area: detections of fewer pixels do not count for the order.
        limit: the most entries that get a picture, the first ones; all by default.
        levels: what becomes black and white, of values of more than 8 bits.

    Raises:
        FlawmaskError: an image cannot be read or a segmentation cannot be decoded.
    """
    names = {category["id"]: category["name"] for category in split.categories}
    pairs = [(image, _entry(split, image, detections[image["id"]], names)) for image in split.images]
    pairs.sort(key=lambda pair: _badness(pair[1], conf, min_area))
    shown = pairs[:limit]
    side = round(min(MOST, max(LEAST, ENOUGH * (500 / max(1, len(shown))) ** 0.5)))

    def draw(pair: tuple[Record, dict[str, Any]]) -> None:
        image, entry = pair
        _add_picture(entry, split, image, detections[image["id"]], side, levels)

    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in track(pool.map(draw, shown), "report", total=len(shown)):
            pass
    return [entry for _, entry in pairs]


def _entry(split: CocoSplit, image: Record, found: Sequence[Record], names: dict[int, str]) -> dict[str, Any]:
    return {
        "file": str(image["file_name"]),
        "type": split.type_of(image),
        "truth": split.is_defective(image),
        "found": [
            {
                "score": record["score"],
                "label": names[record["category_id"]],
                "area": int(rle_tools.area(record["segmentation"])),
            }
            for record in found
        ],
    }


def image_score(entry: dict[str, Any], min_area: int) -> float:
    """Return the highest score of a detection that is large enough, 0 where there is none."""
    return max((one["score"] for one in entry["found"] if one["area"] >= min_area), default=0.0)


def _badness(entry: dict[str, Any], conf: float, min_area: int) -> tuple[bool, float]:
    """Return what sorts wrong verdicts before right ones, and among equals the score that is furthest off first."""
    rejected = any(one["score"] >= conf and one["area"] >= min_area for one in entry["found"])
    return rejected == entry["truth"], -abs(entry["truth"] - image_score(entry, min_area))


def _add_picture(
    entry: dict[str, Any], split: CocoSplit, image: Record, found: Sequence[Record], side: int, levels: Levels
) -> None:
    """Add picture and outlines to an entry; the picture is never larger than the image."""
    path, height, width = split.image_path(image), image["height"], image["width"]
    size = min(side, max(height, width))
    picture = fit(images.read_image(path, levels), size, size)
    scale = picture.shape[1] / width
    truth = instance_masks(split.defects(image), height, width, str(path))
    entry["jpeg"] = jpeg(picture)
    entry["height"], entry["width"] = picture.shape[:2]
    entry["outlines"] = [outline_path(mask, scale) for mask in truth]
    for one, mask in zip(entry["found"], instance_masks(_numbered(found), height, width, str(path)), strict=True):
        one["path"] = outline_path(mask, scale)
        one["corner"] = [round(side * scale) for side in masks.box_of(mask)[:2]] if mask.any() else None


def _numbered(found: Sequence[Record]) -> list[Record]:
    """Return the detections with the number that an annotation has, for the message about one that is damaged."""
    return [{**record, "id": place} for place, record in enumerate(found)]


def jpeg(picture: Picture) -> str:
    """Return a (height, width, 3) uint8 RGB picture as a JPEG file in base64."""
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(picture[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return base64.b64encode(data.tobytes()).decode()


def outline_path(mask: Mask, scale: float) -> str:
    """Return the mask's outline, holes too, as an SVG path, simplified to what can be seen; empty for an empty mask.

    Its coordinates are whole quarters of a pixel of the picture, and relative: a poor model's many ragged masks would
    otherwise outweigh the pictures.

    Args:
        mask: (height, width) bool.
        scale: pixels of the picture per pixel of the mask.
    """
    if not mask.any():
        return ""
    x, y, width, height = masks.box_of(mask)
    region = mask[y : y + height, x : x + width].astype(np.uint8)
    enlarged = cv2.resize(region, None, fx=FINER, fy=FINER, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(enlarged, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parts = []
    for contour in contours:
        kept = cv2.approxPolyDP(contour, TOLERANCE * FINER / scale, closed=True)[:, 0, :]
        points = np.rint(((kept + 0.5) / FINER + (x, y)) * scale * UNITS).astype(int)
        first, *steps = np.diff(points, axis=0, prepend=[[0, 0]]).tolist()
        parts.append(_command("M", [first]) + _command("l", steps) + "z")
    return "".join(parts)


def _command(letter: str, points: Sequence[Sequence[int]]) -> str:
    """Return one command of an SVG path, its numbers as close together as the grammar allows."""
    numbers = " ".join(str(side) for point in points for side in point)
    return letter + numbers.replace(" -", "-") if points else ""
