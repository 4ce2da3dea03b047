"""Label Studio's JSON and JSON_MIN, of tasks with images (https://labelstud.io/guide/task_format and
https://labelstud.io/guide/export).

Read: polygons, rectangles, ellipses and brushes of the annotation that is marked as ground truth, or else of the one
changed last. Coordinates are percentages of the image. Predictions are not read. Other annotators' work, and results
without an area (key points, choices, texts), are not used. A task that nobody has annotated is not labelled; one that
somebody has submitted without a region is good.
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

FACTS = frozenset({"id", "annotation_id", "annotator", "created_at", "updated_at", "lead_time"})
"""What JSON_MIN says of a task beside its data and its results."""

UNRELATED = frozenset({"relation", "rating", "number", "datetime"})
"""Results that say nothing of what is on the image."""


def is_own(content: Any) -> bool:
    """Return whether a JSON file is Label Studio's."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(task, dict) and ("data" in task or _is_flat(task)) for task in content)
    )


def _is_flat(task: Mapping[str, Any]) -> bool:
    """Return whether a task is one of JSON_MIN, which has the names of data and of results side by side."""
    return "id" in task and ("annotation_id" in task or "annotator" in task)


def read(labels: Labels) -> None:
    """Read Label Studio's files in and below the source.

    Raises:
        FlawmaskError: one is damaged.
    """
    for path in files_below(labels.source, ".json"):
        content = read_json(path)
        if not is_own(content):
            log.warning("%s is not read: it is not as Label Studio writes it", path)
            continue
        _warn_of_texts(content, path)
        for task in content:
            with labels.about(f"{path.as_posix()} (task {task.get('id')})", NAME):
                _read_task(task, path, labels)


def _warn_of_texts(tasks: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Warn of texts in JSON_MIN that may be choices, where a task has nothing else and counts as good."""
    bare = [task for task in tasks if "data" not in task and not _flat_results(task)]
    texts = {name for task in bare for name, value in task.items() if name not in FACTS and isinstance(value, str)}
    names = sorted(name for name in texts if not any(_is_image(str(task.get(name))) for task in bare))
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
    written = (
        [_flat_results(task)]
        if "data" not in task
        else [one.get("result") or () for one in task.get("annotations") or ()]
    )
    labels.expect(sum(map(len, written)))
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
            labels.leave_out_mark(who, "image turned in Label Studio")
        else:
            regions.append(Region(_label(result, who), shape, who))
    sizes = {(one["original_width"], one["original_height"]) for one in results if one.get("original_width")}
    labels.images.append(LabelledImage(image, name, regions, next(iter(sizes), None)))


def _leave_out(result: Mapping[str, Any], kind: str, who: str, labels: Labels) -> None:
    """Count a result without an area. Of those that say nothing of a defect, an image may be good all the same."""
    if kind in UNRELATED:
        labels.marked.leave_out(who, kind)
    else:
        labels.leave_out_mark(who, kind or "no shape", [str(one) for one in result.get("value", {}).get("choices", ())])


def _image_name(data: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """Return the name of the task's image: the one value of its data that looks like one.

    Raises:
        FlawmaskError: there is none, or several.
    """
    found = [value for value in data.values() if isinstance(value, str) and _is_image(value)]
    if len(found) != 1:
        raise FlawmaskError(f"task {task.get('id')} names {len(found)} images in its data: there must be one")
    return found[0]


def _is_image(text: str) -> bool:
    return PurePosixPath(text.partition("?d=")[2] or text.partition("?")[0]).suffix.lower() in READABLE


def _results(task: Mapping[str, Any], name: str, labels: Labels) -> Sequence[Mapping[str, Any]] | None:
    """Return the results of the annotation that counts; None where nobody has annotated the task."""
    every = sorted(
        task.get("annotations") or (), key=lambda one: (bool(one.get("ground_truth")), str(one.get("updated_at", "")))
    )
    *others, chosen = [one for one in every if not one.get("was_cancelled")] or [None]
    cancelled = [one for one in every if one.get("was_cancelled")]
    for reason, of_reason in (("other annotation", others), ("cancelled", cancelled)):
        for result in (one for other in of_reason for one in other["result"]):
            labels.marked.leave_out(f"result {result.get('id')} of {name}", reason)
    if chosen is None:
        return None
    found: Sequence[Mapping[str, Any]] = chosen["result"]
    return found


def _flat_results(task: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the results of a task of JSON_MIN as JSON has them."""
    lists = (value for value in task.values() if isinstance(value, list))
    chosen = [{"type": "choices", "value": one} for one in task.values() if isinstance(one, dict) and "choices" in one]
    return [
        {**one, "value": one, "id": number}
        for number, one in enumerate(one for found in lists for one in found if isinstance(one, dict))
    ] + chosen


def _joined(results: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the results, those with one id as one: a shape and the labels that were chosen for it."""
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
    """Return where a result is; None where it has no area by its kind."""
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
    """Return a rectangle, which is turned around its upper left corner."""
    across, down = width / 100, height / 100
    box = Box(value["x"] * across, value["y"] * down, value["width"] * across, value["height"] * down)
    turned = value.get("rotation") or 0.0
    return rotated_box(box, turned, (box.x, box.y)) if turned else box
