"""`predict --records`: rows in parts, the inputs, shards, and runs that go on."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_read_back import names
from random_network import SPEC, network, patchwork, spec_of

from flawmask import masks
from flawmask.errors import FlawmaskError
from flawmask.files import walked
from flawmask.images import write_png
from flawmask.inference import calibration, records
from flawmask.inference.archive import Recorded, predict_records
from flawmask.inference.calibration import Calibration
from flawmask.inference.config import PredictConfig
from flawmask.inference.inputs import find_images, shard_number, stream_images
from flawmask.inference.predictor import Predictor
from flawmask.model import checkpoint
from flawmask.model.spec import ModelSpec

pytestmark = pytest.mark.usefixtures("small_network")

CONF = 0.7


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with seven images of several sizes, one of them damaged, and a text."""
    monkeypatch.chdir(tmp_path)
    folder = Path("archive")
    for seed, name in enumerate(("a.png", "a/1.png", "a/2.png", "b c.png", "d.png", "é.png")):
        write_png(folder / name, patchwork(60 - seed, 50 + 3 * seed, seed))
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:90])
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(model: Path, *inputs: Path | str, **settings: Any) -> tuple[Recorded, list[dict[str, Any]]]:
    settings = {"conf": CONF, "output_dir": Path("out"), "device": "cpu", "rows_per_part": 2, **settings}
    settings = {"records": "jsonl", **settings}
    done = predict_records(PredictConfig(model=model, input=tuple(map(str, inputs)), **settings))
    return done, list(rows_of(done.output))


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.rglob("part-*")):
        yield from records.read_part(path)


def test_each_image_is_a_row_with_all_that_the_network_predicts(model: Path, archive: Path) -> None:
    done, rows = run(model, archive)
    assert [row["file"] for row in rows] == [path.as_posix() for path in sorted(archive.rglob("*.png"))]
    assert (done.images, done.without_verdict, done.not_predicted) == (7, 1, 1)
    assert done.defective + done.good == 6
    predictor = Predictor(model, "cpu", threshold=CONF)
    for row in rows:
        if row["file"].endswith("bad.png"):
            assert row["verdict"] is None
            assert "bad.png" in row["reason"]
            assert row["instances"] == []
            continue
        expected = predictor(row["file"])
        assert row["verdict"] == ("defect" if expected.is_defect else "good")
        assert (row["width"], row["height"]) == (expected.width, expected.height)
        assert row["score"] == expected.verdict().score
        assert row["defect_area_px"] == expected.defect_mask().sum()
        assert len(row["instances"]) == len(expected) > 0
        assert min(one["score"] for one in row["instances"]) < CONF, "those below the threshold are there, too"
        for one, instance in zip(row["instances"], expected.instances, strict=True):
            assert (one["class"], one["score"], one["box"]) == (instance.label, instance.score, instance.xywh)
            mask = masks.decode({"size": [row["height"], row["width"]], "counts": one["counts"]}, *instance.mask.shape)
            assert np.array_equal(mask, instance.mask)
    (other,) = (done.output / "not_predicted.jsonl").read_text().splitlines()
    assert json.loads(other) == {"file": "archive/notes.txt", "reason": "no image"}


