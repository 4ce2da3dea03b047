"""`export`: its files, its proof, and what it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
from data_to_export import data_set
from oracle import Oracle, image_of, spec_for
from random_network import SPEC, random_network
from served_by_command import served

from flawmask.errors import FlawmaskError
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import evaluate
from flawmask.export import parity
from flawmask.export.config import ExportConfig
from flawmask.export.export import export
from flawmask.files import read_json, sha256, sha256_of, write_json
from flawmask.inference import calibration, threshold
from flawmask.inference import exported as exported_module
from flawmask.inference.archive import predict_records
from flawmask.inference.backend import detect
from flawmask.inference.calibration import Calibration
from flawmask.inference.config import PredictConfig
from flawmask.inference.exported import KEY, file_of, read_manifest
from flawmask.inference.predict import predict
from flawmask.inference.predictor import Predictor
from flawmask.inference.threshold import Threshold
from flawmask.model import checkpoint
from flawmask.tiles import WHOLE_IMAGES

pytestmark = pytest.mark.usefixtures("small_network")
"""The tests export one small network once, and damage copies of it."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint, a chosen threshold, and the path of its data set."""
    folder = tmp_path_factory.mktemp("run")
    data = data_set(folder / "data")
    spec = replace(SPEC, norm="frozen", join="touching")
    checkpoint.save(folder / "best.pt", random_network(spec), spec)
    threshold.save(Threshold(0.4, "aim", aim="f1", chosen_on="val", images=8), folder / "best.pt")
    (folder / "config.json").write_text(json.dumps({"settings": {"dataset_dir": data.as_posix()}}))
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Iterator[Path]:
    """The checkpoint as ONNX, proven."""
    yield export(ExportConfig(model=run / "best.pt", resamples=50)).folder


def test_the_export_is_proven_on_val_test_and_odd_images(exported: Path) -> None:
    content = read_json(exported / "parity.json")
    assert content["failures"] == []
    assert set(content["splits"]) == {"val", "test"}
    assert {"empty", "odd sizes", "one pixel thin", "grey", "16 bits", "batch"} <= set(content["odd"])
    for report in (*content["splits"].values(), *content["odd"].values()):
        assert report["changed_verdicts"] == []
        assert report["largest_score"] < 1e-2
    page = (exported / "parity.html").read_text(encoding="utf-8")
    assert "no verdict changed" in page
    assert "<script" not in page


def test_class_names_threshold_and_digest_are_in_the_network_and_beside_it(exported: Path, run: Path) -> None:
    (inside,) = [one.value for one in onnx.load(exported / "model.onnx").metadata_props if one.key == KEY]
    beside = read_json(exported / "export.json")["manifest"]
    assert json.loads(inside) == beside
    assert beside["spec"]["classes"] == ["good", "crack", "scratch"]
    assert beside["threshold"]["value"] == 0.4
    assert beside["checkpoint_sha256"] == sha256((run / "best.pt").read_bytes())
    assert read_manifest(file_of(exported)).spec.join == "touching"


def test_predictor_predict_and_evaluate_give_the_same_as_with_the_checkpoint(
    exported: Path, run: Path, tmp_path: Path
) -> None:
    images = sorted((run / "data" / "test" / "images").glob("*.png"))
    models = (run / "best.pt", exported)
    ours, its = (Predictor(model, "cpu", threshold="auto", precision="fp32") for model in models)
    assert ours.conf == its.conf == 0.4
    for one, other in zip(ours.predict(images), its.predict(images, batch_size=3), strict=True):
        assert one.is_defect == other.is_defect
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-3)
    predicted = predict(PredictConfig(model=exported, input=(str(images[0].parent),), output_dir=tmp_path / "out"))
    assert len(predicted.defective) + len(predicted.good) == 8
    config = EvaluateConfig(
        model=exported, dataset_dir=run / "data", split="test", conf="auto", precision="fp32", overlays=0, resamples=0
    )
    before, after = (
        evaluate(replace(config, model=model, output_dir=tmp_path / model.name)).metrics for model in models
    )
    assert before["conf"] == after["conf"] == 0.4
    for name in ("f1_score", "mask_ap", "image_auroc"):
        assert before[name] == pytest.approx(after[name], abs=1e-3)


def test_rows_of_an_export_give_its_figures(exported: Path, run: Path, tmp_path: Path) -> None:
    images, rows = run / "data" / "test" / "images", tmp_path / "rows"
    predict_records(PredictConfig(model=exported, input=(str(images),), output_dir=rows, records="jsonl"))
    config = EvaluateConfig(model=exported, dataset_dir=run / "data", split="test", overlays=0, resamples=0)
    from_rows = replace(config, model=None, predictions=rows, output_dir=tmp_path / "stored")
    expected, figures = (evaluate(one).metrics for one in (replace(config, output_dir=tmp_path / "out"), from_rows))
    for name in ("f1_score", "mask_ap", "image_auroc", "pixel_iou", "model_sha256"):
        assert figures[name] == expected[name]


