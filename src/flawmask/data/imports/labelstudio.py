"""Read Label Studio's JSON and JSON_MIN exports of tasks with images (https://labelstud.io/guide/task_format and
https://labelstud.io/guide/export).

Polygons, rectangles, ellipses and brushes are read, with coordinates as percentages of the image. If a task has several
annotations, the one marked as ground truth is used, or else the one changed last. The others are not used, nor are
results without an area (key points, choices, texts). Predictions are not read. A task without an annotation is not
labelled. A task that was submitted without a region is good.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from flawmask import masks
from flawmask.data.imports.brush import decode
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
)
from flawmask.errors import FlawmaskError
from flawmask.files import read_json
from flawmask.images import READABLE
from flawmask.masks import Segmentation

log = logging.getLogger(__name__)

NAME = "Label Studio"

TASK_KEYS = frozenset({"id", "annotation_id", "annotator", "created_at", "updated_at", "lead_time"})
"""The keys of a JSON_MIN task that are neither data nor results."""

UNRELATED = frozenset({"relation", "rating", "number", "datetime"})
"""The types of results that do not say what the image shows."""


def is_own(content: Any) -> bool:
    """Return whether a JSON file is Label Studio's."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(task, dict) and ("data" in task or _is_flat(task)) for task in content)
    )


def _is_flat(task: Mapping[str, Any]) -> bool:
    """Return whether a task is in JSON_MIN form, which has data and results as keys of the same object."""
    return "id" in task and ("annotation_id" in task or "annotator" in task)


def read(labels: Labels) -> None:
    """Read Label Studio's files in and below the source.

    Raises:
        FlawmaskError: a file is damaged.
    """
    for path in files_below(labels.source, ".json"):
        content = read_json(path)
        if not is_own(content):
            log.warning("%s is not read: it is not as Label Studio writes it", path)
            continue
        _warn_of_texts(content, path)
        for task in content:
            with labels.noting_errors(f"{path.as_posix()} (task {task.get('id')})", NAME):
                _read_task(task, path, labels)


