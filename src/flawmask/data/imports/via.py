"""Read VGG Image Annotator's labels: one JSON file for all images, from `Export annotations (as json)` or
`Save project`.

Dutta and Zisserman, "The VIA annotation software for images, audio and video", ACM Multimedia 2019; the fields are
listed at https://gitlab.com/vgg/via/-/blob/master/via-2.x.y/CodeDoc.md. Polygons, rectangles, circles and ellipses of
VIA 1 and 2 are read. Projects of VIA 3 are refused.
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
"""Usual names of the attribute that holds the class, the likeliest first. An attribute with another name is used if
it is the only one."""

UNNAMED = "defect"
"""The class of regions if no region has an attribute."""


def is_own(content: Any) -> bool:
    """Return whether a JSON file is VIA's."""
    if not isinstance(content, dict):
        return False
    entries = content.get("_via_img_metadata", content)
    return _is_version_3(content) or (
        isinstance(entries, dict)
        and bool(entries)
        and all(isinstance(entry, dict) and "filename" in entry and "regions" in entry for entry in entries.values())
    )


def _is_version_3(content: Mapping[str, Any]) -> bool:
    return {"project", "file", "view", "metadata"} <= content.keys()


def read(labels: Labels) -> None:
    """Read VIA's files in and below the source.

    Raises:
        FlawmaskError: a file is damaged, is a project of VIA 3, or does not tell the regions' classes.
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
            with labels.noting_errors(f"{path.as_posix()} ({entry.get('filename', key)})", NAME):
                labels.images.append(_image(entry, attribute, path, labels))


def _regions(entry: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the regions of an image. VIA 1 has a numbered dictionary, VIA 2 a list."""
    regions = entry["regions"]
    return list(regions.values() if isinstance(regions, dict) else regions or ())


def _class_attribute(entries: Mapping[str, Any], path: Path) -> str | None:
    """Return the attribute that holds the class of regions; None if no region has an attribute.

    Raises:
        FlawmaskError: there are several attributes, and it is not clear which one holds the class.
    """
    regions: list[Mapping[str, Any]] = [
        region for entry in entries.values() for region in _regions(entry) if isinstance(region, dict)
    ]
    attributes: set[str] = {name for region in regions for name in region.get("region_attributes") or ()}
    if len(attributes) <= 1:
        return next(iter(attributes), None)
    chosen = next(
        (attribute for name in CLASS_NAMES for attribute in sorted(attributes) if attribute.lower() == name), None
    )
    if chosen is None:
        listed = ", ".join(sorted(attributes))
        raise FlawmaskError(
            f"{path} has no region attribute that is clearly the class ({listed}): rename the right one to label in VIA"
        )
    return chosen


def _image(entry: Mapping[str, Any], attribute: str | None, path: Path, labels: Labels) -> LabelledImage:
    labels.expect_annotations(len(_regions(entry)))
    image = labels.image_file(str(entry["filename"]), path, beside=path.parent)
    name = labels.name_of(image)
    regions = []
    for number, region in enumerate(_regions(entry)):
        who = f"region {number} of {name}"
        shape = _shape(region["shape_attributes"])
        if shape is None:
            labels.leave_out_annotation(who, str(region["shape_attributes"]["name"]))
        else:
            label = UNNAMED if attribute is None else _label(region.get("region_attributes", {}).get(attribute), who)
            regions.append(Region(label, shape, who))
    return LabelledImage(image, name, regions)


def _label(value: Any, who: str) -> str:
    """Return the class in an attribute: its text, or the only option that is ticked."""
    ticked = [name for name, is_on in value.items() if is_on] if isinstance(value, dict) else [value]
    if len(ticked) != 1 or not isinstance(ticked[0], str) or not ticked[0].strip():
        raise FlawmaskError(f"{who} has the class {value!r}: give it exactly one name in VIA")
    return ticked[0].strip()


def _shape(shape: Mapping[str, Any]) -> Shape | None:
    """Return the shape of a region, or None if shapes of its kind have no area."""
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
