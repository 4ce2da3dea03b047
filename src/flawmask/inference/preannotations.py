"""Predictions as labelling tools open them, so that a person corrects them instead of drawing from nothing.

- COCO's object detection (https://cocodataset.org/#format-data), which CVAT (`COCO 1.0`), Roboflow and FiftyOne take.
- CVAT's XML for images 1.1 (https://docs.cvat.ai/docs/other/xml_format).
- Label Studio's tasks with predictions (https://labelstud.io/guide/predictions), for a labelling interface with
  `<Image name="image" value="$image"/>` and `<PolygonLabels name="polygon">`, `<BrushLabels name="brush">` or
  `<RectangleLabels name="rectangle">`, each `toName="image"`.

Polygons are simplified with Douglas and Peucker's algorithm ("Algorithms for the reduction of the number of points
required to represent a digitized line or its caricature", 1973): no corner of an outline is farther from its polygon
than the tolerance. What has a hole, which a polygon has not, is written as a mask.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import cv2
import numpy as np

from flawmask import masks
from flawmask.coco import Record
from flawmask.data.imports import brush, cvat
from flawmask.files import write_bytes, write_json
from flawmask.good_names import GOOD
from flawmask.masks import Mask

Tool = Literal["coco", "cvat", "labelstudio"]

Polygons = list[list[float]]


def write(folder: Path, tool: Tool, records: Sequence[Record], classes: Sequence[str], tolerance: float) -> Path:
    """Write the predictions of all images for a tool, and return the file.

    Args:
        folder: where it goes: `preannotations.json`, or `preannotations.xml` for CVAT.
        tool: what is to open it.
        records: those of `predictions.json`; images that could not be read are left out.
        classes: the names of the network's classes.
        tolerance: how far polygons may be from the outlines, in pixels; 0 keeps every corner.
    """
    read = [record for record in records if "error" not in record]
    path = folder / f"preannotations.{'xml' if tool == 'cvat' else 'json'}"
    if tool == "cvat":
        write_bytes(path, cvat.document(_for_cvat(read, tolerance)))
    else:
        made = _for_coco(read, classes, tolerance) if tool == "coco" else list(_for_label_studio(read, tolerance))
        write_json(path, made)
    return path


def simplified(mask: Mask, tolerance: float) -> Polygons | None:
    """Return the outline of a (height, width) mask as COCO polygons, simplified; None where it has a hole.

    A piece of which no more than a line would be left keeps all its corners.

    Args:
        mask: bool, with a pixel at least.
        tolerance: how far a corner may be from the polygon, in pixels.
    """
    rings = masks.to_polygons(mask)
    if rings is None:
        return None
    simple = []
    for ring in rings:
        corners = np.array(ring, dtype=np.int32).reshape(-1, 1, 2)
        fewer = cv2.approxPolyDP(corners, tolerance, closed=True)
        chosen = fewer if len(fewer) > 2 and cv2.contourArea(fewer) > 0 else corners
        simple.append([float(value) for value in chosen.ravel()])
    return simple


def _outline(instance: Mapping[str, Any]) -> Mask | None:
    """Return the instance's mask; None of a network that finds boxes, and where a box is too small to hold a pixel."""
    rle = instance["segmentation"]
    return masks.decode(rle, *rle["size"]) if rle is not None and instance["area"] else None


def _for_coco(records: Sequence[Record], classes: Sequence[str], tolerance: float) -> dict[str, Any]:
    names = [name for name in classes if name != GOOD]
    images: list[Record] = []
    annotations: list[Record] = []
    for image_id, record in enumerate(records, start=1):
        name = Path(record["file"]).name
        images.append({"id": image_id, "file_name": name, "width": record["width"], "height": record["height"]})
        for instance in record["instances"]:
            mask = _outline(instance)
            polygons = None if mask is None else simplified(mask, tolerance)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": names.index(instance["class"]) + 1,
                    "bbox": instance["box"],
                    "area": instance["area"],
                    "iscrowd": 0,
                    "segmentation": [] if mask is None else polygons or instance["segmentation"],
                    "score": instance["score"],
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _for_cvat(records: Sequence[Record], tolerance: float) -> Iterator[tuple[Record, list[tuple[str, Record]]]]:
    for image_id, record in enumerate(records):
        shapes = []
        for group, instance in enumerate(record["instances"], start=1):
            common = {"label": instance["class"], "source": "auto", "occluded": 0, "z_order": 0}
            mask = _outline(instance)
            rings = None if mask is None else simplified(mask, tolerance)
            if mask is None:
                x, y, across, down = instance["box"]
                sides = {"xtl": x, "ytl": y, "xbr": x + across, "ybr": y + down}
                shapes.append(("box", common | {side: f"{value:.2f}" for side, value in sides.items()}))
            elif rings is None:
                cut = masks.crop_mask(mask)
                height, width = cut.mask.shape
                place = {"left": cut.x, "top": cut.y, "width": width, "height": height}
                shapes.append(("mask", common | {"rle": cvat.runs_of(cut.mask)} | place))
            else:
                joined = {"group_id": group} if len(rings) > 1 else {}  # pieces of one defect
                for ring in rings:
                    points = ";".join(f"{x:.2f},{y:.2f}" for x, y in _pairs(ring))
                    shapes.append(("polygon", common | {"points": points} | joined))
        name = Path(record["file"]).name
        yield {"id": image_id, "name": name, "width": record["width"], "height": record["height"]}, shapes


def _for_label_studio(records: Sequence[Record], tolerance: float) -> Iterator[dict[str, Any]]:
    for record in records:
        results = [
            {
                "id": f"{number}-{piece}",
                "type": f"{control}labels",
                "from_name": control,
                "to_name": "image",
                "original_width": record["width"],
                "original_height": record["height"],
                "image_rotation": 0,
                "score": instance["score"],
                "value": {**value, f"{control}labels": [instance["class"]]},
            }
            for number, instance in enumerate(record["instances"])
            for piece, (control, value) in enumerate(_values(instance, record, tolerance))
        ]
        # What a local storage of Label Studio calls a file: https://labelstud.io/guide/storage#Local-storage
        image = f"/data/local-files/?d={quote(record['file'].lstrip('/'))}"
        prediction = {"model_version": "flawmask", "score": record["score"], "result": results}
        yield {"data": {"image": image}, "predictions": [prediction]}


def _values(instance: Mapping[str, Any], record: Record, tolerance: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the tool of Label Studio's that draws an instance, and what it draws, for each of its pieces."""
    across, down = 100 / record["width"], 100 / record["height"]
    mask = _outline(instance)
    rings = None if mask is None else simplified(mask, tolerance)
    if mask is None:
        x, y, width, height = instance["box"]
        box = {"x": x * across, "y": y * down, "width": width * across, "height": height * down}
        yield "rectangle", box | {"rotation": 0}
    elif rings is None:
        yield "brush", {"format": "rle", "rle": brush.encode(mask)}
    else:
        for ring in rings:
            yield "polygon", {"points": [[x * across, y * down] for x, y in _pairs(ring)], "closed": True}


def _pairs(ring: Sequence[float]) -> Iterator[tuple[float, float]]:
    return zip(ring[::2], ring[1::2], strict=True)
