"""The stage `predict`: its images, the files that it writes, and the errors that stop it."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_read_back import names, rows
from forked import Forked
from PIL import Image
from random_network import SPEC, network, patchwork

from flawmask import masks
from flawmask.errors import FlawmaskError, UnusedError
from flawmask.images import read_image, read_mask, write_png
from flawmask.inference import calibration
from flawmask.inference.calibration import Calibration
from flawmask.inference.config import PredictConfig
from flawmask.inference.predict import Predicted, predict
from flawmask.inference.predictor import Predictor
from flawmask.model import checkpoint

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder with three images of different sizes, one of them in a subfolder."""
    folder = tmp_path / "parts"
    for seed, (name, size) in enumerate({"b.png": (60, 80), "a.png": (70, 50), "deep/c.png": (64, 64)}.items()):
        write_png(folder / name, patchwork(*size, seed))
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(model: Path, tmp_path: Path, *inputs: Path | str, **settings: Any) -> tuple[Predicted, list[dict[str, Any]]]:
    settings = {"conf": 0.3, "output_dir": tmp_path / "out", "device": "cpu", **settings}
    done = predict(PredictConfig(model=model, input=tuple(map(str, inputs)), **settings))
    return done, json.loads((done.output / "predictions.json").read_bytes())["images"]


def test_pictures_that_an_earlier_run_left_among_the_images_are_not_evaluated(model: Path, parts: Path) -> None:
    output = parts / "results"
    _, first = run(model, parts, parts, output_dir=output, save_masks=True)
    _, second = run(model, parts, parts, output_dir=output, save_masks=True)
    assert [one["file"] for one in first] == [one["file"] for one in second]
    assert len(second) == 3


def test_an_input_that_leads_to_no_image_is_an_error_and_nothing_is_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no image")
    with pytest.raises(FlawmaskError, match=r"--input .*: there is no such file, or no image"):
        run(model, tmp_path, tmp_path / "texts")
    assert names(tmp_path) == ["texts"]


def test_each_image_gets_its_record_at_its_own_size(model: Path, parts: Path, tmp_path: Path) -> None:
    done, records = run(model, tmp_path, parts)
    assert [record["file"] for record in records] == [
        (parts / name).as_posix() for name in ("a.png", "b.png", "deep/c.png")
    ]
    assert [(record["height"], record["width"]) for record in records] == [(70, 50), (60, 80), (64, 64)]
    assert sum(len(record["instances"]) for record in records) > 3
    for record in records:
        union = np.zeros((record["height"], record["width"]), dtype=bool)
        for one in record["instances"]:
            mask = masks.decode(one["segmentation"], record["height"], record["width"])
            assert one["area"] == mask.sum()
            assert one["class"] in ("crack", "scratch")
            assert one["score"] >= 0.3
            x, y, width, height = one["box"]
            assert 0 <= x < x + width <= record["width"]
            assert 0 <= y < y + height <= record["height"]
            union |= mask
        assert record["defect_area_px"] == union.sum()
        assert record["defect_area_percent"] == pytest.approx(100 * union.mean())
        assert record["verdict"] == ("defect" if record["instances"] else "good")
        assert read_image(done.output / record["overlay"]).shape[1] >= 400, "too small to read"
        assert "mask" not in record
    verdicts = {record["file"]: record["verdict"] for record in records}
    assert [path.as_posix() for path in done.defective] == [name for name, one in verdicts.items() if one == "defect"]
    assert [path.as_posix() for path in done.good] == [name for name, one in verdicts.items() if one == "good"]
    assert not (done.output / "masks").exists()


def test_the_table_agrees_with_the_records(model: Path, parts: Path, tmp_path: Path) -> None:
    done, records = run(model, tmp_path, parts, conf=0.6, min_area=30)
    table = rows(done.output / "predictions.csv")
    assert len(table) == len(records)
    for row, record in zip(table, records, strict=True):
        assert row["file"] == record["file"]
        assert row["verdict"] == record["verdict"]
        assert float(row["score"]) == pytest.approx(record["score"], abs=1e-6)
        assert int(row["instances"]) == len(record["instances"])
        assert int(row["defect_area_px"]) == record["defect_area_px"]
        assert float(row["defect_area_percent"]) == pytest.approx(record["defect_area_percent"], abs=1e-4)