@pytest.mark.parametrize("spec", [replace(SPEC, tile=32, overlap=8), spec_of("maskrcnn_efficientnet_lite0_fpn")])
def test_tiles_scores_of_pixels_regions_and_calibrations_are_those_of_a_predictor(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network_file, region = Path("best.pt"), np.zeros((60, 90), dtype=bool)
    checkpoint.save(network_file, network(spec), spec)
    calibration.save(Calibration(1.5, -0.5, "val", 9, 9, 3, **spec.tiles_as_json), network_file)
    region[:, 20:70] = True
    write_png(Path("region.png"), region.astype(np.uint8) * 255)
    for seed in range(3):
        write_png(Path(f"images/{seed}.png"), patchwork(*region.shape, seed))
    _, rows = run(network_file, "images", roi=Path("region.png"), min_area=3)
    predictor = Predictor(network_file, "cpu", threshold=CONF, min_area=3)
    for row in rows:
        expected = predictor(row["file"]).within(region)
        verdict = expected.verdict()
        assert (row["score"], row["defect_probability"]) == (verdict.score, verdict.defect_probability)
        assert [one["score"] for one in row["instances"]] == [one.score for one in expected.instances]
        assert [one["counts"] for one in row["instances"]] == [one.rle["counts"] for one in expected.instances]
    with pytest.raises(FlawmaskError, match="was begun with roi"):
        run(network_file, "images", min_area=3)


def test_images_that_are_odd_are_counted_and_warned_of(
    model: Path, archive: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(model, archive, tile=64)
    assert "6 of 7 images of --input are smaller than a tile of 64 pixels in height or width" in caplog.text


def test_parquet_holds_the_same_rows(model: Path, archive: Path) -> None:
    _, rows = run(model, archive)
    done, same = run(model, archive, records="parquet", output_dir=Path("parquet"))
    assert same == rows
    assert names(done.output)[2:-1] == [f"part-{number:06d}.parquet" for number in range(4)]
    (part, *_) = sorted(done.output.glob("*.parquet"))
    assert list(records.read_part(part, ["verdict"])) == [{"verdict": row["verdict"]} for row in rows[:2]]


def test_a_run_goes_on_with_the_parts_that_are_missing(model: Path, archive: Path) -> None:
    done, rows = run(model, archive)
    parts = sorted(done.output.glob("part-*"))
    before = {path: path.stat().st_mtime_ns for path in parts}
    for path in parts[1:3]:
        path.unlink()
    (done.output / ".part-000001.jsonl.0123456789abcdef.partial").write_text("{")
    # An image that arrives now is not among those that were listed. One that is gone has a row that says so.
    write_png(archive / "a" / "0.png", patchwork(50, 50, 9))
    (archive / "b c.png").unlink()
    again, now = run(model, archive)
    assert again.images == 7
    assert [row["file"] for row in now] == [row["file"] for row in rows]
    changed = [row["file"] for row, other in zip(now, rows, strict=True) if row != other]
    assert changed == ["archive/b c.png"]
    assert again.without_verdict == 2
    assert names(done.output) == names(again.output)
    assert [path.stat().st_mtime_ns == before[path] for path in parts] == [True, False, False, True]


def test_shards_share_and_miss_no_image_even_if_others_arrive(model: Path, archive: Path) -> None:
    _, rows = run(model, archive, output_dir=Path("whole"))
    found = []
    for number in (1, 2, 3):
        done, some = run(model, archive, shard=f"{number}/3")
        assert done.output == Path(f"out/shard-{number}-of-3")
        assert without_new(some) == [row for row in rows if shard_number(row["file"], 3) == number]
        found += some
        write_png(archive / f"new_{number}.png", patchwork(50, 50, 9))
    assert sorted(without_new(found), key=lambda row: str(row["file"])) == sorted(
        rows, key=lambda row: str(row["file"])
    )


def without_new(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "new_" not in row["file"]]


def test_shards_are_of_about_equal_size() -> None:
    counts = np.bincount([shard_number(f"line3/{number:06d}.png", 16) for number in range(16000)])
    assert counts[0] == 0
    assert (np.abs(counts[1:] - 1000) < 5 * 1000**0.5).all()


def test_inputs_are_listed_as_without_records_and_each_file_once(archive: Path) -> None:
    inputs = ("archive/a", "archive/*.png", "archive/notes.txt", "archive", "archive/**/*.png")
    expected = find_images(inputs, Path("out"))
    found = list(stream_images(inputs, Path("out")))
    assert sorted(expected.images) == [Path(name) for name, reason in found if reason is None]
    assert not expected.not_predicted
    assert all(Path(one) < Path(other) for (one, _), (other, _) in pairwise(found))
    for text in inputs:
        alone = find_images((text,), Path("out"))
        expected_reasons = dict.fromkeys(alone.images) | alone.not_predicted
        assert {Path(name): reason for name, reason in stream_images((text,), Path("out"))} == expected_reasons
    assert list(walked(archive)) == sorted(path for path in archive.rglob("*") if path.is_file())


def test_a_list_keeps_its_order_and_names_each_image_once(model: Path, archive: Path) -> None:
    Path("list.txt").write_bytes("archive/é.png\r\n\narchive/a.png\narchive/missing.png\n".encode())
    done, rows = run(model, "@list.txt")
    assert [row["file"] for row in rows] == ["archive/é.png", "archive/a.png", "archive/missing.png"]
    assert "missing.png cannot be opened" in rows[-1]["reason"]
    assert find_images(("@list.txt",), Path("out")).images == [Path(row["file"]) for row in rows]
    assert done.without_verdict == 1
    Path("list.txt").write_text("archive/a.png\narchive/d.png\narchive/a.png\n")
    with pytest.raises(FlawmaskError, match="names the image of its line 1 twice"):
        run(model, "@list.txt", output_dir=Path("other"))
    with pytest.raises(FlawmaskError, match="must be the only input"):
        run(model, "@list.txt", archive, output_dir=Path("other"))
    with pytest.raises(FlawmaskError, match="the list cannot be read"):
        run(model, "@gone.txt", output_dir=Path("other"))
    assert not Path("other").exists()


def test_what_cannot_be_gone_on_with_is_refused_and_nothing_changes(model: Path, archive: Path) -> None:
    done, rows = run(model, archive)
    for settings, message in (
        ({"conf": 0.4}, "was begun with conf 0.7, and not 0.4"),
        ({"rows_per_part": 3}, "was begun with rows_per_part 2, and not 3"),
        ({"records": "parquet"}, "was begun with records 'jsonl'"),
    ):
        with pytest.raises(FlawmaskError, match=message):
            run(model, archive, **settings)
    other = model.with_name("other.pt")
    checkpoint.save(other, network(), replace(SPEC, max_detections=19))
    with pytest.raises(FlawmaskError, match="was begun with model_sha256"):
        run(other, archive)
    assert list(rows_of(done.output)) == rows
    Path("taken").mkdir()
    Path("taken/file").touch()
    with pytest.raises(FlawmaskError, match="taken holds something else"):
        run(model, archive, output_dir=Path("taken"))
    with pytest.raises(FlawmaskError, match="there is no such file, or no image"):
        run(model, "archive/*.tif", output_dir=Path("other"))
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard": "0/4"}, "--shard is 0/4"),
        ({"shard": "5/4"}, "--shard is 5/4"),
        ({"shard": "3"}, "--shard is 3"),
        ({"shard": "1/4", "records": None}, "--shard is for --records"),
        ({"rows_per_part": 0}, "--rows_per_part is 0"),
        ({"records": "csv"}, "--records is csv"),
        ({"save_masks": True}, "--save_masks cannot be used with --records"),
        ({"strict": True}, "--strict cannot be used with --records"),
        ({"intensity": "auto"}, "--intensity auto cannot be used with --records"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FlawmaskError, match=message):
        PredictConfig(model=Path("best.pt"), input=("a.png",), **{"records": "jsonl", **settings})
