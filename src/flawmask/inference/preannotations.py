"""Write predictions as labels for labelling tools. A person corrects them there, instead of drawing each defect.

- COCO's object detection (https://cocodataset.org/#format-data), which CVAT (`COCO 1.0`), Roboflow and FiftyOne read.
- CVAT's XML for images 1.1 (https://docs.cvat.ai/docs/other/xml_format).
- Label Studio's tasks with predictions (https://labelstud.io/guide/predictions), for a labelling interface with
  `<Image name="image" value="$image"/>` and `<PolygonLabels name="polygon">`, `<BrushLabels name="brush">` or
  `<RectangleLabels name="rectangle">`, each `toName="image"`.

Polygons are simplified with Douglas and Peucker's algorithm ("Algorithms for the reduction of the number of points
required to represent a digitized line or its caricature", 1973): no corner of a mask's outline is farther from the
polygon than the tolerance. A mask with a hole is written as a mask, because a polygon has no hole.
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
        folder: the folder for `preannotations.json`, or `preannotations.xml` for CVAT.
        tool: the labelling tool.
        records: the records of `predictions.json`. Images that could not be read are left out.
        classes: the names of the network's classes.
        tolerance: the largest distance of a polygon from its mask, in pixels; 0 keeps every corner.
    """
    readable = [record for record in records if "error" not in record]
    path = folder / f"preannotations.{'xml' if tool == 'cvat' else 'json'}"
    if tool == "cvat":
        write_bytes(path, cvat.document(_for_cvat(readable, tolerance)))
    elif tool == "coco":
        write_json(path, _for_coco(readable, classes, tolerance))
    else:
        write_json(path, list(_for_label_studio(readable, tolerance)))
    return path


def simplified(mask: Mask, tolerance: float) -> Polygons | None:
    """Return the outline of a mask as simplified COCO polygons; None where the mask has a hole.

    A piece keeps all its corners if it would become a mere line.

    Args:
        mask: (height, width) bool, with at least one pixel.
        tolerance: the largest distance of a corner from the polygon, in pixels.
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


def _mask(instance: Mapping[str, Any]) -> Mask | None:
    """Return the instance's mask; None where the network predicts no masks, and for a mask without a pixel."""
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
            mask = _mask(instance)
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
            mask = _mask(instance)
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
        # The address of a file in Label Studio's local storage: https://labelstud.io/guide/storage#Local-storage
        image = f"/data/local-files/?d={quote(record['file'].lstrip('/'))}"
        prediction = {"model_version": "flawmask", "score": record["score"], "result": results}
        yield {"data": {"image": image}, "predictions": [prediction]}


def _values(instance: Mapping[str, Any], record: Record, tolerance: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield, for each piece of an instance, the name of Label Studio's control and its value."""
    across, down = 100 / record["width"], 100 / record["height"]
    mask = _mask(instance)
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
