"""Labels of other tools are converted to a COCO folder, exact to the pixel; unused labels are counted and listed."""

import base64
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prepared import draw_image

import flawmask
from flawmask.coco import CocoSplit, read_split
from flawmask.coco_files import split_names
from flawmask.data.import_labels import ImportConfig, import_labels
from flawmask.data.imports import brush, cvat, recognised
from flawmask.data.imports.labels import ellipse, segmentation_of
from flawmask.data.prepare import Prepared
from flawmask.errors import FlawmaskError, UnusedError
from flawmask.files import read_json
from flawmask.good_names import GOOD
from flawmask.masks import Mask, decode, rle_of_box

WIDTH, HEIGHT = 40, 32

SQUARE = np.zeros((HEIGHT, WIDTH), dtype=bool)
SQUARE[8:16, 10:20] = True
CORNERS = [[10, 8], [20, 8], [20, 16], [10, 16]]

RING = SQUARE.copy()
RING[10:14, 12:18] = False

NAMES = ["a", "b", "c", "d", "good 1", "good 2"]
"""The names of the images: a to d have defects, the others are good."""

Write = Callable[[Path, dict[str, list[Any]]], Path]
"""Writes the label files of a folder, given the marks on each image by its name, and returns the path to import."""


def draw(folder: Path, below: str = "") -> Path:
    for seed, name in enumerate(NAMES):
        draw_image(folder / below / f"{name}.png", seed, (HEIGHT, WIDTH))
    return folder


def imported(source: Path, **given: Any) -> Prepared:
    return import_labels(ImportConfig(source=source, **{"output_dir": source.parent / "out", **given}))


def splits(made: Prepared) -> list[CocoSplit]:
    return [read_split(made.dataset_dir, name) for name in split_names(made.dataset_dir)]


def masks_of(made: Prepared) -> dict[str, list[tuple[str, Mask]]]:
    """Return the class and mask of each annotation by the stem of its image's name."""
    found = {}
    for split in splits(made):
        names = {category["id"]: category["name"] for category in split.categories}
        for image in split.images:
            found[Path(image["original_file"]).stem] = [
                (names[one["category_id"]], decode(one["segmentation"], HEIGHT, WIDTH))
                for one in split.annotations[image["id"]]
            ]
    return found


