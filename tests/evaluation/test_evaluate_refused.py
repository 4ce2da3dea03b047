"""Errors that stop the stage `evaluate`. Then nothing is written, and earlier results stay."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from files_read_back import names
from patchy_split import edit, run
from random_network import patchwork

from flawmask.coco import read_split
from flawmask.errors import FlawmaskError, UnusedError
from flawmask.evaluation import results
from flawmask.evaluation.evaluate import Evaluated
from flawmask.evaluation.leak import content_digests, write_training_images
from flawmask.images import write_png

pytestmark = pytest.mark.usefixtures("undrawn", "small_network")


def test_a_model_is_not_evaluated_on_what_it_was_trained_on(
    run_dir: Path, dataset: Path, evaluated: Callable[..., Evaluated]
) -> None:
    assert any("not known" in note for note in evaluated().metrics["notes"])
    split = read_split(dataset, "val")
    write_training_images(split, content_digests(split), run_dir)
    try:
        nothing_written(run_dir, dataset, r"5 of 5 images were used for training .*--allow_leak")
        allowed = run(run_dir, dataset, allow_leak=True)
    finally:
        (run_dir / "training_images.json").unlink()
    assert any("5 of these 5 images were used for training" in note for note in allowed.metrics["notes"])


def test_earlier_results_with_a_strange_file_among_them_are_refused_and_left(run_dir: Path, dataset: Path) -> None:
    done = run(run_dir, dataset)
    (done.results_dir / "thesis.txt").touch()
    with pytest.raises(FlawmaskError, match=r"holds something else \(thesis\.txt\)"):
        run(run_dir, dataset)
    assert "thesis.txt" in names(done.results_dir)


def test_a_folder_that_holds_something_else_is_refused_and_left(run_dir: Path, dataset: Path) -> None:
    out = dataset.parent / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(FlawmaskError, match="out holds something else"):
        run(run_dir, dataset)
    assert names(out) == ["thesis.txt"]


def test_a_failure_while_writing_keeps_the_earlier_results(
    run_dir: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(run_dir, dataset)
    before = (done.results_dir / "metrics.json").read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "_draw_overlays", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(run_dir, dataset, conf=0.9)
    assert (done.results_dir / "metrics.json").read_bytes() == before
    assert names(dataset.parent) == ["data", "out"]


def nothing_written(run_dir: Path, dataset: Path, says: str, **settings: Any) -> None:
    with pytest.raises(FlawmaskError, match=says) as caught:
        run(run_dir, dataset, **settings)
    assert "\n" not in str(caught.value)
    assert not (dataset.parent / "out").exists()


def test_a_number_of_classes_that_is_not_the_models_is_refused(run_dir: Path, dataset: Path) -> None:
    nothing_written(run_dir, dataset, "--num_classes is 3, but .*best.pt has 2: good, defect", num_classes=3)
    run(run_dir, dataset, num_classes=2)


def test_data_with_other_classes_is_refused(run_dir: Path, dataset: Path) -> None:
    edit(dataset, categories=[{"id": 1, "name": "good"}, {"id": 2, "name": "crack"}])
    nothing_written(run_dir, dataset, "knows the classes good, defect, but .*data has good, crack")


def test_an_image_of_another_size_than_its_record_is_refused(run_dir: Path, dataset: Path) -> None:
    write_png(dataset / "val" / "images" / "crack_1.png", patchwork(61, 80, 1))
    nothing_written(run_dir, dataset, r"crack_1\.png is 80x61 but its record says 80x60: export")


def test_a_truncated_image_is_refused(run_dir: Path, dataset: Path) -> None:
    path = dataset / "val" / "images" / "crack_1.png"
    path.write_bytes(path.read_bytes()[:-40])
    nothing_written(run_dir, dataset, r"crack_1\.png cannot be read as an image")


def test_an_image_that_is_not_there_is_refused(run_dir: Path, dataset: Path) -> None:
    (dataset / "val" / "images" / "crack_1.png").unlink()
    nothing_written(run_dir, dataset, r"crack_1\.png")


def test_an_unknown_category_is_refused(run_dir: Path, dataset: Path) -> None:
    edit(dataset, categories=[{"id": 2, "name": "defect"}])
    nothing_written(run_dir, dataset, "has category 1, which is not listed")


def test_a_missing_split_is_refused_with_a_list_of_the_splits(run_dir: Path, dataset: Path) -> None:
    nothing_written(run_dir, dataset, "data has no split test: it holds val", split="test")


QUICK: dict[str, Any] = {"resamples": 0, "overlays": 0}


def test_an_annotation_without_pixels_is_no_missed_defect_and_refused_with_strict(run_dir: Path, dataset: Path) -> None:
    content = json.loads((dataset / "val" / "annotations.json").read_text())
    content["annotations"][0]["segmentation"] = [[-9, 1, -5, 1, -5, 5]]
    edit(dataset, **content)
    with pytest.raises(UnusedError, match="5 annotations: 4 used, 1 not used: outside the image"):
        run(run_dir, dataset, strict=True)
    assert not (dataset.parent / "out").exists()
    metrics = run(run_dir, dataset, conf=1.0, **QUICK).metrics
    assert metrics["tally"]["annotations"]["not_used"] == {"outside the image": ["1 of crack_1.png"]}
    assert metrics["tally"]["images"] == {"found": 5, "used": 5, "not_used": {}}
    assert (metrics["fn_defect"], metrics["instances"]["truth"]) == (2, 2)


def test_crowds_are_regions_or_instances(run_dir: Path, dataset: Path) -> None:
    content = json.loads((dataset / "val" / "annotations.json").read_text())
    for record in content["annotations"]:
        record["iscrowd"] = int(record["category_id"] == 2)
    edit(dataset, **content)
    aside, taken = (run(run_dir, dataset, crowds=crowds, **QUICK) for crowds in ("ignore", "instances"))
    assert len(aside.metrics["tally"]["annotations"]["not_used"]["crowd"]) == 3
    assert aside.metrics["instances"]["truth"] == 0
    assert any("All 3 defects are crowds" in note for note in aside.metrics["notes"])
    assert taken.metrics["tally"]["annotations"] == {"found": 5, "used": 5, "not_used": {}}
    assert taken.metrics["instances"]["truth"] == 3
    assert taken.metrics["crowds"] == "instances"


def test_a_bad_record_is_left_out_with_its_image_in_figures_and_report(run_dir: Path, dataset: Path) -> None:
    content = json.loads((dataset / "val" / "annotations.json").read_text())
    content["annotations"][0]["category_id"] = 9
    edit(dataset, **content)
    nothing_written(run_dir, dataset, "annotation 1 has category 9")
    done = run(run_dir, dataset, on_error="skip", **QUICK)
    assert done.metrics["total_images"] == 4
    page = (done.results_dir / "report.html").read_text(encoding="utf-8")
    assert "5 images: 4 used, 1 not used: bad record." in page
    assert "crack_1.png</td>" in page


def test_masks_are_not_evaluated_by_boxes_alone(run_dir: Path, dataset: Path) -> None:
    content = json.loads((dataset / "val" / "annotations.json").read_text())
    content["annotations"][0]["segmentation"] = []
    edit(dataset, **content)
    says = r"1 defects have a box but no mask \(annotation 1, for example\), and .*best.pt predicts masks"
    nothing_written(run_dir, dataset, says)
