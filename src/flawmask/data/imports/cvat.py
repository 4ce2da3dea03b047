"""Read and write CVAT's XML for images, version 1.1 (https://docs.cvat.ai/docs/other/xml_format).

Polygons, boxes, ellipses and masks are read. An image without annotations is good. Tags, points, polylines, cuboids
and skeletons are not used, because they have no area. CVAT's XML for video is refused. A mask is a list of run lengths
over the rows of its own rectangle, beginning with a run of pixels outside the mask.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from flawmask.data.imports.labels import (
    Box,
    LabelledImage,
    Labels,
    Region,
    Shape,
    ellipse,
    files_below,
    polygon,
    rotated_box,
    segmentation_of,
)
from flawmask.errors import FlawmaskError
from flawmask.masks import Mask

log = logging.getLogger(__name__)

NAME = "CVAT"

Element = ElementTree.Element


def detects(source: Path) -> bool:
    """Return whether an XML file, or the first one in or below a folder, is CVAT's."""
    path = next(files_below(source, ".xml"), None)
    if path is None:
        return False
    try:
        _, root = next(ElementTree.iterparse(path, ("start",)))
    except (ElementTree.ParseError, StopIteration, OSError):
        return False
    return bool(root.tag == "annotations")


def read(labels: Labels) -> None:
    """Read CVAT's files in and below the source.

    Raises:
        FlawmaskError: a file is damaged, or is CVAT's XML for video.
    """
    for path in files_below(labels.source, ".xml"):
        root = _root(path)
        if root.tag != "annotations":
            log.warning("%s is not read: it is not as CVAT writes it", path)
            continue
        if root.find("track") is not None:
            raise FlawmaskError(f"{path} is CVAT's XML for video: export the task as `CVAT for images 1.1`")
        labels.classes += [str(name.text) for name in root.iterfind("meta//labels/label/name")]
        for image in root.iterfind("image"):
            with labels.noting_errors(f"{path.as_posix()} ({image.get('name')})", NAME):
                labels.images.append(_image(image, path, labels))


def _root(path: Path) -> Element:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise FlawmaskError(f"{path} cannot be read as XML: {error}") from None


def _image(element: Element, path: Path, labels: Labels) -> LabelledImage:
    labels.expect_annotations(len(element))
    image = labels.image_file(element.attrib["name"], path, beside=path.parent / "images")
    name = labels.name_of(image)
    regions = []
    for number, marked in enumerate(element):
        who = f"{marked.tag} {number} of {name}"
        shape = _shape(marked)
        if shape is None:
            labels.leave_out_annotation(who, marked.tag, [marked.get("label", "")] if marked.tag == "tag" else ())
        else:
            regions.append(Region(marked.attrib["label"], shape, who))
    return LabelledImage(image, name, regions, (int(element.attrib["width"]), int(element.attrib["height"])))


def _shape(element: Element) -> Shape | None:
    """Return the shape of an element, or None if shapes of its kind have no area."""
    turned = float(element.get("rotation", 0))
    match element.tag:
        case "polygon":
            points = [[float(value) for value in point.split(",")] for point in element.attrib["points"].split(";")]
            return lambda _height, _width: polygon(points)
        case "box":
            x1, y1, x2, y2 = (float(element.attrib[side]) for side in ("xtl", "ytl", "xbr", "ybr"))
            box, middle = Box(x1, y1, x2 - x1, y2 - y1), ((x1 + x2) / 2, (y1 + y2) / 2)
            return lambda _height, _width: rotated_box(box, turned, middle) if turned else box
        case "ellipse":
            x, y, rx, ry = (float(element.attrib[side]) for side in ("cx", "cy", "rx", "ry"))
            return lambda _height, _width: ellipse((x, y), (rx, ry), turned)
        case "mask":
            left, top, across, down = (int(element.attrib[side]) for side in ("left", "top", "width", "height"))
            part = _mask(element.attrib["rle"], down, across)
            return lambda height, width: segmentation_of(part, left, top, height, width)
    return None


def _mask(text: str, height: int, width: int) -> Mask:
    """Return the (height, width) mask with these run lengths.

    Raises:
        ValueError: they are not run lengths, or have another size.
    """
    counts = [int(count) for count in text.split(",")]
    if sum(counts) != height * width or min(counts) < 0:
        raise ValueError(f"a mask of {sum(counts)} pixels in a rectangle of {width}x{height}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(height, width)


def runs_of(mask: Mask) -> str:
    """Return the run lengths of a (height, width) mask as CVAT writes them."""
    flat = np.concatenate(([False], mask.ravel(), [not mask.ravel()[-1]]))
    return ", ".join(str(count) for count in np.diff(np.flatnonzero(np.diff(flat)), prepend=0))


def document(images: Iterable[tuple[dict[str, Any], Iterable[tuple[str, dict[str, Any]]]]]) -> bytes:
    """Return CVAT's XML for images.

    Args:
        images: the attributes of each image; and for each of its shapes, the tag and the attributes.
    """
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    for attributes, shapes in images:
        image = ElementTree.SubElement(root, "image", {key: str(value) for key, value in attributes.items()})
        for tag, of_shape in shapes:
            ElementTree.SubElement(image, tag, {key: str(value) for key, value in of_shape.items()})
    ElementTree.indent(root)
    xml: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return xml