def _warn_of_texts(tasks: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Warn of JSON_MIN tasks that count as good because they have no region, but have texts that may be choices."""
    bare = [task for task in tasks if "data" not in task and not _flat_results(task)]
    texts = {key for task in bare for key, value in task.items() if key not in TASK_KEYS and isinstance(value, str)}
    names = sorted(key for key in texts if not any(_is_image(str(task.get(key))) for task in bare))
    if names:
        log.warning(
            "%s is JSON_MIN, in which choices look like any other text (%s): %d tasks without a region count as good; "
            "if these are choices, export JSON",
            path,
            ", ".join(names),
            len(bare),
        )


def _read_task(task: Mapping[str, Any], path: Path, labels: Labels) -> None:
    data = task.get("data", task)
    if "data" in task:
        number = sum(len(annotation.get("result") or ()) for annotation in task.get("annotations") or ())
    else:
        number = len(_flat_results(task))
    labels.expect_annotations(number)
    image = labels.image_file(_image_name(data, task), path)
    name = labels.name_of(image)
    results = _flat_results(task) if "data" not in task else _results(task, name, labels)
    if results is None:
        labels.unlabelled.append(image)
        return
    regions = []
    for result in _joined(results):
        kind, who = str(result.get("type", "")), f"result {result.get('id')} of {name}"
        shape = _shape(result)
        if shape is None:
            _leave_out(result, kind, who, labels)
        elif result.get("image_rotation"):
            labels.leave_out_annotation(who, "image turned in Label Studio")
        else:
            regions.append(Region(_label(result, who), shape, who))
    sizes = {
        (result["original_width"], result["original_height"]) for result in results if result.get("original_width")
    }
    labels.images.append(LabelledImage(image, name, regions, next(iter(sizes), None)))


def _leave_out(result: Mapping[str, Any], kind: str, who: str, labels: Labels) -> None:
    """Count a result without an area. With only results of an unrelated type, an image may still be good."""
    if kind in UNRELATED:
        labels.unused_annotations.leave_out(who, kind)
    else:
        choices = [str(choice) for choice in result.get("value", {}).get("choices", ())]
        labels.leave_out_annotation(who, kind or "no shape", choices)


def _image_name(data: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """Return the name of the task's image: the only value in its data that looks like an image name.

    Raises:
        FlawmaskError: there is no such value, or there are several.
    """
    names = [value for value in data.values() if isinstance(value, str) and _is_image(value)]
    if len(names) != 1:
        raise FlawmaskError(f"task {task.get('id')} names {len(names)} images in its data: it must name exactly one")
    return names[0]


def _is_image(text: str) -> bool:
    return PurePosixPath(text.partition("?d=")[2] or text.partition("?")[0]).suffix.lower() in READABLE


def _results(task: Mapping[str, Any], name: str, labels: Labels) -> Sequence[Mapping[str, Any]] | None:
    """Return the results of the annotation that is used, or None if the task has no annotation."""
    annotations = sorted(
        task.get("annotations") or (),
        key=lambda annotation: (bool(annotation.get("ground_truth")), str(annotation.get("updated_at", ""))),
    )
    cancelled = [annotation for annotation in annotations if annotation.get("was_cancelled")]
    *others, chosen = [annotation for annotation in annotations if not annotation.get("was_cancelled")] or [None]
    for reason, unused in (("other annotation", others), ("cancelled", cancelled)):
        for result in (result for annotation in unused for result in annotation["result"]):
            labels.unused_annotations.leave_out(f"result {result.get('id')} of {name}", reason)
    if chosen is None:
        return None
    results: Sequence[Mapping[str, Any]] = chosen["result"]
    return results


def _flat_results(task: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the results of a JSON_MIN task in the form of JSON."""
    lists = (value for value in task.values() if isinstance(value, list))
    choices = [
        {"type": "choices", "value": value} for value in task.values() if isinstance(value, dict) and "choices" in value
    ]
    return [
        {**result, "value": result, "id": number}
        for number, result in enumerate(result for results in lists for result in results if isinstance(result, dict))
    ] + choices


def _joined(results: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the results, joining those with the same id: a shape, and the labels that were chosen for it."""
    by_id: dict[Any, dict[str, Any]] = {}
    for number, result in enumerate(results):
        key = result.get("id", number)
        known = by_id.get(key)
        value = {**result.get("value", {}), **(known["value"] if known else {})}
        by_id[key] = {**result, **(known or {}), "value": value}
    yield from by_id.values()


def _label(result: Mapping[str, Any], who: str) -> str:
    chosen = [label for key, value in result["value"].items() if key.endswith("labels") for label in value]
    if len(chosen) != 1:
        raise FlawmaskError(f"{who} has {len(chosen)} labels ({', '.join(map(str, chosen))}): give it one")
    return str(chosen[0])


def _shape(result: Mapping[str, Any]) -> Shape | None:
    """Return the shape of a result, or None if results of its kind have no area."""
    value = result.get("value", {})
    if value.get("format") == "rle":
        return partial(_stroke, value["rle"])
    if "points" in value and "vertices" not in value:
        return lambda height, width: polygon(value["points"], width / 100, height / 100)
    if "radiusX" in value:
        return partial(_ellipse, value)
    if {"x", "y", "width", "height"} <= value.keys() and not result.get("type", "").startswith("keypoint"):
        return partial(_rectangle, value)
    return None


def _stroke(values: Sequence[int], height: int, width: int) -> Segmentation:
    mask = decode(values, height, width)
    return masks.encode(mask) if mask.any() else masks.to_rle(mask)


def _ellipse(value: Mapping[str, Any], height: int, width: int) -> Segmentation:
    across, down = width / 100, height / 100
    radii = (value["radiusX"] * across, value["radiusY"] * down)
    return ellipse((value["x"] * across, value["y"] * down), radii, value.get("rotation") or 0.0)


def _rectangle(value: Mapping[str, Any], height: int, width: int) -> Segmentation | Box:
    """Return a rectangle. Label Studio rotates it around its upper left corner."""
    across, down = width / 100, height / 100
    box = Box(value["x"] * across, value["y"] * down, value["width"] * across, value["height"] * down)
    turned = value.get("rotation") or 0.0
    return rotated_box(box, turned, (box.x, box.y)) if turned else box
