"""Read labelme's labels: a JSON file for each image (https://github.com/wkentaro/labelme, `labelme/_label_file.py`
and `_shape.py`).

Polygons, rectangles, circles and masks are read. Shapes with the same label and the same `group_id` are one instance.
An image that is stored only inside its JSON file (`imageData`) is not read.
"""

import base64
import binascii
import logging
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from flawmask import images, masks
from flawmask.data.imports.labels import (
    Box,
    LabelledImage,
    Labels,
    Region,
    Shape,
    ellipse,
    files_below,
    polygon,
    segmentation_of,
)
from flawmask.errors import FlawmaskError
from flawmask.files import read_json
from flawmask.masks import Segmentation

log = logging.getLogger(__name__)

NAME = "labelme"


def is_own(content: Any) -> bool:
    """Return whether a JSON file is labelme's."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def read(labels: Labels) -> None:
    """Read the JSON file of each image in and below the source."""
    for path in files_below(labels.source, ".json"):
        with labels.noting_errors(path.as_posix(), NAME):
            for image in (path.with_suffix(suffix) for suffix in images.SUFFIXES):
                if image.is_file():
                    labels.note_named(image)  # even if the JSON file is damaged
            content = read_json(path)
            if is_own(content):
                labels.images.append(_image(content, path, labels))
            else:
                log.warning("%s is not read: it is not as labelme writes it", path)


def _image(content: dict[str, Any], path: Path, labels: Labels) -> LabelledImage:
    labels.expect_annotations(len(content["shapes"]))
    image = labels.image_file(str(content["imagePath"]), path, beside=path.parent)
    name = labels.name_of(image)
    grouped: dict[Any, list[tuple[str, Shape]]] = defaultdict(list)
    for number, shape in enumerate(content["shapes"]):
        label, kind, group = str(shape["label"] or ""), shape.get("shape_type") or "polygon", shape.get("group_id")
        converted = _shape(shape, kind, path)
        if converted is None:
            labels.leave_out_annotation(f"shape {number} of {name}", kind)
        else:
            key = (number,) if group is None or kind == "rectangle" else (label, group)
            grouped[key].append((label, converted))
    for flag, is_on in (content.get("flags") or {}).items():
        if is_on:
            labels.leave_out_annotation(f"flag {flag} of {name}", "flag", [str(flag)])
    regions = [
        Region(parts[0][0], _joined([shape for _, shape in parts]), f"shape {number} of {name}")
        for number, parts in enumerate(grouped.values())
    ]
    width, height = content.get("imageWidth"), content.get("imageHeight")
    return LabelledImage(image, name, regions, (int(width), int(height)) if width and height else None)


def _shape(shape: dict[str, Any], kind: str, path: Path) -> Shape | None:
    """Return the shape, or None if shapes of its kind have no area."""
    points = [(float(x), float(y)) for x, y in shape["points"]]
    match kind:
        case "polygon":
            return lambda _height, _width: polygon(points)
        case "rectangle" | "oriented_rectangle" if len(points) > 2:
            return lambda _height, _width: polygon(points)
        case "rectangle":
            (x1, y1), (x2, y2) = points
            return lambda _height, _width: Box(min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1))
        case "circle":
            centre, edge = points
            radius = math.dist(centre, edge)
            return lambda _height, _width: ellipse(centre, (radius, radius))
        case "mask":
            try:
                data = base64.b64decode(shape["mask"], validate=True)
            except binascii.Error:
                raise FlawmaskError(f"{path} holds a mask that is no base64: export it anew") from None
            part = np.asarray(images.decode(data, path) > 0)
            left, top = (round(value) for value in points[0])
            return lambda height, width: segmentation_of(part, left, top, height, width)
    return None


def _joined(shapes: list[Shape]) -> Shape:
    """Return one shape for all shapes of a group."""
    if len(shapes) == 1:
        return shapes[0]

    def union(height: int, width: int) -> Segmentation:
        parts = [shape(height, width) for shape in shapes]
        rles = [masks.as_rle(part, height, width) for part in parts if not isinstance(part, Box)]
        return masks.encode(masks.decode(masks.union(rles, height, width), height, width))

    return union
