"""The commands as a person types them in an empty folder. Some run as new processes, others in this process."""

import contextlib
import io
import json
import math
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from small_network import in_place

from flawmask.cli import main

# The pipeline that makes the workplace is a process of its own, in which all is real and all is drawn.
pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).parents[2]

SMALL = "--arch maskrcnn_resnet18_fpn --weights none --image_size 64 --proposals 50 --roi_samples 16".split()
LIGHT = "--arch ssdlite320_mobilenet_v3_large --weights none".split()
"""Settings with which a training takes seconds, or less. Other tests check whether a training learns."""

BLOCK_LABELS = ("Accuracy :", "Precision:", "Recall   :", "F1-Score :", "Defect detection rate:", "Composite:")

Run = Callable[..., subprocess.CompletedProcess[str]]


def run_in(folder: Path, *command: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`. A first word that ends in `.py` is a script at the root; any other is a subcommand."""
    first, *rest = map(str, command)
    program = [str(ROOT / first)] if first.endswith(".py") else ["-m", "flawmask", first]
    done = subprocess.run(
        [sys.executable, *program, *rest], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == status, f"{command}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def call_in(folder: Path, *command: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Do the same as `run_in` in this process: a new process needs seconds to import PyTorch."""
    out, err = io.StringIO(), io.StringIO()
    first, *rest = map(str, command)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        patch.chdir(folder)
        if first.endswith(".py"):
            patch.setattr(sys, "argv", [first, *rest])
            runpy.run_path(str(ROOT / first), run_name="__main__")
        else:
            patch.setattr(sys, "argv", ["flawmask", first, *rest])
            main()
    done = subprocess.CompletedProcess(command, int(stopped.value.code or 0), out.getvalue(), err.getvalue())
    assert done.returncode == status, f"{command}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize("command", ["run --help", "--version"])
def test_it_is_no_error_if_the_reader_of_the_output_ends_early(tmp_path: Path, command: str) -> None:
    """As in `flawmask run --help | head -3`."""
    program = [sys.executable, "-m", "flawmask", *command.split()]
    with subprocess.Popen(program, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.fixture
def small() -> Iterator[None]:
    """Replace the network of SMALL by a smaller one in this process, for a test that uses only its own run."""
    with in_place():
        yield


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small categories under datasets/mvtec. The pipeline has run on one of them."""
    folder = tmp_path_factory.mktemp("workplace")
    for category, seed in (("bottle", "0"), ("cable", "1")):
        counts = "--image_size 64 --good 4 --defective 2 --train_good 1".split()
        run_in(folder, "demo", "--mvtec_root", "datasets/mvtec", "--category", category, "--seed", seed, *counts)
    done = run_in(
        folder,
        "run_maskrcnn_pipeline.py",
        *"--category bottle --epochs 1 --augmentation_factor 1 --mvtec_root datasets/mvtec --train_ratio 0.8".split(),
        *"--batch_size 4 --lr 0.005 --conf 0.5 --device cpu".split(),
        *SMALL,
    )
    (folder / "first_run.txt").write_text(done.stdout + done.stderr)
    return folder


def evaluation(model: str | Path, dataset: str, *flags: str | Path) -> list[str | Path]:
    return ["evaluate", "--model", model, "--dataset_dir", dataset, *flags]


def runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("model_maskrcnn/maskrcnn_mvtec_*"))


@pytest.mark.slow
def test_the_pipeline_leaves_everything_where_the_readme_says(workplace: Path) -> None:
    run_dir = runs(workplace)[0]
    assert run_dir.name.removeprefix("maskrcnn_mvtec_").replace("_", "").isdigit()
    expected = {"best.pt", "last.pt", "history.json", "config.json", "inference_val"}
    expected |= {"curves.png", "labels.png", "train_batch.jpg", "training_images.json"}
    assert expected <= {path.name for path in run_dir.iterdir()}
    results = run_dir / "inference_val"
    assert {path.name for path in results.iterdir()} == {
        "metrics.json",
        "curves.json",
        "predictions.json",
        "predictions.csv",
        "overlays",
        "figures",
        "report.html",
    }
    for name in ("maskrcnn_mvtec_bottle", "maskrcnn_mvtec_bottle_augmented"):
        assert (workplace / "datasets" / name / "train" / "annotations.json").is_file()
    metrics = json.loads((results / "metrics.json").read_text())
    val = json.loads((workplace / "datasets/maskrcnn_mvtec_bottle/val/annotations.json").read_text())
    assert metrics["total_images"] == len(val["images"])
    assert len(list((results / "overlays").iterdir())) == len(val["images"])


@pytest.mark.slow
def test_the_pipeline_prints_the_metrics_and_where_to_look(workplace: Path) -> None:
    printed = (workplace / "first_run.txt").read_text()
    assert "OVERALL METRICS\n" + "=" * 60 in printed
    for label in BLOCK_LABELS:
        assert f"\n{label} " in printed
    assert str(runs(workplace)[0].relative_to(workplace)) in printed
    for stage in ("prepared", "augmented", "trained", "evaluated"):
        assert f"{stage} " in printed


@pytest.mark.services  # since it takes a minute
@pytest.mark.slow
def test_the_pipeline_runs_with_the_default_network_at_the_default_size(
    tmp_path: Path,
) -> None:
    """`run_maskrcnn_pipeline.py` with its default settings, except for one epoch and no downloaded weights."""
    drawn = "demo --mvtec_root mvtec --category nut --image_size 64 --good 3 --defective 1 --train_good 0"
    call_in(tmp_path, *drawn.split())
    flags = "--category nut --mvtec_root mvtec --epochs 1 --weights none --skip_augment"
    done = call_in(tmp_path, "run_maskrcnn_pipeline.py", *flags.split())
    assert "OVERALL METRICS" in done.stdout
    (run_dir,) = runs(tmp_path)
    written = json.loads((run_dir / "config.json").read_text())
    assert (written["model"]["arch"], written["model"]["image_size"]) == ("maskrcnn_resnet50_fpn", 800)
    history = json.loads((run_dir / "history.json").read_text())
    assert all(math.isfinite(values[0]) for name, values in history.items() if name.startswith("loss_"))
    metrics = json.loads((run_dir / "inference_val/metrics.json").read_text())
    assert metrics["total_images"] >= 1


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_five_scripts_work_with_the_flags_as_written(workplace: Path) -> None:
    prepare = "--mvtec_root datasets/mvtec --category bottle --output_dir datasets/own --train_ratio 0.5 --seed 0"
    call_in(workplace, "prepare_maskrcnn_dataset.py", *prepare.split())
    augment = "--dataset_dir datasets/own --output_dir datasets/own_more --augmentation_factor 3"
    call_in(workplace, "augment_maskrcnn_dataset.py", *augment.split())
    train = "--dataset_dir datasets/own_more --output_dir own_run --epochs 1 --batch_size 4 --lr 0.005 --device cpu"
    call_in(workplace, "train_maskrcnn.py", *train.split(), "--num_classes", "2", *SMALL)
    evaluate = "--model own_run/best.pt --dataset_dir datasets/own --split val --output_dir evaluated --conf 0.5"
    done = call_in(workplace, "inference_maskrcnn.py", *evaluate.split(), "--device", "cpu", "--num_classes", "2")
    assert done.stdout.startswith("OVERALL METRICS\n")
    assert (workplace / "evaluated/metrics.json").is_file()
    images = json.loads((workplace / "datasets/own_more/train/annotations.json").read_text())["images"]
    assert len(images) == 4 * sum("augmentation" not in image for image in images)


@pytest.mark.slow
def test_results_for_a_run_folder_go_inside_it(workplace: Path) -> None:
    run_dir = runs(workplace)[0]
    model, data = str(run_dir / "best.pt"), "datasets/maskrcnn_mvtec_bottle"
    evaluate = evaluation(model, data, "--split", "train", "--output_dir", run_dir)
    assert "images were used for training" in call_in(workplace, *evaluate, status=2).stderr
    call_in(workplace, *evaluate, "--allow_leak")
    assert (run_dir / "inference_train/metrics.json").is_file()


@pytest.mark.slow
def test_what_is_skipped_is_not_done_again(workplace: Path) -> None:
    before = runs(workplace)
    done = call_in(workplace, "run", "--category", "bottle", "--skip-prepare", "--skip_augment", "--skip-train")
    assert runs(workplace) == before
    assert "evaluating " in done.stderr
    assert "OVERALL METRICS" in done.stdout
    named = call_in(workplace, "run", "--category", "bottle", "--skip_train", "--model_dir", before[0])
    assert "reused datasets/maskrcnn_mvtec_bottle" in named.stderr
    assert "OVERALL METRICS" in named.stdout


@pytest.mark.slow
def test_training_alone_stops_before_inference(workplace: Path) -> None:
    before = runs(workplace)
    call_in(workplace, "run", "--category", "bottle", "--epochs", "1", "--skip_inference", *LIGHT)
    (new,) = set(runs(workplace)) - set(before)
    assert (new / "best.pt").is_file()
    assert not (new / "inference_val").exists()
    trained_on = json.loads((new / "config.json").read_text())["settings"]["dataset_dir"]
    assert trained_on == "datasets/maskrcnn_mvtec_bottle"


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_several_categories_end_with_a_table_and_one_that_fails_does_not_stop_the_others(workplace: Path) -> None:
    flags = "--epochs 1".split()
    done = call_in(workplace, "run", "--category", "all", *flags, *SMALL)
    assert "bottle" in done.stdout
    assert "cable" in done.stdout
    mask = next((workplace / "datasets/mvtec/cable/ground_truth").rglob("*_mask.png"))
    content = mask.read_bytes()
    try:
        mask.unlink()
        done = call_in(workplace, "run", "--category", "cable,bottle", *flags, *SMALL, status=2)
    finally:
        mask.write_bytes(content)
    assert "has no mask" in done.stderr
    assert "bottle: look at" in done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_cross_validation_evaluates_every_image_once_and_goes_on_where_it_stopped(workplace: Path) -> None:
    command = [
        "run",
        "--category",
        "cable",
        "--folds",
        "2",
        "--epochs",
        "1",
        "--skip_augment",
        "--resamples",
        "50",
        *SMALL,
    ]
    done = call_in(workplace, *command)
    (folder,) = workplace.glob("model_maskrcnn/*_folds")
    assert "Mean and spread of 2 folds: accuracy" in done.stdout
    assert "2-fold cross-validation: each image was evaluated with the one of 2 models" in done.stdout
    metrics = json.loads((folder / "inference_pooled/metrics.json").read_text())
    assert metrics["total_images"] == 12
    assert (folder / "inference_pooled/report.html").is_file()
    values = metrics["folds"]["accuracy"]["values"]
    by_fold = [json.loads((folder / f"fold_{fold}/inference_val/metrics.json").read_text()) for fold in (1, 2)]
    assert values == [one["accuracy"] for one in by_fold]
    right = sum(one["tp_defect"] + one["tn_good"] for one in by_fold)
    assert metrics["accuracy"] == pytest.approx(right / 12)

    state = json.loads((folder / "folds.json").read_text())
    assert state["done"] == [1, 2]
    older = {name: value for name, value in state["settings"].items() if name != "layout"}  # before there were any
    (folder / "folds.json").write_text(json.dumps(state | {"done": [1], "settings": older}))
    (folder / "fold_2/state.pt").unlink()  # as if the second training had been interrupted in its first epoch
    first, second = ((folder / f"fold_{fold}/best.pt").stat().st_mtime_ns for fold in (1, 2))
    again = call_in(workplace, *command)
    assert "fold 1 of 2 was finished before" in again.stderr
    assert (folder / "fold_1/best.pt").stat().st_mtime_ns == first
    assert (folder / "fold_2/best.pt").stat().st_mtime_ns > second
    assert list(workplace.glob("model_maskrcnn/*_folds")) == [folder]
    pooled = json.loads((folder / "inference_pooled/metrics.json").read_text())
    assert pooled["mask_ap"] == metrics["mask_ap"]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_run_goes_into_the_folder_that_is_named(workplace: Path) -> None:
    before = runs(workplace)
    command = ["run", "--category", "bottle", "--output_dir", "mine/run", "--epochs", "1", *SMALL]
    done = call_in(workplace, *command)
    assert "bottle: look at mine/run mine/run/inference_val/report.html" in done.stdout
    assert (workplace / "mine/run/best.pt").is_file()
    refused = call_in(workplace, *command, status=2)
    assert "mine/run already holds a run: name another folder, or replace it with --overwrite" in refused.stderr
    (workplace / "mine/run/old.txt").touch()
    call_in(workplace, *command, "--overwrite")
    assert not (workplace / "mine/run/old.txt").exists()
    assert (workplace / "mine/run/inference_val/report.html").is_file()
    assert runs(workplace) == before


@pytest.mark.services
@pytest.mark.usefixtures("small")
def test_a_cross_validation_goes_into_the_folder_that_is_named_and_goes_on_there(workplace: Path) -> None:
    before = runs(workplace)
    flags = "--category cable --folds 2 --output_dir mine/folds --resamples 50".split()
    command = ["run", *flags, *SMALL]
    call_in(workplace, *command, "--epochs", "1")
    best = workplace / "mine/folds/fold_1/best.pt"
    trained = best.stat().st_mtime_ns
    for again in ([*command, "--epochs", "1"], ["run", "--resume", "mine/folds"]):
        assert "fold 2 of 2 was finished before" in call_in(workplace, *again).stderr
    refused = call_in(workplace, *command, "--epochs", "2", status=2)
    assert "mine/folds holds a cross-validation with another --epochs: name another folder" in refused.stderr
    assert best.stat().st_mtime_ns == trained
    assert runs(workplace) == before


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_threshold_is_chosen_on_val_and_test_is_evaluated_with_it(workplace: Path) -> None:
    before = runs(workplace)
    drawn = "demo --mvtec_root others --category nut --image_size 64 --good 6 --defective 3 --train_good 0"
    call_in(workplace, *drawn.split())
    command = "run --category nut --mvtec_root others --train_ratio 0.5 --test_ratio 0.3 --epochs 1"
    done = call_in(workplace, *command.split(), "--conf", "auto", "--aim", "recall=0.9", *SMALL)
    (run_dir,) = set(runs(workplace)) - set(before)
    assert [path.name for path in workplace.glob("datasets/*nut*")] == ["maskrcnn_mvtec_nut"]  # no augmented folder
    kept = json.loads((run_dir / "best.threshold.json").read_text())
    on_test = json.loads((run_dir / "inference_test/metrics.json").read_text())
    assert (on_test["conf"], on_test["threshold"]["chosen_on"], on_test["split"]) == (kept["value"], "val", "test")
    assert not on_test["threshold"]["same_split"]
    assert json.loads((run_dir / "inference_val/metrics.json").read_text())["threshold"]["same_split"]
    assert f"{kept['value']:.3f} (chosen for recall=0.9 on" in done.stdout
    images = workplace / "others/nut/test/hole"
    predict: list[str | Path] = [
        "predict",
        "--model",
        run_dir / "best.pt",
        "--input",
        images,
        "--conf",
        "auto",
        "--output_dir",
        "found_auto",
    ]
    call_in(workplace, *predict)
    assert json.loads((workplace / "found_auto/predictions.json").read_text())["conf"] == kept["value"]


@pytest.mark.slow
def test_runs_are_set_side_by_side_on_one_page(workplace: Path) -> None:
    results = runs(workplace)[0] / "inference_val"
    (results / "report.html").unlink()
    assert "report.html" in call_in(workplace, "report", runs(workplace)[0]).stdout
    assert (results / "report.html").is_file()
    model, data = results.parent / "best.pt", "datasets/maskrcnn_mvtec_bottle"
    evaluate = evaluation(model, data, "--conf", "0.2", "--output_dir", "low")
    assert "McNemar's exact p" in call_in(workplace, *evaluate, "--against", results.parent).stdout
    call_in(workplace, "report", results, "low", "--output", "pages/both.html")
    page = (workplace / "pages/both.html").read_text()
    assert "F1" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_labelled_coco_folder_is_enough(workplace: Path) -> None:
    flags = "--dataset_dir datasets/maskrcnn_mvtec_bottle --epochs 1".split()
    done = call_in(workplace, "run", *flags, *SMALL)
    assert "OVERALL METRICS" in done.stdout


@pytest.mark.slow
def test_a_data_set_made_with_other_settings_is_refused_and_replaced_with_overwrite(workplace: Path) -> None:
    command = ["prepare", "--mvtec_root", "datasets/mvtec", "--category", "cable"]
    call_in(workplace, *command)
    assert "reused" in call_in(workplace, *command).stderr
    refused = call_in(workplace, *command, "--train_ratio", "0.6", status=2)
    assert "--overwrite" in refused.stderr
    replaced = call_in(workplace, *command, "--train-ratio", "0.6", "--overwrite")
    assert "prepared" in replaced.stderr


@pytest.mark.slow
def test_predict_writes_verdicts_and_ends_with_a_status_for_scripts(workplace: Path) -> None:
    model = runs(workplace)[0] / "best.pt"
    images = workplace / "datasets/mvtec/bottle/test/hole"
    always: list[str | Path] = ["predict", "--model", model, "--input", images, "--conf", "0"]
    call_in(workplace, *always, "--output_dir", "found")
    never: list[str | Path] = ["predict", "--model", model, "--input", images, "--conf", "1", "--fail_on_defect"]
    call_in(workplace, *never, "--output_dir", "found")
    verdicts = json.loads((workplace / "found/predictions.json").read_text())["images"]
    assert [record["verdict"] for record in verdicts] == ["good", "good"]
    (workplace / "broken.png").write_text("no image")
    pattern = str(images / "*.png")
    done = call_in(workplace, *always[:3], "--input", pattern, "broken.png", "--output_dir", "found", status=2)
    assert "broken.png cannot be read as an image" in done.stderr
    assert len(list((workplace / "found/overlays").iterdir())) == 2


@pytest.mark.slow
def test_help_explains_every_command() -> None:
    top = run_in(ROOT, "--help").stdout
    for command in (
        "run",
        "download",
        "prepare",
        "augment",
        "train",
        "evaluate",
        "predict",
        "report",
        "demo",
        "doctor",
    ):
        assert f"• {command} " in top
    shown = run_in(ROOT, "run", "--help").stdout
    for flag in ("--category", "--skip_augment", "--train_ratio", "--augmentation_factor", "--conf", "--device"):
        assert flag in shown


@pytest.mark.slow
def test_the_version_is_printed() -> None:
    assert run_in(ROOT, "--version").stdout.startswith("flawmask 0.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("prepare --category bottle --mvtec_root nowhere", "nowhere is not a folder"),
        ("prepare --category screw --mvtec_root datasets/mvtec", "it has bottle, cable"),
        ("prepare --category bottle --train_ratio 1", "--train_ratio is 1.0"),
        ("augment --dataset_dir datasets/maskrcnn_mvtec_bottle --augmentation_factor 7", "0 to 6"),
        ("train --dataset_dir datasets/maskrcnn_mvtec_bottle --output_dir new --device cuda:9", "cuda:9 is not there"),
        ("train --dataset_dir datasets/maskrcnn_mvtec_bottle --output_dir datasets", "datasets holds something else"),
        ("train --dataset_dir datasets/mvtec --output_dir new", "has no split train"),
        (
            "evaluate --model broken.pt --dataset_dir datasets/maskrcnn_mvtec_bottle",
            "broken.pt is not a file of weights",
        ),
        ("evaluate --model none.pt --dataset_dir datasets/maskrcnn_mvtec_bottle", "none.pt does not exist"),
        ("predict --model broken.pt --input nothing.png", "nothing.png"),
        ("run --epochs 3", "--category"),
        ("run --category screw --skip_prepare --skip_train", "run once without --skip_prepare"),
        ("run --dataset_dir datasets/maskrcnn_mvtec_bottle --split test", "has no split test"),
        ("train --dataset_dir datasets/maskrcnn_mvtec_bottle --output_dir new --weights gone.pt", "gone.pt: no such"),
        ("run --category bottle --epochs 0", "--epochs is 0"),
        ("run --category cable --test_ratio 0.2 --output_dir datasets", "datasets holds something else"),
        ("run --category cable --folds 3 --output_dir datasets", "datasets holds something else"),
        ("run --category bottle,cable --output_dir new", "--output_dir takes one category"),
        ("run --category bottle --skip_train --output_dir new", "leave it out with --skip_train"),
        ("compare --category cable --test_ratio 0.2 --output_dir datasets", "datasets holds something else"),
        ("run --category bottle --conf 1.5", "--conf is 1.5"),
        ("demo --image_size 10", "--image_size is 10: it must be 64 to"),
        ("doctor --category bottle --dataset_dir datasets", "not both"),
    ],
)
def test_bad_input_is_one_line_and_status_2_and_writes_nothing(
    workplace: Path, command: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "broken.pt").write_text("no checkpoint")
    before = sorted(workplace.rglob("*"))
    # In this process, since a new one needs seconds to import PyTorch; the tests above start real ones.
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", ["flawmask", *command.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert sorted(workplace.rglob("*")) == before


@pytest.mark.slow
def test_each_record_that_cannot_be_used_is_a_line(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workplace / "datasets/maskrcnn_mvtec_bottle", tmp_path / "set")
    path = tmp_path / "set/train/annotations.json"
    content = json.loads(path.read_text())
    first, second, *_ = content["annotations"]
    first["segmentation"], second["category_id"] = [[1, 1, 4, 4]], 9
    path.write_text(json.dumps(content))
    arguments = ["train", "--dataset_dir", str(tmp_path / "set"), "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["flawmask", *arguments, "--weights", "none"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.removeprefix(f"error: {path}: annotation ") for line in lines] == [
        f"{first['id']} has no usable segmentation: a polygon with 2 points",
        f"{second['id']} has category 9, which is not listed (1 good, 2 defect): add it to `categories`",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mask_of_another_size_stops_the_pipeline_before_anything_is_written(workplace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mvtec/part"
    for name, shape in (("test/good/000.png", (40, 40)), ("test/dent/000.png", (40, 40))):
        (folder / name).parent.mkdir(parents=True)
        cv2.imwrite(str(folder / name), np.zeros((*shape, 3), np.uint8))
    (folder / "ground_truth/dent").mkdir(parents=True)
    cv2.imwrite(str(folder / "ground_truth/dent/000_mask.png"), np.full((20, 30), 255, np.uint8))
    done = call_in(tmp_path, "run_maskrcnn_pipeline.py", "--category", "part", "--mvtec_root", "mvtec", status=2)
    assert "000_mask.png is 30x20 but its image is 40x40" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mvtec"]