def counts(made: Prepared, what: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(made.dataset_dir / "dataset_info.json")["tally"][what]
    assert found["found"] == found["used"] + sum(map(len, found["not_used"].values()))
    return found


# The files of each tool, with all fields that it writes.


def labelme_shape(label: str, points: Any, kind: str = "polygon", **more: Any) -> dict[str, Any]:
    other: dict[str, Any] = {"group_id": None, "description": "", "shape_type": kind, "flags": {}, "mask": None}
    return {"label": label, "points": points, **other, **more}


def labelme_mask(label: str, part: Mask, x: int, y: int) -> dict[str, Any]:
    data = io.BytesIO()
    Image.fromarray(part.astype(np.uint8)).save(data, "PNG")
    height, width = part.shape
    points = [[x, y], [x + width - 1, y + height - 1]]
    return labelme_shape(label, points, "mask", mask=base64.b64encode(data.getvalue()).decode())


def labelme(folder: Path, marked: dict[str, list[Any]]) -> Path:
    for name, shapes in marked.items():
        facts = {"imagePath": f"{name}.png", "imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH}
        content: dict[str, Any] = {"version": "5.5.0", "flags": {}, "shapes": shapes, **facts}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def via_region(shape: dict[str, Any], label: Any = "dent") -> dict[str, Any]:
    return {"shape_attributes": shape, "region_attributes": {"label": label}}


def via_polygon(points: Any) -> dict[str, Any]:
    xs, ys = zip(*points, strict=True)
    return {"name": "polygon", "all_points_x": list(xs), "all_points_y": list(ys)}


def via(folder: Path, marked: dict[str, list[Any]]) -> Path:
    entries = {
        f"{name}.png{123}": {"filename": f"{name}.png", "size": 123, "regions": regions, "file_attributes": {}}
        for name, regions in marked.items()
    }
    (folder / "via_region_data.json").write_text(json.dumps(entries))
    return folder


def cvat_xml(folder: Path, marked: dict[str, list[Any]]) -> Path:
    def attributes(values: dict[str, Any]) -> str:
        return " ".join(f"{key}={quoteattr(str(value))}" for key, value in values.items())

    images = "".join(
        f'<image id="{number}" name={quoteattr(f"{name}.png")} width="{WIDTH}" height="{HEIGHT}">'
        + "".join(
            f'<{tag} label="dent" source="manual" occluded="0" {attributes(of)} z_order="0"/>' for tag, of in of_image
        )
        + "</image>"
        for number, (name, of_image) in enumerate(marked.items())
    )
    names = "".join(f"<label><name>{name}</name><attributes></attributes></label>" for name in ("unused", "dent"))
    meta = f"<meta><task><id>1</id><mode>annotation</mode><labels>{names}</labels></task></meta>"
    text = f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{meta}{images}</annotations>'
    (folder / "annotations.xml").write_text(text)
    return folder


def studio_result(kind: str, value: dict[str, Any], **more: Any) -> dict[str, Any]:
    sizes = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    value = {**value, kind: ["dent"]}
    return {
        **sizes,
        "value": value,
        "id": "x1",
        "from_name": "l",
        "to_name": "i",
        "type": kind,
        "origin": "manual",
        **more,
    }


def in_percent(points: Any) -> list[list[float]]:
    return [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in points]


def studio_task(number: int, name: str, *annotations: dict[str, Any], **more: Any) -> dict[str, Any]:
    upload = f"{number:08x}-{name}.png"
    data = {"image": f"/data/upload/4/{upload}"}
    return {
        "id": number,
        "annotations": list(annotations),
        "file_upload": upload,
        "predictions": [],
        "data": data,
        **more,
    }


def studio_annotation(results: list[Any], **more: Any) -> dict[str, Any]:
    facts = {"id": 7, "completed_by": 1, "was_cancelled": False, "ground_truth": False, "updated_at": "2024-03-01"}
    return {**facts, "result": [{**one, "id": f"r{number}"} for number, one in enumerate(results)], **more}


def label_studio(folder: Path, marked: dict[str, list[Any]]) -> Path:
    tasks = [studio_task(n, name, studio_annotation(results)) for n, (name, results) in enumerate(marked.items())]
    (folder / "project-4.json").write_text(json.dumps(tasks))
    return folder


def label_studio_min(folder: Path, marked: dict[str, list[Any]]) -> Path:
    tasks = [
        {
            **{"image": f"/data/upload/4/{n:08x}-{name}.png", "id": n, "annotator": 1, "annotation_id": n},
            **{"created_at": "2024-03-01", "updated_at": "2024-03-01", "lead_time": 3.5},
            "label": [
                {**one["value"], "original_width": one["original_width"], "original_height": one["original_height"]}
                for one in results
            ],
        }
        for n, (name, results) in enumerate(marked.items())
    ]
    (folder / "min.json").write_text(json.dumps(tasks))
    return folder


def yolo(folder: Path, marked: dict[str, list[Any]]) -> Path:
    (folder / "data.yaml").write_text("train: images\nval: images\nnc: 2\nnames: {0: unused, 1: dent}\n")
    (folder / "labels").mkdir()
    (folder / "images").mkdir()
    for path in folder.glob("*.png"):
        path.rename(folder / "images" / path.name)
    for name, lines in marked.items():
        if lines:
            (folder / "labels" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def yolo_polygon(points: Any) -> str:
    return "1 " + " ".join(f"{x / WIDTH:.6f} {y / HEIGHT:.6f}" for x, y in points)


def coco(folder: Path, marked: dict[str, list[Any]]) -> Path:
    images = [{"id": n, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT} for n, name in enumerate(marked)]
    records = [
        {"id": 10 * n + at, "image_id": n, "category_id": 3, "segmentation": outline, "iscrowd": 0}
        for n, of_image in enumerate(marked.values())
        for at, outline in enumerate(of_image)
    ]
    content = {"images": images, "annotations": records, "categories": [{"id": 3, "name": "dent"}]}
    (folder / "instances_default.json").write_text(json.dumps(content))
    return folder


FLAT = [float(value) for corner in CORNERS for value in corner]
CENTRE, RADIUS = (15.0, 12.0), 6.0

TOOLS: dict[str, tuple[Write, str, Any]] = {
    "labelme": (labelme, "labelme", labelme_shape("dent", CORNERS)),
    "VIA": (via, "via", via_region(via_polygon(CORNERS))),
    "CVAT": (cvat_xml, "cvat", ("polygon", {"points": ";".join(f"{x}.00,{y}.00" for x, y in CORNERS)})),
    "Label Studio": (
        label_studio,
        "labelstudio",
        studio_result("polygonlabels", {"points": in_percent(CORNERS), "closed": True}),
    ),
    "Label Studio, JSON_MIN": (
        label_studio_min,
        "labelstudio",
        studio_result("polygonlabels", {"points": in_percent(CORNERS), "closed": True}),
    ),
    "YOLO": (yolo, "yolo", yolo_polygon(CORNERS)),
    "COCO": (coco, "coco", [FLAT]),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_polygons_of_every_tool_give_the_same_pixels(tool: str, tmp_path: Path) -> None:
    write, name, marked = TOOLS[tool]
    source = write(draw(tmp_path / "in"), {one: [] if "good" in one else [marked] for one in NAMES})
    assert recognised(source) == name
    made = imported(source)
    found = masks_of(made)
    assert set(found) == set(NAMES)
    for one in NAMES:
        assert [label for label, _ in found[one]] == ([] if "good" in one else ["dent"])
        assert all(np.array_equal(mask, SQUARE) for _, mask in found[one])
    assert {"train", "val"} <= set(split_names(made.dataset_dir))
    info = read_json(made.dataset_dir / "dataset_info.json")
    assert info["source"]["format"] == name
    assert counts(made, "images") == {"found": 6, "used": 6, "not_used": {}}
    assert counts(made, "annotations") == {"found": 4, "used": 4, "not_used": {}}
    by_type = {kind: made.train["by_type"][kind] + made.val["by_type"].get(kind, 0) for kind in made.train["by_type"]}
    assert by_type == {"dent": 4, GOOD: 2}
    for split in splits(made):
        for image in split.images:
            assert split.image_path(image).read_bytes() == next(source.rglob(image["original_file"])).read_bytes()
    again = flawmask.import_labels(str(source), output_dir=str(made.dataset_dir), source_format=name)
    assert again.reused


def test_a_class_whose_name_may_mean_good_must_be_confirmed(tmp_path: Path) -> None:
    write, _, marked = TOOLS["labelme"]
    source = write(draw(tmp_path / "in"), {one: [] if "good" in one else [marked] for one in NAMES})
    for path in source.glob("[ab].json"):
        path.write_text(path.read_text().replace('"dent"', '"OK"'))
    with pytest.raises(
        FlawmaskError, match=r"the class OK counts as a defect, .* --good_name OK if it is good, or --good_name good"
    ):
        imported(source)
    assert not (tmp_path / "out").exists()
    found = masks_of(imported(source, good_name="OK"))
    assert [label for label, _ in found["a"] + found["c"]] == [GOOD, "dent"]


def round_one(height: int, width: int) -> Mask:
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.asarray((columns - CENTRE[0]) ** 2 + (rows - CENTRE[1]) ** 2 < RADIUS**2)


PERCENT = {"x": 25.0, "y": 25.0, "width": 25.0, "height": 25.0}
OTHER_SHAPES: dict[str, tuple[str, Any, Mask]] = {
    "labelme mask": ("labelme", labelme_mask("dent", RING[8:16, 10:20], 10, 8), RING),
    "labelme circle": ("labelme", labelme_shape("dent", [[15, 12], [15, 18]], "circle"), round_one(HEIGHT, WIDTH)),
    "CVAT mask": (
        "CVAT",
        ("mask", {"rle": cvat.runs_of(RING[8:16, 10:20]), "left": 10, "top": 8, "width": 10, "height": 8}),
        RING,
    ),
    "CVAT ellipse": ("CVAT", ("ellipse", {"cx": 15.0, "cy": 12.0, "rx": 6.0, "ry": 6.0}), round_one(HEIGHT, WIDTH)),
    "CVAT turned box": (
        "CVAT",  # 8 x 10 pixels rotated by 90 degrees around their centre
        ("box", {"xtl": 11.0, "ytl": 7.0, "xbr": 19.0, "ybr": 17.0, "rotation": 90.0}),
        SQUARE,
    ),
    "VIA circle": ("VIA", via_region({"name": "circle", "cx": 15, "cy": 12, "r": 6}), round_one(HEIGHT, WIDTH)),
    "VIA ellipse": (
        "VIA",
        via_region({"name": "ellipse", "cx": 15, "cy": 12, "rx": 6, "ry": 6, "theta": 0.5}),
        round_one(HEIGHT, WIDTH),
    ),
    "brush": ("Label Studio", studio_result("brushlabels", {"format": "rle", "rle": brush.encode(RING)}), RING),
    "Label Studio ellipse": (
        "Label Studio",
        studio_result("ellipselabels", {"x": 37.5, "y": 37.5, "radiusX": 15.0, "radiusY": 18.75, "rotation": 0}),
        round_one(HEIGHT, WIDTH),
    ),
    "Label Studio turned box": (
        "Label Studio",  # around its upper left corner
        studio_result("rectanglelabels", {"x": 50.0, "y": 25.0, "width": 20.0, "height": 31.25, "rotation": 90}),
        SQUARE,
    ),
}


@pytest.mark.parametrize("which", OTHER_SHAPES)
def test_other_shapes_cover_the_same_pixels_as_in_the_tool(which: str, tmp_path: Path) -> None:
    tool, marked, expected = OTHER_SHAPES[which]
    source = TOOLS[tool][0](draw(tmp_path / "in"), {one: [] if "good" in one else [marked] for one in NAMES})
    found = masks_of(imported(source))
    for one in "abcd":
        ((label, mask),) = found[one]
        assert label == "dent"
        is_round = not (np.array_equal(expected, SQUARE) or np.array_equal(expected, RING))
        assert np.count_nonzero(mask != expected) <= (6 if is_round else 0)


BOXES = {
    "labelme": labelme_shape("dent", [[20, 16], [10, 8]], "rectangle"),
    "VIA": via_region({"name": "rect", "x": 10, "y": 8, "width": 10, "height": 8}),
    "CVAT": ("box", {"xtl": 10.0, "ytl": 8.0, "xbr": 20.0, "ybr": 16.0}),
    "Label Studio": studio_result("rectanglelabels", {**PERCENT, "rotation": 0}),
    "YOLO": "1 0.375 0.375 0.25 0.25",
}


@pytest.mark.parametrize("tool", BOXES)
def test_a_rectangle_is_a_box_or_on_request_an_outline(tool: str, tmp_path: Path) -> None:
    source = TOOLS[tool][0](draw(tmp_path / "in"), {one: [] if "good" in one else [BOXES[tool]] for one in NAMES})
    made = imported(source)
    for name in ("train", "val"):
        content = read_json(made.dataset_dir / name / "annotations.json")
        assert all(one["segmentation"] == [] for one in content["annotations"])
        assert all(one["bbox"] == [10, 8, 10, 8] and one["area"] == 80 for one in content["annotations"])
    outlined = masks_of(imported(source, output_dir=tmp_path / "outlined", boxes="outline"))
    assert all(np.array_equal(mask, SQUARE) for found in outlined.values() for _, mask in found)


NO_AREA = {
    "labelme": (labelme_shape("dent", [[10, 8]], "point"), "point"),
    "VIA": (via_region({"name": "point", "cx": 3, "cy": 4}), "point"),
    "CVAT": (("points", {"points": "10.00,8.00"}), "points"),
    "Label Studio": (studio_result("keypointlabels", {"x": 3, "y": 4, "width": 0.3}), "keypointlabels"),
}
OUTSIDE = {
    "labelme": labelme_shape("dent", [[50, 8], [60, 8], [60, 16]]),
    "YOLO": "1 1.4 1.2 1.5 1.2 1.5 1.4",
    "COCO": [[50.0, 8.0, 60.0, 8.0, 60.0, 16.0]],
}


@pytest.mark.parametrize("tool", [*NO_AREA, "YOLO"])
def test_unused_labels_are_counted_and_listed_and_with_strict_an_error(
    tool: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write, _, marked = TOOLS[tool]
    odd, reason = NO_AREA.get(tool, (OUTSIDE[tool] if tool == "YOLO" else None, "without a pixel"))
    source = write(draw(tmp_path / "in"), {one: [odd] if "good" in one else [marked, marked] for one in NAMES})
    made = imported(source)
    found = counts(made, "annotations")
    assert (found["found"], found["used"], list(found["not_used"])) == (10, 8, [reason])
    assert f"10 annotations: 8 used, 2 not used: {reason}" in caplog.text
    assert all("good" in name for name in found["not_used"][reason])
    with pytest.raises(UnusedError, match="10 annotations"):
        imported(source, output_dir=tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


UNCLEAR = NO_AREA | {
    "a tag of CVAT": (("tag", {}), "tag"),
    "choices of Label Studio": (studio_result("choices", {}), "choices"),
    "an image turned in Label Studio": (
        studio_result("polygonlabels", {"points": in_percent(CORNERS)}, image_rotation=90),
        "image turned in Label Studio",
    ),
}


@pytest.mark.parametrize("what", UNCLEAR)
def test_an_image_without_a_usable_annotation_is_not_good(what: str, tmp_path: Path) -> None:
    write, _, marked = TOOLS[next(tool for tool in TOOLS if tool in what)]
    odd, reason = UNCLEAR[what]
    of_image = {one: [marked] for one in "abcd"} | {"good 1": [odd], "good 2": []}
    made = imported(write(draw(tmp_path / "in"), of_image), unlabelled="good")
    assert counts(made, "images")["not_used"] == {"no usable annotation": ["good 1.png"]}
    assert counts(made, "annotations")["not_used"].keys() == {reason}
    assert made.train["good"] + made.val["good"] == 1


def test_an_image_is_good_if_its_choice_says_so(tmp_path: Path) -> None:
    write, _, marked = TOOLS["Label Studio"]
    said: dict[str, list[Any]] = {"good 1": [studio_result("choices", {})], "good 2": [studio_result("choices", {})]}
    said["good 1"][0]["value"], said["good 2"][0]["value"] = {"choices": ["OK"]}, {"choices": ["Grade A"]}
    folder = write(draw(tmp_path / "in"), {one: [marked] for one in "abcd"} | said)
    assert counts(imported(folder), "images")["not_used"] == {"no usable annotation": ["good 2.png"]}
    made = imported(folder, output_dir=tmp_path / "said", good_name="Grade A")
    assert counts(made, "images")["not_used"] == {}


def test_json_min_texts_that_may_be_choices_give_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write, _, marked = TOOLS["Label Studio, JSON_MIN"]
    folder = write(draw(tmp_path / "in"), {one: [] if "good" in one else [marked] for one in NAMES})
    imported(folder)
    assert "choices" not in caplog.text
    tasks = json.loads((folder / "min.json").read_text())
    tasks[-1]["quality"] = "scratch"
    (folder / "min.json").write_text(json.dumps(tasks))
    imported(folder, output_dir=tmp_path / "again")
    assert "choices look like any other text (quality): 2 tasks without a region" in caplog.text


def test_an_image_with_a_bad_record_is_counted_once_and_not_good(tmp_path: Path) -> None:
    source = coco(draw(tmp_path / "in"), {one: [[[1, 1, 5, 5]] if one == "d" else [FLAT]] for one in "abcd"})
    made = imported(source, on_error="skip", unlabelled="good")
    assert counts(made, "images") == {"found": 6, "used": 5, "not_used": {"bad record": ["d.png"]}}
    assert made.train["good"] + made.val["good"] == 2


def test_the_yaml_file_of_yolo_may_be_in_a_subfolder(tmp_path: Path) -> None:
    source = yolo(draw(tmp_path / "in"), {one: [yolo_polygon(CORNERS)] for one in "abcd"})
    (source / "conf").mkdir()
    (source / "data.yaml").rename(source / "conf" / "data.yaml")
    assert recognised(source) == "yolo"
    assert [label for found in masks_of(imported(source)).values() for label, _ in found] == ["dent"] * 4


def test_two_images_with_one_yolo_label_are_left_out_and_not_good(tmp_path: Path) -> None:
    source = yolo(draw(tmp_path / "in"), {one: [yolo_polygon(CORNERS)] for one in "abcd"})
    place = next(source.rglob("d.png")).parent
    draw_image(place / "d.jpg", 9, (HEIGHT, WIDTH))
    with pytest.raises(FlawmaskError, match=r"d\.txt may belong to .*: remove one of the images"):
        imported(source)
    made = imported(source, on_error="skip")
    left = counts(made, "images")["not_used"]["bad image or label"]
    assert sorted(Path(name).name for name in left) == ["d.jpg", "d.png"]
    found = counts(made, "annotations")
    assert (found["found"], found["used"], len(found["not_used"]["image not used"])) == (4, 3, 1)


@pytest.mark.parametrize("line", ["1 nan 0.5 0.2 0.2", "1 20 16 10 8", "1 0.5 0.5 inf 0.2"])
def test_a_box_in_pixels_or_with_nan_or_infinity_is_a_bad_label(line: str, tmp_path: Path) -> None:
    source = yolo(draw(tmp_path / "in"), {one: [line if one == "d" else yolo_polygon(CORNERS)] for one in "abcd"})
    made = imported(source, on_error="skip")
    assert [Path(one).stem for one in counts(made, "images")["not_used"]["bad image or label"]] == ["d"]
    assert counts(made, "annotations")["found"] == 4


def test_an_annotation_without_a_class_is_a_bad_label_and_spaces_do_not_matter(tmp_path: Path) -> None:
    marks: dict[str, list[Any]] = {one: [labelme_shape(f" dent{' ' if one == 'a' else ''}", CORNERS)] for one in "abc"}
    made = imported(
        labelme(draw(tmp_path / "in"), marks | {"d": [labelme_shape("", CORNERS)], "good 1": [labelme_shape(" ", [])]}),
        on_error="skip",
    )
    assert [category["name"] for category in splits(made)[0].categories] == ["dent"]
    assert counts(made, "images")["not_used"]["bad image or label"] == ["d.png", "good 1.png"]
    assert counts(made, "annotations")["not_used"].keys() == {"image not used"}


def test_an_image_listed_twice_is_used_once_but_not_with_a_bad_label(tmp_path: Path) -> None:
    square = TOOLS["Label Studio"][2]
    tasks = [studio_task(n, name, studio_annotation([square])) for n, name in enumerate("abcd")]
    tasks.append(studio_task(5, "a"))
    tasks.append(
        studio_task(6, "b", studio_annotation([{**square, "value": {**square["value"], "polygonlabels": []}}]))
    )
    folder = draw(tmp_path / "in")
    (folder / "project.json").write_text(json.dumps(tasks))
    made = imported(folder, on_error="skip", unlabelled="good")
    left = counts(made, "images")["not_used"]
    assert left == {"listed twice": ["a.png"], "bad image or label": ["b.png"]}
    assert sorted(masks_of(made)) == ["a", "c", "d", "good 1", "good 2"]
    assert counts(made, "annotations") | {"not_used": 2} == {"found": 5, "used": 3, "not_used": 2}


def test_images_in_unknown_formats_are_counted(tmp_path: Path) -> None:
    source = labelme(draw(tmp_path / "in"), {one: [labelme_shape("dent", CORNERS)] for one in "abcd"})
    Image.new("RGB", (WIDTH, HEIGHT)).save(source / "e.webp")
    (source / "f.cr2").write_bytes(b"II*\0")
    (source / "notes.txt").write_text("none")
    left = counts(imported(source), "images")["not_used"]
    assert left == {"unknown format": ["f.cr2"], "not labelled": ["e.webp", "good 1.png", "good 2.png"]}


def test_annotations_of_a_missing_image_are_counted(tmp_path: Path) -> None:
    for tool in ("labelme", "VIA", "CVAT", "Label Studio", "YOLO"):
        write, _, marked = TOOLS[tool]
        source = write(draw(tmp_path / tool), {one: [marked, marked] for one in "abcd"})
        next(source.rglob("d.png")).unlink()
        found = counts(imported(source, output_dir=tmp_path / f"{tool} out", on_error="skip"), "annotations")
        assert (found["found"], found["used"]) == (8, 6), tool
        assert len(found["not_used"]["image not used"]) == 2, tool


def test_images_without_labels_are_left_out_or_on_request_good(tmp_path: Path) -> None:
    source = labelme(draw(tmp_path / "in"), {one: [labelme_shape("dent", CORNERS)] for one in "abcd"})
    made = imported(source)
    assert counts(made, "images") == {
        "found": 6,
        "used": 4,
        "not_used": {"not labelled": ["good 1.png", "good 2.png"]},
    }
    made = imported(source, output_dir=tmp_path / "all", unlabelled="good")
    assert counts(made, "images") == {"found": 6, "used": 6, "not_used": {}}
    assert made.train["good"] + made.val["good"] == 2


def test_the_ground_truth_annotation_is_used_and_a_task_without_annotation_is_not_labelled(tmp_path: Path) -> None:
    square = TOOLS["Label Studio"][2]
    other = studio_result("polygonlabels", {"points": in_percent([[0, 0], [5, 0], [5, 5]])})
    tasks = [studio_task(n, name, studio_annotation([square])) for n, name in enumerate("abc")]
    newer = studio_annotation([other, other], updated_at="2025-01-01")
    tasks.append(studio_task(4, "d", newer, studio_annotation([square], ground_truth=True)))
    tasks.append(studio_task(5, "good 1", predictions=[{"result": [other], "model_version": "1"}]))
    tasks.append(studio_task(6, "good 2", studio_annotation([other], was_cancelled=True)))
    folder = draw(tmp_path / "in")
    (folder / "project.json").write_text(json.dumps(tasks))
    made = imported(folder)
    assert all(np.array_equal(mask, SQUARE) for found in masks_of(made).values() for _, mask in found)
    assert counts(made, "images")["not_used"] == {"not labelled": ["good 1.png", "good 2.png"]}
    found = counts(made, "annotations")
    assert {reason: len(names) for reason, names in found["not_used"].items()} == {
        "other annotation": 2,
        "cancelled": 1,
    }
    assert sorted(masks_of(made)) == ["a", "b", "c", "d"]


def test_a_brush_and_the_label_chosen_for_it_become_one_annotation(tmp_path: Path) -> None:
    sizes = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    pair = [
        {**sizes, "id": "s", "type": "brush", "value": {"format": "rle", "rle": brush.encode(SQUARE)}},
        {**sizes, "id": "s", "type": "labels", "value": {"labels": ["dent"]}},
    ]
    tasks = [studio_task(n, name, {"id": 1, "result": pair}) for n, name in enumerate(NAMES[:4])]
    folder = draw(tmp_path / "in")
    (folder / "project.json").write_text(json.dumps(tasks))
    for found in masks_of(imported(folder)).values():
        ((label, mask),) = found
        assert (label, np.array_equal(mask, SQUARE)) == ("dent", True)


def test_labelme_shapes_with_the_same_group_id_are_one_instance(tmp_path: Path) -> None:
    halves = [[[10, 8], [15, 8], [15, 16], [10, 16]], [[15, 8], [20, 8], [20, 16], [15, 16]]]
    shapes = [labelme_shape("dent", half, group_id=1) for half in halves]
    source = labelme(draw(tmp_path / "in"), dict.fromkeys(NAMES[:4], shapes))
    assert all(len(found) == 1 and np.array_equal(found[0][1], SQUARE) for found in masks_of(imported(source)).values())


def test_images_may_lie_in_another_folder_and_in_subfolders(tmp_path: Path) -> None:
    draw(tmp_path / "pictures", "line 3")
    (tmp_path / "in").mkdir()
    source = labelme(tmp_path / "in", {name: [labelme_shape("dent", CORNERS)] for name in NAMES[:4]})
    with pytest.raises(FlawmaskError, match=r"names a\.png, which is not in .*give --image_dir"):
        imported(source)
    made = imported(source, image_dir=tmp_path / "pictures", unlabelled="good")
    assert made.train["images"] + made.val["images"] == 6
    assert {Path(image["original_file"]).parent for split in splits(made) for image in split.images} == {Path("line 3")}


def test_cvats_yolo_export_is_read(tmp_path: Path) -> None:
    """`YOLO 1.1` has text files in `obj_train_data`, beside the images if these were exported, and class names in
    `obj.names`."""
    pictures = draw(tmp_path / "pictures")
    source = tmp_path / "in"
    (source / "obj_train_data").mkdir(parents=True)
    (source / "obj.names").write_text("unused\ndent\n")
    (source / "obj.data").write_text("classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n")
    (source / "train.txt").write_text("data/obj_train_data/a.png\n")
    for name in NAMES:
        text = "" if "good" in name else yolo_polygon(CORNERS)
        (source / "obj_train_data" / f"{name}.txt").write_text(text)
    found = masks_of(imported(source, image_dir=pictures))
    assert {name: len(of_image) for name, of_image in found.items()} == {n: int("good" not in n) for n in NAMES}
    (source / "obj.names").write_bytes("缺陷\n".encode("gbk"))
    with pytest.raises(FlawmaskError, match=r"obj\.names is not in UTF-8"):
        imported(source, image_dir=pictures)


BAD: dict[str, tuple[Write, Any, str]] = {
    "labelme": (labelme, labelme_shape("dent", [[1, 1], [2]]), "is not as labelme writes it"),
    "a line": (labelme, labelme_shape("dent", [[1, 1], [2, 2]]), "a polygon with 2 points"),
    "VIA": (via, via_region(via_polygon(CORNERS), {"dent": True, "hole": True}), "give it exactly one name in VIA"),
    "CVAT": (cvat_xml, ("mask", {"rle": "3, 4", "left": 1, "top": 1, "width": 5, "height": 5}), "a mask of 7 pixels"),
    "a brush": (
        label_studio,
        studio_result("brushlabels", {"format": "rle", "rle": brush.encode(SQUARE[:5])}),
        "a brush's RLE of 200 pixels on an image of 40x32",
    ),
    "YOLO": (yolo, "1 0.5 0.5 0.1", "has 3 numbers behind the class"),
    "a class": (yolo, "7 0.5 0.5 0.1 0.1", "has the class 7, which has no name: there are unused, dent"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_label_stops_the_import_or_leaves_its_image_out(what: str, tmp_path: Path) -> None:
    write, bad, says = BAD[what]
    good = next(marked for one, _, marked in TOOLS.values() if one is write)
    source = write(draw(tmp_path / "in"), {one: [bad] if one == "d" else [good] for one in NAMES})
    with pytest.raises(FlawmaskError, match=says) as caught:
        imported(source)
    assert "\n" not in str(caught.value)
    assert "or leave it out with --on_error skip" in str(caught.value)
    assert not (tmp_path / "out").exists()
    made = imported(source, on_error="skip")
    assert set(masks_of(made)) == {*NAMES} - {"d"}
    assert says.split(":")[0] in made.left_out[0]["reason"]
    assert counts(made, "images")["used"] == 5


def test_an_unknown_file_is_refused_with_the_list_of_known_formats(tmp_path: Path) -> None:
    folder = draw(tmp_path / "in")
    with pytest.raises(FlawmaskError, match=r"holds no labels that are known \(COCO, labelme, VGG Image Annotator"):
        imported(folder)
    with pytest.raises(FlawmaskError, match="does not exist"):
        imported(tmp_path / "nowhere")
    (folder / "annotations.xml").write_text("<annotations><track id='0'/></annotations>")
    with pytest.raises(FlawmaskError, match="CVAT's XML for video"):
        imported(folder)
    (folder / "annotations.xml").unlink()
    (folder / "via.json").write_text(json.dumps({name: {} for name in ("project", "file", "view", "metadata")}))
    with pytest.raises(FlawmaskError, match="a project of VIA 3"):
        imported(folder)


def test_labels_for_another_image_size_are_refused(tmp_path: Path) -> None:
    source = labelme(draw(tmp_path / "in"), {name: [labelme_shape("dent", CORNERS)] for name in NAMES})
    draw_image(source / "b.png", 1, (HEIGHT, 2 * WIDTH))
    with pytest.raises(FlawmaskError, match=r"b\.png is 80x32 but its labels are for 40x32"):
        imported(source)


def test_images_are_split_like_those_of_prepare_by_groups_and_with_a_test_split(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    names = [f"part{number}_{side}" for number in range(8) for side in "ab"]
    for seed, name in enumerate(names):
        draw_image(folder / f"{name}.png", seed, (HEIGHT, WIDTH))
    labelme(folder, {name: [labelme_shape("dent", CORNERS)] if int(name[4]) % 2 else [] for name in names})
    made = imported(folder, group_by="^(part[0-9])", train_ratio=0.5, test_ratio=0.25)
    sides: dict[str, set[str]] = {}
    for split in splits(made):
        for image in split.images:
            sides.setdefault(image["group"], set()).add(split.name)
    assert all(len(of_part) == 1 for of_part in sides.values())
    assert set.union(*sides.values()) == {"train", "val", "test"}
    with pytest.raises(FlawmaskError, match="matches none of 16 file names"):
        imported(folder, group_by="^lot", output_dir=tmp_path / "other")


def test_names_that_seem_to_contain_parts_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "in"
    names = [f"part{number}_{side}" for number in range(8) for side in "ab"]
    for seed, name in enumerate(names):
        draw_image(folder / f"{name}.png", seed, (HEIGHT, WIDTH))
    caplog.set_level(logging.WARNING)
    imported(labelme(folder, {name: [labelme_shape("dent", CORNERS)] for name in names}))
    assert "keep each in one split with --group_by" in caplog.text


def test_roboflows_variants_of_one_image_stay_together(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    names = [f"p{number}_png.rf.{'0123456789abcdef'[at] * 32}" for number in range(6) for at in range(3)]
    for seed, name in enumerate(names):
        draw_image(folder / "train" / f"{name}.png", seed, (HEIGHT, WIDTH))
    (coco(folder, {name: [[FLAT]] for name in names}) / "instances_default.json").rename(
        folder / "train" / "_annotations.coco.json"
    )
    for split in splits(imported(folder)):
        found = [image["original_file"].partition("_png.rf.")[0] for image in split.images]
        assert all(found.count(one) == 3 for one in found)


KINDS: dict[str, Any] = {
    "outlined": labelme_shape("dent", CORNERS),
    "point": labelme_shape("dent", [[1, 1]], "point"),
    "outside": labelme_shape("dent", [[50, 8], [60, 8], [60, 16]]),
    "broken": labelme_shape("dent", [[1, 1], [2, 2]]),
}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.none() | st.lists(st.sampled_from(sorted(KINDS)), max_size=3), max_size=6))
def test_found_is_the_sum_of_used_and_unused_for_any_folder(
    tmp_path_factory: pytest.TempPathFactory, folder: list[list[str] | None]
) -> None:
    """An image whose labels are None has no label file."""
    source = tmp_path_factory.mktemp("import") / "in"
    of_image = dict(enumerate([["outlined"], ["outlined"], *folder]))
    for number in of_image:
        draw_image(source / f"{number}.png", number, (HEIGHT, WIDTH))
    labelme(source, {str(n): [KINDS[kind] for kind in kinds] for n, kinds in of_image.items() if kinds is not None})
    made = imported(source, on_error="skip")
    labelled = [kinds for kinds in of_image.values() if kinds is not None]
    whole = [kinds for kinds in labelled if "broken" not in kinds]
    images, annotations = counts(made, "images"), counts(made, "annotations")
    clear = [kinds for kinds in whole if set(kinds) != {"point"}]
    assert (images["found"], images["used"]) == (len(of_image), len(clear))
    assert len(images["not_used"].get("no usable annotation", [])) == len(whole) - len(clear)
    assert annotations["found"] == sum(map(len, labelled))
    assert annotations["used"] == sum(kinds.count("outlined") for kinds in whole)
    assert len(annotations["not_used"].get("point", [])) == sum(kinds.count("point") for kinds in labelled)


MASKS = st.integers(1, 9).flatmap(
    lambda height: st.integers(1, 9).flatmap(
        lambda width: st.lists(
            st.lists(st.booleans(), min_size=width, max_size=width), min_size=height, max_size=height
        )
    )
)


@settings(max_examples=40)
@given(MASKS)
def test_a_mask_survives_conversion_to_the_runs_of_a_brush_and_of_cvat(rows: list[list[bool]]) -> None:
    mask = np.array(rows)
    height, width = mask.shape
    assert np.array_equal(brush.decode(brush.encode(mask), height, width), mask)
    assert np.array_equal(cvat._mask(cvat.runs_of(mask), height, width), mask)


def test_a_brush_encoded_like_rle_pack_is_read() -> None:
    """Encoded by hand from the description of the format: a run of 8 values in the smallest size, then 4 values."""
    bits = f"{12:032b}" + f"{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    bits += "1" + "00" + f"{7:03b}" + f"{0:08b}" + "0" + "01" + f"{3:04b}" + "".join(f"{v:08b}" for v in (9, 9, 9, 255))
    bits += "0" * (-len(bits) % 8)
    values = [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]
    assert brush.decode(values, 1, 3).tolist() == [[False, False, True]]
    for broken in (values[:-2], values[:3], [1, 2]):
        with pytest.raises(ValueError, match="a brush's RLE"):
            brush.decode(broken, 1, 3)


@settings(max_examples=40)
@given(MASKS, st.integers(-9, 12), st.integers(-9, 12))
def test_a_partial_mask_is_placed_correctly_and_cut_at_the_edge(rows: list[list[bool]], x: int, y: int) -> None:
    part = np.array(rows)
    whole = np.zeros((40, 40), dtype=bool)
    whole[y + 15 : y + 15 + part.shape[0], x + 15 : x + 15 + part.shape[1]] = part
    assert np.array_equal(decode(segmentation_of(part, x, y, 10, 11), 10, 11), whole[15:25, 15:26])


def test_an_ellipse_covers_its_area() -> None:
    mask = decode(ellipse((50, 40), (30, 15), 30), 100, 100)
    assert np.count_nonzero(mask) == pytest.approx(np.pi * 30 * 15, rel=0.01)
    assert mask[40 + 10, 50 + 18]  # rotated clockwise, with the y axis pointing down
    assert not mask[40 - 10, 50 + 18]
    assert decode(rle_of_box((1, 2, 3, 4), 8, 8), 8, 8).sum() == 4
