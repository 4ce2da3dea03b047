"""The report without a browser: it is self-contained, agrees with the files, and escapes their content."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flawmask.coco import read_split
from flawmask.errors import FlawmaskError
from flawmask.files import read_json, write_json
from flawmask.good_names import GOOD
from flawmask.masks import Mask, decode
from flawmask.report.figures import DRAWINGS
from flawmask.report.gallery import UNITS, outline_path
from flawmask.report.headline import by_level, lookup, percent, whole_percent
from flawmask.report.report import write_report
from flawmask.report.sections import threshold_sentence, verdict
from report.made import make_dataset, make_run

NBSP = "\u00a0"
NASTY = '<img src=x onerror="alert(1)">&\'"</script>$a_b$ 傷 é'

NEW_KEYS = (
    "false_alarm_rate", "image_auroc", "image_ap", "image_f1_max", "image_f1_max_threshold", "ece", "confusion",
    "ece_calibrated",
    "false_alarms_at_recall", "recall_at_false_alarms",
    "mask_ap_small", "mask_ap_medium", "mask_ap_large", "mask_ar", "box_ar", "ap_by_class",
    "instance_errors", "instances", "missed_instances", "spurious_instances", "pixel_auroc", "pixel_ap", "pixel_aupro",
    "pixel_aupro_05", "pixel_iou", "pixel_dice", "pixel_f1_max", "pixel_f1_max_threshold", "seconds", "intervals",
    "interval_method", "resamples", "threshold", "notes",
)  # fmt: skip


class Elements(HTMLParser):
    """All tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._within: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._within.pop()

    def handle_data(self, data: str) -> None:
        if not self._within:
            self.text.append(data)


def parsed(page: Path) -> Elements:
    elements = Elements()
    elements.feed(page.read_text(encoding="utf-8"))
    return elements


def words(page: Path) -> str:
    return re.sub(r"\s+", " ", " ".join(parsed(page).text).replace(NBSP, " "))