def test_a_calibrated_checkpoint_gives_the_probability_of_a_defect(model: Path, parts: Path, tmp_path: Path) -> None:
    curve = Calibration(0.5, -1.0, "val", 40, 20)
    calibration.save(curve, model)
    try:
        done, records = run(model, tmp_path, parts)
        table = rows(done.output / "predictions.csv")
        other = run(model, tmp_path, parts, min_area=1)[1]
    finally:
        model.with_name("best.calibration.json").unlink()
    for row, record in zip(table, records, strict=True):
        assert record["defect_probability"] == pytest.approx(float(curve.probability(record["score"])))
        assert float(row["defect_probability"]) == pytest.approx(record["defect_probability"], abs=1e-6)
    assert {record["defect_probability"] for record in other} == {None}, "it was fitted with another --min_area"
    done, uncalibrated = run(model, tmp_path, parts)
    assert {row["defect_probability"] for row in rows(done.output / "predictions.csv")} == {""}
    assert uncalibrated == [{**record, "defect_probability": None} for record in records], "nothing else differs"


def test_joining_leaves_verdict_score_and_defect_area_alone(model: Path, parts: Path, tmp_path: Path) -> None:
    by_rule = {}
    for rule in ("off", "touching"):
        done, by_rule[rule] = run(model, tmp_path, parts, join=rule, conf=0.5)
        assert json.loads((done.output / "predictions.json").read_bytes())["join"] == rule
    counts = {rule: sum(len(record["instances"]) for record in records) for rule, records in by_rule.items()}
    assert counts["touching"] < counts["off"]
    for apart, together in zip(*by_rule.values(), strict=True):
        for key in ("verdict", "score", "defect_area_px"):
            assert together[key] == apart[key]
    assert run(model, tmp_path, parts, conf=0.5)[1] == by_rule["off"], "as the checkpoint says"


def test_saved_masks_are_the_union_of_the_records_instances(model: Path, parts: Path, tmp_path: Path) -> None:
    done, records = run(model, tmp_path, parts, save_masks=True)
    for record in records:
        union = np.zeros((record["height"], record["width"]), dtype=bool)
        for one in record["instances"]:
            union |= masks.decode(one["segmentation"], record["height"], record["width"])
        assert (read_mask(done.output / record["mask"]) == union).all()
        assert set(np.unique(read_image(done.output / record["mask"]))) <= {0, 255}
    assert len(list((done.output / "masks").iterdir())) == 3