def test_the_network_is_read_once_to_check_it(exported: Path) -> None:
    with patch.object(exported_module, "sha256_of", wraps=sha256_of) as checked:
        Predictor(exported, threshold="auto")
    assert [call.args[0].name for call in checked.call_args_list].count("model.onnx") == 1


def test_the_digest_of_an_export_covers_all_its_files(tmp_path: Path, exported: Path) -> None:
    content = read_json(exported / "export.json")
    content["files"] = {"model.xml": "0" * 64, "model.bin": "1" * 64}
    content["manifest"]["format"] = "openvino"
    network = tmp_path / "model.xml"
    write_json(tmp_path / "export.json", content)
    threshold.save(Threshold(0.9, "aim", aim="f1", chosen_on="val", images=8), network)
    calibration.save(Calibration(1.0, 0.0, "val", 8, 4), network)
    chosen, fitted = threshold.load(network), calibration.load(network, 0, WHOLE_IMAGES)
    assert chosen is not None
    assert (chosen.value, fitted) == (0.9, Calibration(1.0, 0.0, "val", 8, 4))
    content["files"]["model.bin"] = "2" * 64  # other weights
    write_json(tmp_path / "export.json", content)
    chosen = threshold.load(network)
    assert chosen is not None
    assert (chosen.value, calibration.load(network, 0, WHOLE_IMAGES)) == (0.4, None)


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("model.onnx", "export.json"):
        (folder / name).write_bytes((exported / name).read_bytes())
    return folder


def test_a_damaged_network_is_refused_by_name(copied: Path) -> None:
    data = bytearray((copied / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "model.onnx").write_bytes(bytes(data))
    with pytest.raises(FlawmaskError, match=r"copy/model\.onnx is damaged or was changed"):
        Predictor(copied)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("manifest", "layout"), 0, r"was exported by Flawmask .*: export it again"),
        (("manifest", "spec", "classes"), ["good", "dent", "scratch"], "do not belong together"),
        (("manifest", "spec"), {}, r"export\.json is damaged"),
        (("manifest", "threshold", "value"), 0.9, "do not belong together"),
        (("files",), {}, r"export\.json is damaged"),
    ],
)
def test_an_edited_manifest_is_refused_by_name(copied: Path, place: tuple[str, ...], value: Any, message: str) -> None:
    content = read_json(copied / "export.json")
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    (copied / "export.json").write_text(json.dumps(content))
    with pytest.raises(FlawmaskError, match=message):
        Predictor(copied, threshold="auto")


def test_a_missing_file_and_a_folder_that_is_no_export_are_refused_by_name(copied: Path, run: Path) -> None:
    (copied / "export.json").unlink()
    with pytest.raises(FlawmaskError, match=r"export\.json does not exist"):
        Predictor(copied)
    with pytest.raises(FlawmaskError, match="data is a folder, but no exported model"):
        Predictor(run / "data")


def test_data_with_other_classes_are_refused(exported: Path, run: Path, tmp_path: Path) -> None:
    data = data_set(tmp_path / "data")
    for path in data.rglob("annotations.json"):
        path.write_text(path.read_text().replace("scratch", "dent"))
    with pytest.raises(FlawmaskError, match="knows the classes good, crack, scratch"):
        evaluate(EvaluateConfig(model=exported, dataset_dir=data, output_dir=tmp_path / "out"))
    with pytest.raises(FlawmaskError, match="knows the classes good, crack, scratch"):
        export(ExportConfig(model=run / "best.pt", dataset_dir=data, output_dir=tmp_path / "export"))
    assert not (tmp_path / "export").exists()


def test_settings_that_are_fixed_in_an_export_are_refused(exported: Path) -> None:
    for changed in ({"score_floor": 0.01}, {"max_proposals": 7}, {"precision": "bf16"}, {"device": "cuda"}):
        with pytest.raises(FlawmaskError, match=next(iter(changed))):
            Predictor(exported, **changed)


