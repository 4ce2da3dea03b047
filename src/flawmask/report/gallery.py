"""The images of the gallery: for each a small JPEG, outlines as SVG paths, and the score of each detection."""

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

USUAL_SIDE, MIN_SIDE, MAX_SIDE = 480, 320, 800
"""The longer side of a picture in pixels: 480 for 500 pictures, and more for fewer pictures. So a page has about 20 MB.
"""

QUALITY = 80  # of the JPEGs, 0 to 100
ENLARGED = 3  # OpenCV traces pixel centres; on a mask enlarged by this factor, these are close to the pixels' edges
TOLERANCE = 0.7  # the largest distance of a simplified outline from the mask's edge, in pixels of the picture
UNITS = 4  # units of an outline's coordinates per pixel of the picture


def gallery(
    split: CocoSplit,
    detections: dict[int, list[Record]],
    conf: float,
    min_area: int,
    limit: int | None = None,
    levels: Levels = UPPER_BITS,
) -> list[dict[str, Any]]:
    """Return an entry for each image, as JSON values, in the order of the gallery: wrong verdicts first.

    An entry has `file`, `type`, `truth` (whether the image is defective) and `found`: the detections, the highest score
    first, each with `score`, `label` and `area` (in pixels of the image). An entry with a picture also has `jpeg`
    (base64), `width` and `height` (of the picture) and `outlines` (SVG paths of the true defects). Its detections have
    a `path` and the upper left `corner` of their box, in pixels of the picture; both are empty for an empty mask.

    Args:
        split: the truth.
        detections: the defect detections of each image id.
        conf: detections below this score do not count for the order.
        min_area: detections with fewer pixels do not count for the order.
        limit: the number of first entries that get a picture; by default all.
        levels: the values that become black and white in images of more than 8 bits.

    Raises:
        FlawmaskError: an image cannot be read or a segmentation cannot be decoded.
    """
    names = {category["id"]: category["name"] for category in split.categories}
    pairs = [(image, _entry(split, image, detections[image["id"]], names)) for image in split.images]
    pairs.sort(key=lambda pair: _badness(pair[1], conf, min_area))
    shown = pairs[:limit]
    side = round(min(MAX_SIDE, max(MIN_SIDE, USUAL_SIDE * (500 / max(1, len(shown))) ** 0.5)))

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
    """Return the highest score of a large enough detection; 0 without one."""
    return max((one["score"] for one in entry["found"] if one["area"] >= min_area), default=0.0)


def _badness(entry: dict[str, Any], conf: float, min_area: int) -> tuple[bool, float]:
    """Return a sort key: wrong verdicts come first; among equals, the image with the largest error of its score."""
    rejected = any(one["score"] >= conf and one["area"] >= min_area for one in entry["found"])
    return rejected == entry["truth"], -abs(entry["truth"] - image_score(entry, min_area))


def _add_picture(
    entry: dict[str, Any], split: CocoSplit, image: Record, found: Sequence[Record], side: int, levels: Levels
) -> None:
    """Add the picture and the outlines to an entry. The picture is never larger than the image."""
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
    """Return the detections with an `id`, which the message about a damaged one needs."""
    return [{**record, "id": place} for place, record in enumerate(found)]


def jpeg(picture: Picture) -> str:
    """Return a (height, width, 3) uint8 RGB picture as a JPEG file in base64."""
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(picture[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return base64.b64encode(data.tobytes()).decode()


def outline_path(mask: Mask, scale: float) -> str:
    """Return the outline of a mask, with its holes, as a simplified SVG path; empty for an empty mask.

    To keep the page small, coordinates are relative and in whole quarters of a picture's pixel. Otherwise the many
    ragged masks of a poor model would be larger than the pictures.

    Args:
        mask: (height, width) bool.
        scale: pixels of the picture per pixel of the mask.
    """
    if not mask.any():
        return ""
    x, y, width, height = masks.box_of(mask)
    region = mask[y : y + height, x : x + width].astype(np.uint8)
    enlarged = cv2.resize(region, None, fx=ENLARGED, fy=ENLARGED, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(enlarged, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parts = []
    for contour in contours:
        corners = cv2.approxPolyDP(contour, TOLERANCE * ENLARGED / scale, closed=True)[:, 0, :]
        points = np.rint(((corners + 0.5) / ENLARGED + (x, y)) * scale * UNITS).astype(int)
        first, *steps = np.diff(points, axis=0, prepend=[[0, 0]]).tolist()
        parts.append(_command("M", [first]) + _command("l", steps) + "z")
    return "".join(parts)


def _command(letter: str, points: Sequence[Sequence[int]]) -> str:
    """Return one command of an SVG path, with as few separators as the grammar allows."""
    numbers = " ".join(str(side) for point in points for side in point)
    return letter + numbers.replace(" -", "-") if points else ""
