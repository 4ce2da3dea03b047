"""VGG Image Annotator: one JSON file for all images, as `Export annotations (as json)` and `Save project` write it.

Dutta and Zisserman, "The VIA annotation software for images, audio and video", ACM Multimedia 2019; the fields are
listed at https://gitlab.com/vgg/via/-/blob/master/via-2.x.y/CodeDoc.md. Read: polygons, rectangles, circles and
ellipses of VIA 1 and 2; VIA 3's projects are refused.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flawmask.data.imports.labels import Box, LabelledImage, Labels, Region, Shape, ellipse, files_below, polygon
from flawmask.errors import FlawmaskError
from flawmask.files import read_json

log = logging.getLogger(__name__)

NAME = "VGG Image Annotator"

CLASS_NAMES = ("label", "class", "type", "name", "defect", "category")
"""What people call the attribute that says the class, the likeliest first; another one counts where it stands alone."""

UNNAMED = "defect"
"""The class where regions have no attribute at all."""


def is_own(content: Any) -> bool:
    """Return whether a JSON file is VIA's."""
    if not isinstance(content, dict):
        return False
    entries = content.get("_via_img_metadata", content)
    return _is_version_3(content) or (
        isinstance(entries, dict)
        and bool(entries)
        and all(isinstance(one, dict) and "filename" in one and "regions" in one for one in entries.values())
    )


def _is_version_3(content: Mapping[str, Any]) -> bool:
    return {"project", "file", "view", "metadata"} <= content.keys()


def read(labels: Labels) -> None:
    """Read VIA's files in and below the source.

    Raises:
        FlawmaskError: one is damaged, or a project of VIA 3, or does not say the regions' classes.
    """
    for path in files_below(labels.source, ".json"):
        content = read_json(path)
        if not is_own(content):
            log.warning("%s is not read: it is not as VIA writes it", path)
            continue
        if _is_version_3(content):
            raise FlawmaskError(f"{path} is a project of VIA 3: export it from VIA as COCO, and import that")
        entries = content.get("_via_img_metadata", content)
        attribute = _class_attribute(entries, path)
        for key, entry in entries.items():
            with labels.about(f"{path.as_posix()} ({entry.get('filename', key)})", NAME):
                labels.images.append(_image(entry, attribute, path, labels))


def _regions(entry: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the regions of an image, which VIA 1 numbers and VIA 2 lists."""
    found = entry["regions"]
    return list(found.values() if isinstance(found, dict) else found or ())


def _class_attribute(entries: Mapping[str, Any], path: Path) -> str | None:
    """Return which attribute of regions says their class; None where regions have no attribute.

    Raises:
        FlawmaskError: they have several, and nothing tells which.
    """
    regions: list[Mapping[str, Any]] = [
        one for entry in entries.values() for one in _regions(entry) if isinstance(one, dict)
    ]
    found: set[str] = {name for one in regions for name in one.get("region_attributes") or ()}
    if len(found) <= 1:
        return next(iter(found), None)
    chosen = next((one for name in CLASS_NAMES for one in sorted(found) if one.lower() == name), None)
    if chosen is None:
        listed = ", ".join(sorted(found))
        raise FlawmaskError(f"{path}: which attribute of the regions is their class ({listed})? Call it label, in VIA")
    return chosen


def _image(entry: Mapping[str, Any], attribute: str | None, path: Path, labels: Labels) -> LabelledImage:
    labels.expect(len(_regions(entry)))
    image = labels.image_file(str(entry["filename"]), path, beside=path.parent)
    name = labels.name_of(image)
    regions = []
    for number, region in enumerate(_regions(entry)):
        who = f"region {number} of {name}"
        shape = _shape(region["shape_attributes"])
        if shape is None:
            labels.leave_out_mark(who, str(region["shape_attributes"]["name"]))
        else:
            label = UNNAMED if attribute is None else _label(region.get("region_attributes", {}).get(attribute), who)
            regions.append(Region(label, shape, who))
    return LabelledImage(image, name, regions)


def _label(value: Any, who: str) -> str:
    """Return the class that an attribute says: a text, or the one option that is ticked."""
    ticked = [name for name, is_on in value.items() if is_on] if isinstance(value, dict) else [value]
    if len(ticked) != 1 or not isinstance(ticked[0], str) or not ticked[0].strip():
        raise FlawmaskError(f"{who} has {value!r} for its class: give it one in VIA")
    return ticked[0].strip()


def _shape(shape: Mapping[str, Any]) -> Shape | None:
    """Return where a region is; None where it has no area by its kind."""
    match shape["name"]:
        case "polygon":
            points = list(zip(shape["all_points_x"], shape["all_points_y"], strict=True))
            return lambda _height, _width: polygon(points)
        case "rect":
            box = Box(shape["x"], shape["y"], shape["width"], shape["height"])
            return lambda _height, _width: box
        case "circle" | "ellipse":
            radii = (shape["r"], shape["r"]) if shape["name"] == "circle" else (shape["rx"], shape["ry"])
            degrees = math.degrees(shape.get("theta", 0.0))
            return lambda _height, _width: ellipse((shape["cx"], shape["cy"]), radii, degrees)
    return None