def test_images_with_the_same_name_have_separate_results(model: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(["one/x.png", "two/x.png", "three/X.jpg"]):
        write_png(tmp_path / name, patchwork(50 + seed, 60, seed))
    done, records = run(model, tmp_path, tmp_path / "one", tmp_path / "two", tmp_path / "three", save_masks=True)
    assert [record["mask"].lower() for record in records] == ["masks/x.png", "masks/x-2.png", "masks/x-3.png"]
    assert [read_mask(done.output / record["mask"]).shape[0] for record in records] == [50, 51, 52]
    assert len({record["overlay"].lower() for record in records}) == 3


def test_names_with_spaces_and_of_any_script_are_kept(model: Path, tmp_path: Path) -> None:
    name = "Flasche 3 überprüft 检查.png"
    write_png(tmp_path / "in put" / name, patchwork(50, 60))
    done, (record,) = run(model, tmp_path, tmp_path / "in put", save_masks=True)
    assert record["file"].endswith(name)
    assert rows(done.output / "predictions.csv")[0]["file"] == record["file"]
    assert (done.output / "overlays" / name).is_file()
    assert (done.output / "masks" / name).is_file()


def test_a_table_opens_in_excel_and_a_folder_with_brackets_is_that_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names_there = ("=1+2.png", 'Teil_ü, 划痕 "A".png', "-1.png")
    for seed, name in enumerate(names_there):
        write_png(tmp_path / "línea 3, cámara [2]" / name, patchwork(40, 50, seed))
    done, records = run(model, tmp_path, "línea 3, cámara [2]/*.png")
    assert sorted(record["file"] for record in records) == sorted(f"línea 3, cámara [2]/{name}" for name in names_there)
    assert (done.output / "predictions.csv").read_bytes().startswith(b"\xef\xbb\xbffile,verdict,")
    assert [row["file"] for row in rows(done.output / "predictions.csv")] == [record["file"] for record in records]
    monkeypatch.chdir(tmp_path / "línea 3, cámara [2]")
    done, records = run(model, tmp_path, *names_there)
    assert [record["file"] for record in records] == list(names_there)
    listed = [row["file"] for row in rows(done.output / "predictions.csv")]
    assert listed == ["'=1+2.png", 'Teil_ü, 划痕 "A".png', "'-1.png"]


def test_a_name_that_no_font_can_write_is_left_out_of_the_title(model: Path, tmp_path: Path) -> None:
    pixels = patchwork(40, 50)
    for name in ("\u0378.png", "\u0379_2.png", "named.png"):
        write_png(tmp_path / "parts" / name, pixels)
    done, records = run(model, tmp_path, tmp_path / "parts")
    by_name = {Path(record["file"]).name: read_image(done.output / record["overlay"]) for record in records}
    assert (by_name["\u0378.png"] == by_name["\u0379_2.png"]).all()
    assert (by_name["\u0378.png"] != by_name["named.png"]).any()


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_file_name_that_is_not_valid_unicode_is_kept(model: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"Pr\xfcfung.png")
    try:
        write_png(tmp_path / "parts" / name, patchwork(40, 50))
    except OSError:
        pytest.skip("this file system has Unicode names only")
    done, (record,) = run(model, tmp_path, tmp_path / "parts")
    assert record["file"].endswith(name)
    assert (done.output / record["overlay"]).is_file()
    assert rows(done.output / "predictions.csv")[0]["file"].endswith("Pr\\udcfcfung.png")


def test_files_without_a_prediction_are_listed_and_counted(
    model: Path, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (parts / "photo.cr2").write_bytes(b"II*\0raw")
    (parts / "bad.png").write_bytes(b"no image")
    done, records = run(model, tmp_path, parts)
    photo, notes = (parts / "photo.cr2").as_posix(), (parts / "notes.txt").as_posix()
    content = json.loads((done.output / "predictions.json").read_bytes())
    assert {one["file"]: one["reason"] for one in content["not_predicted"]} == {
        path.as_posix(): reason for path, reason in done.not_predicted.items()
    }
    assert set(done.not_predicted) == {Path(photo), Path(notes)}
    assert content["tally"]["images"] == {
        "found": 5,
        "used": 3,
        "not_used": {"unknown format": [photo], "unreadable": [(parts / "bad.png").as_posix()]},
    }
    assert content["tally"]["images"]["used"] == sum("error" not in record for record in records)
    assert f"{notes}: not predicted: no image" in caplog.messages
    assert any(message.startswith(f"{photo}: not predicted: none of the formats ") for message in caplog.messages)
    line = "5 images: 3 used, 2 not used: 1 unknown format, 1 unreadable"
    assert any(message.startswith(f"{parts}: {line} (") for message in caplog.messages)


def test_a_count_is_not_printed_where_all_is_used(
    model: Path, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done, _ = run(model, tmp_path, parts, strict=True)
    assert not [message for message in caplog.messages if "not used" in message]
    content = json.loads((done.output / "predictions.json").read_bytes())
    assert content["tally"] == {"images": {"found": 3, "used": 3, "not_used": {}}}


@pytest.mark.parametrize(("name", "reason"), [("photo.cr2", "unknown format"), ("bad.png", "unreadable")])
def test_with_strict_an_image_without_a_prediction_is_an_error_and_nothing_is_written(
    model: Path, parts: Path, tmp_path: Path, name: str, reason: str
) -> None:
    (parts / name).write_bytes(b"II*\0raw")
    with pytest.raises(UnusedError, match=rf"4 images: 3 used, 1 not used: {reason} \(.*{name}\)"):
        run(model, tmp_path, parts, strict=True)
    assert names(tmp_path) == ["parts"]


def test_a_bad_image_is_listed_and_the_others_go_on(model: Path, parts: Path, tmp_path: Path) -> None:
    whole = (parts / "a.png").read_bytes()
    (parts / "a.png").write_bytes(whole[: len(whole) // 2])
    (parts / "x.png").symlink_to(parts / "gone.png")
    (parts / "y.png").symlink_to(parts / "y.png")
    (parts / "z.jpg").write_bytes(b"no image at all")
    done, records = run(model, tmp_path, parts)
    assert list(done.unreadable) == [parts / name for name in ("a.png", "x.png", "y.png", "z.jpg")]
    assert len(done.defective) + len(done.good) == 2
    bad = [record for record in records if "error" in record]
    assert [set(record) for record in bad] == [{"file", "error"}] * 4
    assert "a.png cannot be read as an image" in bad[0]["error"]
    assert "x.png cannot be opened: No such file" in bad[1]["error"]
    assert "y.png cannot be opened: " in bad[2]["error"]
    assert [row["verdict"] for row in rows(done.output / "predictions.csv")].count("unreadable") == 4
    assert len(list((done.output / "overlays").iterdir())) == 2


# Files of more than 8 bits, and rare ones


def deep(path: Path, bits: int, seed: int = 0) -> Path:
    """The same picture as an 8-bit one, as a camera with this many bits takes it."""
    pixels = patchwork(60, 80, seed)[:, :, 0].astype(np.uint16)
    write_png(path, (pixels << bits - 8 | pixels >> 16 - bits).astype(np.uint16))
    return path


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, as if it had been trained on images of 12 bits."""
    path = tmp_path_factory.mktemp("deep") / "best.pt"
    checkpoint.save(path, network(), replace(SPEC, intensity=(0, 4095)))
    return path


def test_images_are_read_with_the_levels_of_the_training(
    deep_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    write_png(tmp_path / "parts" / "eight.png", patchwork(60, 80)[:, :, 0])
    deep(tmp_path / "parts" / "twelve.png", 12)
    done, (eight, twelve) = run(deep_model, tmp_path, tmp_path / "parts")
    assert eight["instances"]
    assert twelve["instances"] == eight["instances"]
    one, other = (read_image(done.output / record["overlay"])[40:] for record in (eight, twelve))
    assert np.array_equal(one, other)
    assert not caplog.messages
    predictor = Predictor(deep_model, "cpu")
    assert (
        predictor(tmp_path / "parts" / "twelve.png").scores.tolist()
        == predictor(patchwork(60, 80)[:, :, 0]).scores.tolist()
    )


def test_one_warning_names_images_outside_the_levels_and_other_levels_can_be_given(
    model: Path, deep_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    write_png(tmp_path / "parts" / "eight.png", patchwork(60, 80)[:, :, 0])
    for seed, bits in enumerate((11, 12, 16)):
        deep(tmp_path / "parts" / f"of_{bits}.png", bits, seed)
    run(model, tmp_path, tmp_path / "parts")
    (said,) = caplog.messages
    assert "2 of 4 images do not fit the range of grey from 0 to 65535 (as the model was trained)" in said
    assert re.search(
        r"of_11\.png holds no value above \d+, and 65535 becomes white: it is seen as a dark picture", said
    )
    assert "--intensity" in said
    caplog.clear()
    run(deep_model, tmp_path, tmp_path / "parts" / "of_16.png")
    assert "all above 4095 become white" in caplog.messages[0]
    caplog.clear()
    _, (dark,) = run(model, tmp_path, tmp_path / "parts" / "of_12.png")
    caplog.clear()
    for rule in ("12", "auto"):
        done, (bright,) = run(model, tmp_path, tmp_path / "parts" / "of_12.png", intensity=rule)
        assert bright["instances"] != dark["instances"]
        assert read_image(done.output / bright["overlay"])[40:].max() > 200
    assert not caplog.messages


def test_an_image_that_the_levels_make_black_has_no_verdict(model: Path, tmp_path: Path) -> None:
    deep(tmp_path / "parts" / "of_10.png", 10)
    write_png(tmp_path / "parts" / "wide.png", np.full((60, 80), 255, np.uint16))  # 8 bits in 16
    done, records = run(model, tmp_path, tmp_path / "parts")
    assert not done.good
    assert all("is black as the network sees it: its highest value" in record["error"] for record in records)
    done, (found,) = run(model, tmp_path, tmp_path / "parts" / "of_10.png", intensity="10")
    assert not done.unreadable
    assert found["instances"]


def test_a_page_is_taken_of_files_that_hold_several(model: Path, tmp_path: Path) -> None:
    pages = [Image.fromarray(patchwork(60, 80, seed)) for seed in range(2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[1].save(tmp_path / "second.png")
    done, _ = run(model, tmp_path, tmp_path / "a.tif")
    assert "--page" in done.unreadable[tmp_path / "a.tif"]
    _, (found,) = run(model, tmp_path, tmp_path / "a.tif", page=2)
    _, (expected,) = run(model, tmp_path, tmp_path / "second.png", page=1)
    assert found["instances"] == expected["instances"]
    done, _ = run(model, tmp_path, tmp_path / "second.png", page=2)
    assert "has no page 2" in done.unreadable[tmp_path / "second.png"]


def test_further_kinds_of_files_are_found_in_folders(model: Path, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "a.webp": {"lossless": True},
        "b.jfif": {"format": "JPEG"},
        "c.jp2": {},
        "d.gif": {},
    }
    for name, options in kinds.items():
        (tmp_path / "parts").mkdir(exist_ok=True)
        Image.fromarray(patchwork(60, 80)).save(tmp_path / "parts" / name, **options)
    done, records = run(model, tmp_path, tmp_path / "parts")
    assert [Path(one["file"]).name for one in records] == ["a.webp", "b.jfif", "c.jp2", "d.gif"]
    assert not done.unreadable


LARGE = """
import resource, sys, time
from dataclasses import replace
from pathlib import Path
from flawmask import launch
launch.set_environment()
launch.own_process()
sys.path.insert(0, sys.argv[1])
from small_network import put_in_place
put_in_place()
from flawmask.inference.config import PredictConfig
from flawmask.inference.predict import predict
def run(name):
    began = time.perf_counter()
    folders = {"model": Path(sys.argv[2]), "output_dir": Path(sys.argv[3])}
    config = PredictConfig(**folders, input=(name,), device="cpu", conf=0.05)
    assert not predict(config).unreadable
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter() - began
print(*run(sys.argv[4]), *run(sys.argv[5]))
"""


@pytest.mark.services
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is another elsewhere")
@pytest.mark.parametrize("kind", ["grey", "grey16", "rgb"])
def test_a_line_scan_of_80_megapixels_takes_little_more_memory_than_one(model: Path, tmp_path: Path, kind: str) -> None:
    spread = np.random.default_rng(0).integers(0, 40, (4000, 20_000), dtype=np.uint8)
    spread[1000:3000, 3000:9000] += 150
    scan: Any = spread.astype(np.uint16) * 256 if kind == "grey16" else spread
    scan = np.repeat(spread[:, :, None], 3, 2) if kind == "rgb" else scan
    for name, pixels in (("small.png", scan[:1000, :1000]), ("large.png", scan)):
        write_png(tmp_path / name, pixels)
    names = [str(tmp_path / name) for name in ("out", "small.png", "large.png")]
    command = [sys.executable, "-c", LARGE, str(Path(__file__).parents[1]), str(model), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, _, large, seconds = map(float, done.stdout.split())
    assert large - small < 700, f"MB: {small:.0f} and {large:.0f}"
    assert seconds < 60


def test_where_no_image_can_be_read_all_are_listed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").touch()
    done, records = run(model, tmp_path, tmp_path / "bad.png")
    assert list(done.unreadable) == [tmp_path / "bad.png"]
    assert len(records) == len(rows(done.output / "predictions.csv")) == 1


def test_only_defects_inside_the_region_count(model: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "part.png", patchwork(64, 64))
    region = np.zeros((64, 64), np.uint8)
    region[:, :20] = 255
    write_png(tmp_path / "roi.png", region)
    _, (free,) = run(model, tmp_path, tmp_path / "part.png", save_masks=True)
    assert free["defect_area_px"] > 0
    whole = read_mask(tmp_path / "out" / free["mask"])
    _, (cut,) = run(model, tmp_path, tmp_path / "part.png", save_masks=True, roi=tmp_path / "roi.png")
    inside = read_mask(tmp_path / "out" / cut["mask"])
    assert (inside == (whole & (region > 0))).all()
    assert cut["defect_area_px"] == inside.sum() < free["defect_area_px"]


def test_a_region_that_cannot_be_used_is_an_error_and_nothing_is_written(
    model: Path, parts: Path, tmp_path: Path
) -> None:
    write_png(tmp_path / "roi.png", np.zeros((70, 50), np.uint8))
    with pytest.raises(FlawmaskError, match=r"roi\.png has no white pixel"):
        run(model, tmp_path, parts / "a.png", roi=tmp_path / "roi.png")
    with pytest.raises(FlawmaskError, match=r"gone\.png cannot be opened"):
        run(model, tmp_path, parts, roi=tmp_path / "gone.png")
    assert names(tmp_path) == ["parts", "roi.png"]


def test_an_image_of_another_size_than_the_region_is_listed_and_the_others_go_on(
    model: Path, parts: Path, tmp_path: Path
) -> None:
    write_png(parts / "small.png", np.zeros((10, 20, 3), np.uint8))
    write_png(tmp_path / "roi.png", np.full((10, 20), 255, np.uint8))
    found, records = run(model, tmp_path, parts, roi=tmp_path / "roi.png")
    assert found.good + found.defective == [parts / "small.png"]
    errors = [record["error"] for record in records if "error" in record]
    assert len(errors) == len(records) - 1
    assert any("a.png is 50x70 but" in error and "roi.png is 20x10" in error for error in errors)


def test_a_file_that_is_no_model_is_an_error_and_nothing_is_written(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_text("not a network")
    with pytest.raises(FlawmaskError, match=r"best\.pt is not a file of weights"):
        run(tmp_path / "best.pt", tmp_path, parts)
    assert names(tmp_path) == ["best.pt", "parts"]


def test_a_folder_that_holds_something_else_is_refused_and_left(model: Path, parts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(FlawmaskError, match="out holds something else"):
        run(model, tmp_path, parts)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_an_evaluation_is_not_replaced_by_a_prediction(model: Path, parts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("metrics.json", "predictions.json", "predictions.csv"):
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(FlawmaskError, match=r"out holds something else \(metrics\.json\)"):
        run(model, tmp_path, parts)
    assert len(names(tmp_path / "out")) == 3


def test_an_earlier_prediction_is_replaced_as_a_whole(model: Path, parts: Path, tmp_path: Path) -> None:
    run(model, tmp_path, parts, save_masks=True)
    done, _ = run(model, tmp_path, parts / "a.png")
    assert names(done.output) == ["overlays", "predictions.csv", "predictions.json"]
    assert names(done.output / "overlays") == ["a.png"]
    assert names(tmp_path) == ["out", "parts"]


def test_records_do_not_depend_on_the_batch_size(model: Path, parts: Path, tmp_path: Path) -> None:
    for seed in range(5):
        write_png(parts / f"like_{seed}.png", patchwork(60, 80, 10 + seed))
    (parts / "like_2.png").write_bytes(b"no image")
    _, alone = run(model, tmp_path, parts, save_masks=True, inference_batch_size=1)
    done, together = run(model, tmp_path, parts, save_masks=True, inference_batch_size=4)
    assert len(together) == 8
    for one, other in zip(together, alone, strict=True):
        assert one.keys() == other.keys()
        assert one.get("score") == pytest.approx(other.get("score"), abs=1e-5)
        for key in ("file", "error", "verdict", "defect_area_px", "overlay", "mask"):
            assert one.get(key) == other.get(key)
        masks_of = [[found["segmentation"] for found in record.get("instances", [])] for record in (one, other)]
        assert masks_of[0] == masks_of[1]
    assert list(done.unreadable) == [parts / "like_2.png"]


def test_a_picture_that_cannot_be_written_is_an_error_and_nothing_is_left(
    model: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flawmask.images.encode_png", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(model, tmp_path, parts)
    assert names(tmp_path) == ["parts"]


def test_limits_reach_the_network(model: Path, parts: Path, tmp_path: Path) -> None:
    _, everything = run(model, tmp_path, parts, conf=0.6)
    _, limited = run(model, tmp_path, parts, conf=0.6, score_floor=0.6)
    assert [len(one["instances"]) for one in limited] == [len(one["instances"]) for one in everything]
    _, none = run(model, tmp_path, parts, conf=1.0, score_floor=1.0)
    assert [one["score"] for one in none] == [0.0] * 3, "nothing is known of what was dropped"
    _, fewest = run(model, tmp_path, parts, conf=0.05, max_proposals=1)
    assert all(len(one["instances"]) <= 2 for one in fewest), "one of each class of defect"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"conf": 1.5}, "--conf is 1.5"),
        ({"conf": -0.1}, "--conf is -0.1"),
        ({"min_area": -1}, "--min_area is -1"),
        ({"inference_batch_size": 0}, "--inference_batch_size is 0"),
        ({"max_proposals": 0}, "--max_proposals is 0"),
        ({"page": 0}, "--page is 0"),
        ({"score_floor": 1.1}, "--score_floor is 1.1"),
        ({"score_floor": -0.1}, "--score_floor is -0.1"),
        ({"score_floor": 0.6}, "--score_floor is 0.6, above --conf"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(FlawmaskError, match=says):
        PredictConfig(model=Path("best.pt"), input=("x.png",), **settings)


@pytest.mark.parametrize("settings", [{"conf": 0.0}, {"conf": "auto", "score_floor": 0.9}, {"score_floor": 0.5}])
def test_a_score_floor_below_the_threshold_is_accepted(settings: dict[str, Any]) -> None:
    PredictConfig(model=Path("best.pt"), input=("x.png",), **settings)


QUICK = Path(__file__).parents[1] / "quick_flawmask.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_an_interrupt_ends_it_even_while_reading_a_file_hangs(model: Path, parts: Path, tmp_path: Path) -> None:
    """Reading a pipe without a writer hangs, like a file on a dead mount."""
    os.mkfifo(parts / "hanging.png")
    inputs = [parts, parts / "hanging.png"]  # in a folder alone, the pipe would be left out
    command = ["predict", "--model", model, "--input", *inputs, "--conf", "0.3", "--output_dir", tmp_path / "out"]
    running = Forked([QUICK, *map(str, command), "--device", "cpu"], os.environ)
    try:
        while True:  # until it is being read; held open, it does not end
            with suppress(OSError):
                held = os.open(parts / "hanging.png", os.O_WRONLY | os.O_NONBLOCK)
                break
            assert running.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate(timeout=60)
        os.close(held)
    finally:
        running.kill()
    assert running.returncode == 130, said
    assert not (tmp_path / "out").exists()