def gallery_of(page: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="gallery-data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found is not None
    content: dict[str, Any] = json.loads(found[1])
    return content


def change(path: Path, **values: Any) -> None:
    write_json(path, {**read_json(path), **values})


def test_the_page_loads_nothing_from_outside(results_dir: Path) -> None:
    page = write_report(results_dir)
    content = page.read_text(encoding="utf-8")
    outside = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w[^\s\"'<>)]*", re.sub(r'"jpeg":"[^"]*"', "", content)))
    assert outside <= {"http://www.w3.org/2000/svg"}  # the name of a language, which nobody fetches
    for tag, attributes in parsed(page).tags:
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", content)
    policy = next(one for tag, one in parsed(page).tags if one.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")


def test_every_figure_of_the_results_is_on_the_page_with_its_interval(results_dir: Path) -> None:
    metrics, text = read_json(results_dir / "metrics.json"), words(write_report(results_dir))
    for figure in (figure for group in by_level().values() for figure in group):
        there, value = lookup(metrics, figure.key)
        assert there
        written = "n/a" if value is None else f"{100 * value:.1f} %"
        bounds = metrics["intervals"].get(figure.key.replace(".", "_"))
        interval = f"{100 * bounds[0]:.1f}\u2013{100 * bounds[1]:.1f} %" if bounds else ""
        assert f"{figure.label} {figure.meaning} {written} {interval}" in text
    for kind, row in metrics["recall_by_type"].items():
        missed = row["images"] - row["found"]
        assert f"{kind} {row['images']} {row['found']} {missed} {100 * row['recall']:.1f} %" in text
    for note in metrics["notes"]:
        assert note in text
    assert "50 true instances, 48 predicted at the threshold, 41 of the true ones matched" in text
    assert "localisation 3" in text
    assert "0.241 seconds per image (reading 0.011, network 0.213, post-processing 0.017)" in text


def test_the_page_describes_the_data_and_the_run_and_has_the_commands_to_repeat_it(
    results_dir: Path, dataset: Path
) -> None:
    text = words(write_report(results_dir))
    assert "drawn/test/hole/009.png has no mask: draw it" in text
    assert "split images broken_edge contamination good hole scratch train 96 4 4 8 4 4 val 24 4 4 8 4 4" in text
    assert "Image sizes in pixels 96 x 96 (24)" in text
    assert "Time to train 2 min 52 s" in text
    assert "Torch 2.15.0" in text
    run = results_dir.parent
    evaluated = f"flawmask evaluate --model {run / 'best.pt'} --dataset_dir {dataset} --split val --conf auto"
    assert evaluated in text
    assert "--aim recall=0.99" in text
    train = re.search(r"flawmask train .*?(?= flawmask)", text)
    assert train is not None
    assert "--anchor_sizes 8 16 32 64 128" in train[0]
    assert "--overwrite --" in train[0]
    assert "num_classes" not in train[0]
    assert "flawmask prepare --category drawn --seed 42 --train_ratio 0.8 --classes defect --link copy" in text
    drawn = dataset.with_name("drawn")
    assert f"flawmask augment --dataset_dir {drawn} --output_dir {dataset} --seed 42 --augmentation_factor 3" in text


def test_the_verdict_reads_as_a_person_would_say_it() -> None:
    counts = {"tp_defect": 54, "fn_defect": 9, "fp_defect": 1, "tn_good": 19}
    intervals = {"recall": [0.753, 0.923], "false_alarm_rate": [0.009, 0.236]}
    said = re.sub(r"<[^>]*>", "", verdict({**counts, "intervals": intervals})).replace(NBSP, " ")
    assert said == (
        "Finds 54 of 63 defective parts (86 %, 95 % interval 75\u201392 %); "
        "1 false alarm in 20 good parts (5 %, 95 % interval 1\u201324 %)."
    )


def test_the_page_counts_images_and_parts_where_groups_are_known(results_dir: Path, dataset: Path) -> None:
    before = (dataset / "val" / "annotations.json").read_text()
    content = json.loads(before)
    for place, image in enumerate(content["images"]):
        image["group"] = f"part {place // 3}"
    (dataset / "val" / "annotations.json").write_text(json.dumps(content))
    test = {"only_this_right": 2, "only_other_right": 5, "p": 0.453}
    against = {"other": "other", "figures": {}, "mcnemar": test, "groups": 8}
    try:
        change(results_dir / "metrics.json", groups=8, against=against)
        text = words(write_report(results_dir))
    finally:
        (dataset / "val" / "annotations.json").write_text(before)
    assert "24 images of 8 parts evaluated with" in text
    assert "defective images (" in text
    assert "An image is rejected if" in text
    assert "good images that are rejected" in text
    assert (
        "Intervals over parts: by formula for proportions, F1 and AUROC, else from 1000 resamples of whole parts."
        in text
    )
    assert "Images evaluated 24 Parts they show 8" in text
    assert "exact, over 8 parts, p = 0.453" in text


@pytest.mark.parametrize(
    ("tp", "fn", "fp", "tn", "said"),
    [
        (1, 0, 0, 1, "Finds 1 of 1 defective part (100 %); no false alarms in 1 good part (0 %)."),
        (
            0,
            0,
            2,
            3,
            "No defective part was evaluated: the recall is not known; 2 false alarms in 5 good parts (40 %).",
        ),
        (3, 1, 0, 0, "Finds 3 of 4 defective parts (75 %); no good part was evaluated."),
    ],
)
def test_the_verdict_has_the_right_words_for_none_one_and_many(tp: int, fn: int, fp: int, tn: int, said: str) -> None:
    metrics = {"tp_defect": tp, "fn_defect": fn, "fp_defect": fp, "tn_good": tn}
    assert re.sub(r"<[^>]*>", "", verdict(metrics)).replace(NBSP, " ") == said


def test_half_a_tenth_is_rounded_up() -> None:
    assert [percent(value) for value in (0.5625, 0.0625, 0.56249, 1.0)] == [
        f"{written}{NBSP}%" for written in ("56.3", "6.3", "56.2", "100.0")
    ]


def test_nearly_100_percent_is_never_shown_as_100() -> None:
    assert [whole_percent(value) for value in (1.0, 0.999, 0.125, 0.001, 0.0)] == ["100", "99.9", "13", "0.1", "0"]
    assert percent(None) == "n/a"


@pytest.mark.parametrize(
    ("threshold", "said"),
    [
        ({"value": 0.5, "how": "default"}, "at least 0.50 and covers at least 9 pixels. This is the default."),
        ({"value": 0.5, "how": "given"}, "The threshold was given by hand."),
        (
            {"value": 0.734, "how": "aim", "aim": "f1", "chosen_on": "val", "interval": None, "same_split": False},
            "at least 0.734 and covers at least 9 pixels. The threshold was chosen on the split val for the aim f1.",
        ),
        (
            {"value": 0.7, "how": "aim", "aim": "f1", "chosen_on": "val", "interval": [0.6, 0.8], "same_split": True},
            "for the aim f1 (95 % interval 0.60\u20130.80). These are the very images evaluated here.",
        ),
        (None, "A part is rejected if a predicted defect scores at least 0.50 and covers at least 9 pixels."),
    ],
)
def test_the_page_says_how_the_threshold_was_chosen(threshold: dict[str, Any] | None, said: str) -> None:
    metrics = {"conf": 0.5, "min_area": 9} | ({"threshold": threshold} if threshold else {})
    assert threshold_sentence(metrics).endswith(said)


def test_results_of_an_older_evaluate_make_a_report_without_the_new_sections(results_dir: Path) -> None:
    metrics = read_json(results_dir / "metrics.json")
    write_json(results_dir / "metrics.json", {key: value for key, value in metrics.items() if key not in NEW_KEYS})
    for name in ("curves.json", "predictions.csv", "../config.json", "../history.json"):
        (results_dir / name).unlink()
    text = words(write_report(results_dir))
    assert f"Finds {metrics['tp_defect']} of " in text
    assert "Mask AP COCO" in text
    assert "AUROC" not in text
    assert "Missed and spurious" not in text
    assert "<h2>Notes</h2>" not in text
    assert {path.stem for path in (results_dir / "figures").iterdir()} == {"scores", "confusion_matrix"}


def test_every_figure_is_a_png_and_an_svg_too_and_old_ones_go(results_dir: Path) -> None:
    write_report(results_dir)
    names = {f"{name}.{kind}" for name in DRAWINGS for kind in ("png", "svg")}
    assert {path.name for path in (results_dir / "figures").iterdir()} == names
    first = {path: path.read_bytes() for path in (results_dir / "figures").iterdir()}
    for path in results_dir.glob("figures/*.png"):
        picture = cv2.imread(str(path))
        assert picture is not None
        assert picture.std() > 0
    write_report(results_dir)
    assert {path: path.read_bytes() for path in (results_dir / "figures").iterdir()} == first
    (results_dir / "curves.json").unlink()
    write_report(results_dir)
    assert not (results_dir / "figures" / "roc.svg").exists()


@pytest.mark.filterwarnings("ignore:Glyph .* missing from")  # of what pytest shows; Flawmask ignores it too
def test_the_content_of_files_is_escaped(results_dir: Path, dataset: Path) -> None:
    nasty = results_dir.parents[1] / "nasty"
    make_dataset(nasty, count=6, size=64)
    results = make_run(results_dir.parents[1] / "run_b", nasty)
    file = NASTY.replace("/", "")
    annotations = read_json(nasty / "val" / "annotations.json")
    (nasty / "val" / "images" / annotations["images"][1]["file_name"]).rename(nasty / "val" / "images" / file)
    annotations["images"][1] |= {"file_name": file, "defect_type": NASTY}
    annotations["categories"][1]["name"] = NASTY
    write_json(nasty / "val" / "annotations.json", annotations)
    metrics = read_json(results / "metrics.json")
    row = {"images": 1, "found": 0, "recall": 0.0}
    instance = {"file": file, "label": NASTY, "score": 0.9, "bbox": [0, 0, 1, 1], "area": 1, "kind": NASTY}
    change(
        results / "metrics.json",
        recall_by_type={NASTY: row},
        notes=[NASTY],
        threshold={"value": 0.5, "how": "aim", "aim": NASTY, "chosen_on": NASTY},
        confusion={"classes": ["good", NASTY], "rows": [[1, 0], [0, 5]]},
        ap_by_class={NASTY: {"mask_ap": 0.5}, "other": {"mask_ap": None}},
        missed_instances=[{**instance, "best_iou": 0}],
        spurious_instances=[instance],
        seconds={NASTY: metrics["seconds_per_image"]},
    )
    change(results.parent / "config.json", settings={NASTY: NASTY}, device=NASTY, versions={NASTY: NASTY})
    info = {
        "made_by": NASTY,
        "settings": {NASTY: NASTY},
        "source": {NASTY: NASTY},
        "val": {"images": 1, "by_type": {NASTY: 1}},
    }
    write_json(nasty / "dataset_info.json", {**info, "left_out": [{"file": NASTY, "reason": NASTY}]})
    page = write_report(results)
    elements = parsed(page)
    assert not [tag for tag, attributes in elements.tags if tag == "img" or "onerror" in attributes]
    assert sum(tag == "script" for tag, _ in elements.tags) == 2
    assert "".join(elements.text).count(NASTY) > 10
    assert [one["type"] for one in gallery_of(page)["images"] if one["file"] == file] == [NASTY]


def test_folds_and_a_comparison_have_their_sections(results_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "crossed_folds"
    model.mkdir()
    write_json(model / "folds.json", {"settings": {"category": "drawn", "folds": 2, "mlflow": False}})
    change(
        results_dir / "metrics.json",
        model=model.as_posix(),
        folds={"recall": {"values": [0.8, None], "mean": 0.8, "sd": None}},
        against={
            "other": "the <rival>",
            "figures": {"recall": {"this": 0.8, "other": 0.85, "difference": -0.05, "interval": [-0.11, 0.02]}},
            "mcnemar": {"only_this_right": 2, "only_other_right": 5, "p": 0.453},
        },
    )
    text = words(write_report(results_dir))
    assert "figure mean standard deviation fold 1 fold 2 Recall 80.0 % n/a 80.0 % n/a" in text
    assert "The other model: the <rival>." in text
    assert "Recall 80.0 % 85.0 % -5.0 points -11.0 to +2.0" in text
    assert (
        "Verdicts: right for 2 images by this model only, for 5 by the other only; McNemar's exact p = 0.453." in text
    )
    assert "flawmask run --category drawn --folds 2" in text
    assert "flawmask evaluate" not in text


def test_a_page_does_not_contain_its_folders_temporary_name(results_dir: Path) -> None:
    temporary = results_dir.with_name(".inference_val.0123abcd.partial")
    results_dir.rename(temporary)
    assert write_report(temporary) == temporary / "report.html"
    assert temporary.name not in (temporary / "report.html").read_text(encoding="utf-8")


def test_the_gallery_has_every_image_and_detection_the_worst_first(results_dir: Path, dataset: Path) -> None:
    content = gallery_of(write_report(results_dir))
    split = read_split(dataset, "val")
    predictions = read_json(results_dir / "predictions.json")
    ids = {image["file_name"]: image["id"] for image in split.images}
    assert sorted(ids) == sorted(one["file"] for one in content["images"])
    assert len(ids) == len(content["images"])
    for one in content["images"]:
        expected = [
            (record["score"], int(decode(record["segmentation"], 96, 96).sum()))
            for record in predictions
            if record["image_id"] == ids[one["file"]] and record["category_id"] == 2
        ]
        assert [(found["score"], found["area"]) for found in one["found"]] == sorted(expected, reverse=True)
    best = [max((found["score"] for found in one["found"]), default=0.0) for one in content["images"]]
    wrong = [(score >= 0.5) != one["truth"] for score, one in zip(best, content["images"], strict=True)]
    assert any(wrong)
    assert wrong == sorted(wrong, reverse=True)
    off = [abs(one["truth"] - score) for score, one in zip(best, content["images"], strict=True)]
    assert off[: sum(wrong)] == sorted(off[: sum(wrong)], reverse=True)
    assert off[sum(wrong) :] == sorted(off[sum(wrong) :], reverse=True)


def test_a_limited_gallery_still_counts_every_image(results_dir: Path) -> None:
    page = write_report(results_dir, gallery_limit=3)
    images = gallery_of(page)["images"]
    assert [("jpeg" in one) for one in images] == [True] * 3 + [False] * 21
    assert "Of 24 images the 3 worst are shown; all of them are counted." in words(page)


def test_a_page_is_made_with_na_where_all_images_are_of_one_kind(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "good_only", count=4, size=64)
    path = dataset / "val" / "annotations.json"
    content = read_json(path)
    good = [image for image in content["images"] if image["defect_type"] == GOOD]
    kept = {image["id"] for image in good}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    write_json(path, {**content, "images": good})
    results = make_run(tmp_path / "run", dataset)
    (results / "curves.json").unlink()
    text = words(write_report(results))
    assert "No defective part was evaluated" in text
    assert "Recall defective parts that are found n/a" in text


@pytest.mark.parametrize(
    ("change_of", "said"),
    [
        ({"image_id": 999}, "names the image 999, which"),
        ({"category_id": 7}, "names the class 7, which"),
        ({"score": 1.5}, "has the score 1.5: it must be a number from 0 to 1"),
        ({"score": None}, "has the score None"),
        ({"segmentation": {"size": [5, 7], "counts": "S1"}}, "has no mask of 96x96 pixels, its image's size"),
        ({"segmentation": "S1"}, "has no mask of 96x96 pixels"),
    ],
)
def test_predictions_that_do_not_belong_to_the_split_are_refused(
    results_dir: Path, change_of: dict[str, Any], said: str
) -> None:
    path = results_dir / "predictions.json"
    records = read_json(path)
    write_json(path, [records[0], {**records[1], **change_of}])
    with pytest.raises(FlawmaskError, match=re.escape(f"{path}: record 1 {said}")):
        write_report(results_dir)
    assert not (results_dir / "report.html").exists()


def test_a_folder_that_holds_no_results_is_refused_with_what_is_missing(results_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FlawmaskError, match=r"metrics\.json does not exist"):
        write_report(tmp_path)
    change(results_dir / "metrics.json", dataset=(tmp_path / "gone").as_posix())
    with pytest.raises(FlawmaskError, match=r"names .*gone/val, which does not exist: run this in the folder"):
        write_report(results_dir)
    write_json(results_dir / "metrics.json", {"accuracy": 1.0})
    with pytest.raises(FlawmaskError, match="has no tp_defect: flawmask evaluate did not write it"):
        write_report(results_dir)


def test_files_of_other_programs_beside_the_model_are_ignored(
    results_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_json(results_dir.parent / "config.json", {"architectures": ["other"], "settings": 3})
    (results_dir.parent / "history.json").write_text("not JSON")
    (results_dir / "curves.json").write_text("{")
    write_report(results_dir)
    assert "Time to train" not in words(results_dir / "report.html")
    assert "curves.json cannot be read" in caplog.text


def contours(path: str) -> list[np.ndarray]:
    """The corners of each closed line of an SVG path, in pixels of the picture."""
    found = []
    for start, steps in re.findall(r"M(-?\d+ ?-?\d+)(?:l([^z]*))?z", path):
        pairs = np.array([int(side) for side in re.findall(r"-?\d+", f"{start} {steps}")]).reshape(-1, 2)
        found.append(pairs.cumsum(axis=0) / UNITS)
    assert "".join(re.findall("[A-Za-z]", path)).replace("Mz", "").replace("Mlz", "") == ""
    return found


def filled(path: str, shape: tuple[int, int], finer: int) -> Mask:
    """The pixels that an SVG path covers by the even-odd rule, on a grid `finer` times as fine."""
    canvas = np.zeros((shape[0] * finer, shape[1] * finer), np.uint8)
    for corners in contours(path):
        one = np.zeros_like(canvas)
        cv2.fillPoly(one, [np.rint(corners * finer - 0.5).astype(np.int32)], 1)
        canvas ^= one
    return canvas.astype(bool)


@settings(max_examples=60, deadline=None)
@given(arrays(np.bool_, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.booleans()))
def test_an_outline_runs_along_the_edge_of_its_mask_holes_too(cells: Mask) -> None:
    mask = np.repeat(np.repeat(cells, 8, axis=0), 8, axis=1)
    covered = filled(outline_path(mask, 1.0), (mask.shape[0], mask.shape[1]), finer=4)
    exact = np.repeat(np.repeat(mask, 4, axis=0), 4, axis=1)
    edge = cv2.morphologyEx(exact.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((9, 9), np.uint8)).astype(bool)
    edge[:4], edge[-4:], edge[:, :4], edge[:, -4:] = True, True, True, True
    assert (covered == exact)[~edge].all()


def test_a_one_pixel_defect_has_an_outline_and_an_empty_mask_has_none() -> None:
    mask = np.zeros((50, 50), dtype=bool)
    assert outline_path(mask, 0.5) == ""
    mask[20, 30] = True
    (corners,) = contours(outline_path(mask, 0.5))
    assert (np.abs(corners - [15.25, 10.25]) <= 0.26).all()


def test_writing_a_report_loads_neither_torch_nor_an_evaluator() -> None:
    code = """
import sys, flawmask.report.side_by_side, flawmask.evaluation.summary
sys.exit(bool({"torch", "scipy", "hotcoco"} & sys.modules.keys()))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