def test_a_score_floor_above_the_threshold_is_refused_before_it_drops_defects_that_count(
    run: Path, tmp_path: Path
) -> None:
    lonely = tmp_path / "best.pt"
    lonely.write_bytes((run / "best.pt").read_bytes())
    config = ExportConfig(model=lonely, unproven=True, score_floor=0.6, output_dir=tmp_path / "export")
    with pytest.raises(FlawmaskError, match=r"--score_floor is 0\.6, above the threshold 0\.5 of"):
        export(config)
    assert not (tmp_path / "export").exists()
    threshold.save(Threshold(0.7, "aim", aim="f1", chosen_on="val", images=8), lonely)
    folder = export(config).folder
    assert Predictor(folder, threshold="auto").conf == 0.7
    refused = r"--score_floor is 0\.6, above the threshold 0\.5, so"
    with pytest.raises(FlawmaskError, match=refused):
        Predictor(folder)
    images, results = (str(run / "data" / "test" / "images"),), tmp_path / "out"
    with pytest.raises(FlawmaskError, match=refused):
        predict(PredictConfig(model=folder, input=images, output_dir=results))
    with pytest.raises(FlawmaskError, match=refused):
        evaluate(EvaluateConfig(model=folder, dataset_dir=run / "data", output_dir=results))
    with pytest.raises(FlawmaskError, match=refused):
        Predictor(lonely, "cpu", score_floor=0.6)
    assert not results.exists()


def test_an_export_is_repeated_over_what_evaluate_wrote_into_it(run: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "best.pt"
    lonely.write_bytes((run / "best.pt").read_bytes())
    config = ExportConfig(model=lonely, unproven=True)
    folder = export(config).folder
    evaluate(EvaluateConfig(model=folder, dataset_dir=run / "data", conf="auto", overlays=0, resamples=0))
    written = {"inference_val", "model.threshold.json", "model.calibration.json"}
    assert written <= {path.name for path in folder.iterdir()}
    export(config)
    assert not written & {path.name for path in folder.iterdir()}
    (folder / "inference_mine").mkdir()
    with pytest.raises(FlawmaskError, match="holds something else \\(inference_mine\\)"):
        export(config)


def test_proof_and_calibration_have_the_min_area_of_the_threshold(run: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "best.pt"
    lonely.write_bytes((run / "best.pt").read_bytes())
    threshold.save(Threshold(0.4, "aim", aim="f1", chosen_on="val", images=8, min_area=30), lonely)
    calibration.save(Calibration(1.0, 0.0, "val", 8, 4, min_area=30), lonely)
    config = ExportConfig(model=lonely, dataset_dir=run / "data", resamples=0, output_dir=tmp_path / "export")
    with pytest.raises(FlawmaskError, match=r"--min_area is 0, but the threshold of .* was chosen for 30"):
        export(replace(config, min_area=0))
    assert not (tmp_path / "export").exists()
    done = export(config)
    assert done.parity is not None
    assert done.parity["min_area"] == 30
    stored = read_manifest(file_of(done.folder)).calibration
    assert stored is not None
    assert stored.min_area == 30


def test_an_export_outside_the_tolerance_leaves_nothing_behind(run: Path, tmp_path: Path) -> None:
    with (
        patch.object(parity, "odd_images", lambda split, spec: {}),
        patch.dict(parity.TOLERANCES, {"fp32": parity.Tolerance(verdict=0.0, ap=-2.0, iou=0.0)}),
        pytest.raises(FlawmaskError, match="does not predict the same: val: mask_ap fell"),
    ):
        export(ExportConfig(model=run / "best.pt", output_dir=tmp_path / "export", resamples=0))
    assert not list(tmp_path.iterdir())


def test_without_data_only_an_unproven_export_is_written_and_every_report_says_so(run: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "best.pt"
    lonely.write_bytes((run / "best.pt").read_bytes())
    with pytest.raises(FlawmaskError, match="--dataset_dir"):
        export(ExportConfig(model=lonely))
    done = export(ExportConfig(model=lonely, unproven=True))
    assert done.parity is None
    assert not read_manifest(file_of(done.folder)).is_proven
    result = evaluate(
        EvaluateConfig(model=done.folder, dataset_dir=run / "data", output_dir=tmp_path / "out", overlays=0)
    )
    assert any("unproven" in note for note in result.metrics["notes"])


@pytest.mark.parametrize(("runtime", "precision"), [("onnx", "bf16"), ("onnx", "fp16"), ("openvino", "auto")])
def test_a_precision_that_a_format_lacks_is_refused_by_name(runtime: Any, precision: Any) -> None:
    with pytest.raises(FlawmaskError, match=f"--precision {precision} is not possible with --format {runtime}"):
        ExportConfig(model=Path("best.pt"), format=runtime, precision=precision)


WITHOUT_TORCH = """
import sys
class WithoutTorch:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "torchvision"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, WithoutTorch())
from flawmask.cli import main
main()
"""


def test_predict_and_evaluate_need_no_pytorch(exported: Path, run: Path, tmp_path: Path) -> None:
    for arguments in (
        ["predict", "--input", str(run / "data" / "test" / "images"), "--output_dir", str(tmp_path / "a")],
        ["evaluate", "--dataset_dir", str(run / "data"), "--conf", "auto", "--output_dir", str(tmp_path / "b")],
    ):
        command = [sys.executable, "-c", WITHOUT_TORCH, *arguments, "--model", str(exported)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ)
    assert (tmp_path / "b" / "report.html").is_file()


def test_the_server_needs_no_pytorch(exported: Path, run: Path) -> None:
    pytest.importorskip("uvicorn")
    image = next((run / "data" / "test" / "images").glob("*.png")).read_bytes()
    with served([sys.executable, "-c", WITHOUT_TORCH, "serve", "--model", str(exported)]) as ask:
        status, answer = ask("POST", "/v1/predict", image)
    assert (status, answer["verdict"] in ("good", "defect")) == (200, True)


def test_messages_name_packages_and_not_extras_that_would_bring_pytorch(exported: Path) -> None:
    with (
        patch.dict(sys.modules, {"onnxruntime": None}),
        pytest.raises(FlawmaskError, match=r"needs ONNX Runtime: pip install onnxruntime$"),
    ):
        Predictor(exported)


TELEMETRY = """
import sys
from flawmask.inference.exported import without_telemetry
without_telemetry()
import openvino, nncf
from nncf.telemetry import telemetry
assert sys.modules["openvino_telemetry"] is None
assert "Mock" in type(telemetry).__name__ or "Mock" in str(telemetry), telemetry
"""


def test_openvino_and_nncf_report_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("CI", None)
    subprocess.run([sys.executable, "-c", TELEMETRY], check=True, env=environment)
    assert not list(tmp_path.glob("intel*"))


def test_compare_takes_an_export_as_one_more_column(exported: Path, run: Path, tmp_path: Path) -> None:
    from flawmask.comparison.config import CompareConfig
    from flawmask.comparison.entry import SharedData
    from flawmask.comparison.exports import check_exports, evaluate_export
    from flawmask.comparison.speed import _load

    config = CompareConfig(
        dataset_dir=run / "data", archs="maskrcnn_resnet18_fpn", baselines="none", weights="none",
        exports=str(exported), overlays=0, resamples=20, conf="auto",
    )  # fmt: skip
    assert config.every_name == ("maskrcnn_resnet18_fpn", exported.name)
    shared = SharedData((run / "data",), (run / "data",), ("val", "test"), pooled=False)
    check_exports(config, shared)
    before = sorted(path.name for path in exported.iterdir())
    entry = evaluate_export(config, shared, tmp_path, exported.name)
    assert sorted(path.name for path in exported.iterdir()) == before
    assert (tmp_path / exported.name / "model.threshold.json").is_file()
    metrics = read_json(tmp_path / str(entry.results) / "metrics.json")
    assert metrics["split"] == "test"
    assert entry.checkpoint_bytes == (exported / "model.onnx").stat().st_size
    timed = _load(replace(config, device="cuda", precision="bf16"), entry.name, tmp_path / str(entry.checkpoint))
    (prediction,) = timed([np.zeros((60, 80, 3), dtype=np.uint8)])
    assert (prediction.height, prediction.width) == (60, 80)
    with pytest.raises(FlawmaskError, match="there is no such folder"):
        replace(config, exports=str(tmp_path / "nothing"))
    with pytest.raises(FlawmaskError, match="is a folder, but no exported model"):
        replace(config, exports=str(run / "data"))
    with pytest.raises(FlawmaskError, match="leave out --folds"):
        replace(config, folds=3)


def test_compare_refuses_a_damaged_export_or_one_of_other_classes_before_it_writes(
    copied: Path, run: Path, tmp_path: Path
) -> None:
    from flawmask.comparison.compare import compare
    from flawmask.comparison.config import CompareConfig

    (tmp_path / "other").mkdir()
    other = data_set(tmp_path / "other" / "data")
    for path in other.rglob("annotations.json"):
        path.write_text(path.read_text().replace("scratch", "dent"))
    config = CompareConfig(
        dataset_dir=other, archs="maskrcnn_resnet18_fpn", baselines="none", weights="none", exports=str(copied),
        epochs=1, output_dir=tmp_path / "comparison",
    )  # fmt: skip
    with pytest.raises(FlawmaskError, match="knows the classes good, crack, scratch"):
        compare(config)
    (copied / "model.onnx").write_bytes(b"")
    with pytest.raises(FlawmaskError, match=r"model\.onnx is damaged"):
        compare(replace(config, dataset_dir=run / "data"))
    assert not (tmp_path / "comparison").exists()


def test_odd_images_are_proven_in_tiles_if_the_network_sees_tiles() -> None:
    numbers = np.zeros((150, 200), np.int32)
    numbers[20:25, 10:190] = 1
    numbers[140:143, 100] = 2
    (found,) = parity._predicted(Oracle(spec_for(64, 16)), [image_of(numbers)])
    assert found == detect(Oracle(spec_for(64, 16)), image_of(numbers))
    assert [one.area for one in found.instances] == [3, 900]
