"""`compare` as a command, with real trainings of a few seconds: killed and resumed, models that fail, folds."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from sklearn.metrics import roc_auc_score
from small_network import STANDS_IN_FOR

from flawmask.comparison import compare as comparing
from flawmask.comparison import contender, speed
from flawmask.comparison.compare import compare
from flawmask.comparison.conclusions import Compared
from flawmask.comparison.config import CompareConfig
from flawmask.errors import FlawmaskError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

QUICK = Path(__file__).parents[1] / "quick_flawmask.py"
ARCHS, EPOCHS = ("yolo11n", "yolo11s", "yolo11n-seg"), 3


def command(mvtec_root: Path, weights: Path) -> list[str]:
    # A file of another network makes yolo11s fail; patchcore is left out.
    flags = f"--category plate --archs {','.join(ARCHS)} --epochs {EPOCHS} --batch_size 4 --workers 0"
    more = "--image_size 64 --device cpu --test_ratio 0.3 --conf auto --skip_augment --resamples 50 --overlays 0"
    given = ["--mvtec_root", str(mvtec_root), "--weights", f"none,yolo11s={weights}"]
    return [str(QUICK), "compare", *flags.split(), *more.split(), *given]


def wait_for(path: Path, pattern: str, process: "Forked | subprocess.Popen[str]", seconds: int = 300) -> Path:
    """Return the first file of the pattern, once it is there."""
    for _ in range(10 * seconds):
        if found := sorted(path.glob(pattern)):
            return found[0]
        assert process.poll() is None, "it ended before"
        time.sleep(0.1)
    raise AssertionError(f"no {pattern} after {seconds} s")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def scores_of(results: Path) -> tuple[list[bool], list[float]]:
    with (results / "predictions.csv").open(newline="", encoding="utf-8-sig") as lines:
        table = list(csv.DictReader(lines))
    return [row["truth"] == "defect" for row in table], [float(row["score"]) for row in table]


def test_a_killed_comparison_goes_on_and_a_model_that_fails_does_not_stop_the_others(
    mvtec_root: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "other.pth"
    torch.save({"stem.weight": torch.zeros(2, 2)}, weights)
    said = command(mvtec_root, weights)
    wide = {**os.environ, "COLUMNS": "200", "FORKED": "1"}
    process = Forked(said, wide, cwd=tmp_path)
    state = wait_for(tmp_path, "model_maskrcnn/*_comparison/yolo11n-seg/state.pt", process)
    process.kill()
    process.communicate(timeout=60)
    folder = state.parent.parent
    assert read(folder / "yolo11s.json")["failed"]
    assert not (folder / "yolo11n-seg.json").exists()
    finished = (folder / "yolo11n" / "best.pt").stat().st_mtime_ns

    again = Forked(said, wide, cwd=tmp_path)
    printed, _ = again.communicate(timeout=500)

    assert again.returncode == 2, printed  # yolo11s failed
    assert "continuing" in printed
    assert "yolo11n was finished before" in printed
    assert sorted(tmp_path.glob("model_maskrcnn/*")) == [folder]
    assert (folder / "yolo11n" / "best.pt").stat().st_mtime_ns == finished
    assert len(read(folder / "yolo11n-seg" / "history.json")["epoch"]) == EPOCHS
    content = read(folder / "comparison.json")
    assert list(content["models"]) == [*ARCHS, "efficientnet_lite0_classifier", "patchcore"]
    failed = content["models"]["yolo11s"]
    assert failed["failed"]
    assert "no tensor fits" in failed["reason"]
    assert not content["models"]["patchcore"]["failed"]
    assert "needs pretrained features" in content["models"]["patchcore"]["reason"]
    done = [name for name in content["models"] if name not in ("yolo11s", "patchcore")]
    assert set(content["seconds_per_image"]) == set(done)
    check_figures(folder, content, done)
    for text in (printed, (folder / "comparison.md").read_text(), (folder / "comparison.html").read_text()):
        assert "yolo11s failed: " in text
        assert all(name in text for name in (*done, "Image AUROC", "n/a"))


def check_figures(folder: Path, content: dict[str, Any], done: list[str]) -> None:
    """Check the comparison's metrics against the models' own metrics, and these against another implementation."""
    ranked = {one["figure"]: one for one in content["ranked"]}
    metrics = {name: read(folder / content["models"][name]["results"] / "metrics.json") for name in done}
    aurocs = {name: roc_auc_score(*scores_of(folder / content["models"][name]["results"])) for name in done}
    for name in done:
        assert metrics[name]["split"] == "test"
        assert metrics[name]["threshold"]["how"] == "aim"
        assert metrics[name]["image_auroc"] == pytest.approx(aurocs[name], abs=1e-6)
        assert {"accuracy", "image_auroc"} <= set(metrics[name]["intervals"])
    best = ranked["image_auroc"]["best"]
    assert ranked["image_auroc"]["value"] == pytest.approx(max(aurocs.values()))
    for one in ranked["image_auroc"]["others"]:
        assert one["value"] == pytest.approx(aurocs[best] - aurocs[one["name"]], abs=1e-6)
        assert one["interval"][0] <= one["value"] <= one["interval"][1]
    assert (ranked["mask_ap"]["best"], ranked["mask_ap"]["others"]) == ("yolo11n-seg", [])  # the other has n/a, not 0
    assert metrics["yolo11n"]["mask_ap"] is None
    boxes = {name: metrics[name]["box_ap"] for name in ("yolo11n", "yolo11n-seg")}
    assert ranked["box_ap"]["value"] == pytest.approx(max(boxes.values()))
    assert {tuple(scores_of(folder / content["models"][name]["results"])[0]) for name in done} == {
        tuple(scores_of(folder / content["models"]["yolo11n"]["results"])[0])
    }


@pytest.mark.parametrize(
    ("number", "is_spawned"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), pytest.param(signal.SIGINT, True, marks=pytest.mark.services)],
)
def test_after_a_signal_it_saves_and_ends_with_the_signals_status(
    mvtec_root: Path, tmp_path: Path, number: int, is_spawned: bool
) -> None:
    said = [*command(mvtec_root, Path("none")), "--baselines", "none"]
    for flag, value in {"--archs": STANDS_IN_FOR, "--weights": "none", "--workers": "1", "--epochs": "999"}.items():
        said[said.index(flag) + 1] = value
    process: Forked | subprocess.Popen[str]
    if is_spawned:  # as on macOS and Windows
        silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "text": True}
        process = subprocess.Popen([sys.executable, *said], cwd=tmp_path, start_new_session=True, **silent)
    else:
        process = Forked(said, os.environ | {"FORKED": "1"}, cwd=tmp_path)
    state = wait_for(tmp_path, f"model_maskrcnn/*_comparison/{STANDS_IN_FOR}/state.pt", process)
    os.killpg(process.pid, number)  # as Ctrl-C and schedulers do: all processes get it
    process.communicate(timeout=120)
    assert process.returncode == 128 + number
    entry = state.parent.parent / f"{STANDS_IN_FOR}.json"
    assert not entry.exists(), entry.read_text()
    assert not (state.parent.parent / "comparison.md").exists()


@pytest.fixture
def in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a comparison start no process: a new one needs seconds to import PyTorch. The tests above start real ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparing, "run_in_own_process", _here)
    monkeypatch.setattr(contender, "begin", lambda **_: None)
    monkeypatch.setattr(speed, "begin", lambda **_: None)
    monkeypatch.setattr(speed, "MAX_ROUNDS", speed.MIN_ROUNDS)


@pytest.mark.services
@pytest.mark.usefixtures("in_this_process", "small_network")
def test_a_comparison_goes_into_the_folder_that_is_named_and_goes_on_there(mvtec_root: Path, tmp_path: Path) -> None:
    named: dict[str, Any] = {"archs": STANDS_IN_FOR, "baselines": "none", "proposals": 30, "output_dir": Path("mine")}
    first = compare(quick(mvtec_root, **named))
    assert first.folder == Path("mine")
    assert {"comparison.html", "comparison.json", f"{STANDS_IN_FOR}.json"} <= {
        path.name for path in Path("mine").iterdir()
    }
    best = Path("mine", STANDS_IN_FOR, "best.pt")
    trained = best.stat().st_mtime_ns
    assert compare(quick(mvtec_root, **named)).body == first.body
    with pytest.raises(FlawmaskError, match="mine holds a comparison with another --epochs: name another folder"):
        compare(quick(mvtec_root, **named, epochs=3))
    assert best.stat().st_mtime_ns == trained
    compare(quick(mvtec_root, **named, overwrite=True))
    assert best.stat().st_mtime_ns > trained
    assert sorted(path.name for path in tmp_path.iterdir()) == ["datasets", "mine"]


@pytest.mark.services
@pytest.mark.usefixtures("in_this_process")
def test_with_folds_each_image_is_evaluated_by_a_model_that_was_not_trained_on_it(mvtec_root: Path) -> None:
    compared = _over_folds(mvtec_root)
    content = read(compared.folder / "comparison.json")
    assert not compared.failed
    truths = set()
    for name in ("yolo11n-seg", "efficientnet_lite0_classifier"):
        results = compared.folder / content["models"][name]["results"]
        metrics = read(results / "metrics.json")
        assert (metrics["split"], metrics["total_images"]) == ("pooled", 20)
        truths.add(tuple(scores_of(results)[0]))
    assert len(truths) == 1  # the same images in the same order
    before = (compared.folder / "yolo11n-seg" / "fold_2" / "best.pt").stat().st_mtime_ns
    assert _over_folds(mvtec_root).body == compared.body
    assert (compared.folder / "yolo11n-seg" / "fold_2" / "best.pt").stat().st_mtime_ns == before


def _here(work: Callable[..., None], *given: Any, **named: Any) -> int:
    work(*given, **named)
    return 0


def quick(mvtec_root: Path, **changes: Any) -> CompareConfig:
    """Return settings with which a model is trained in a moment."""
    settings: dict[str, Any] = {
        "category": "plate",
        "mvtec_root": mvtec_root,
        "weights": "none",
        "epochs": 2,
        "image_size": 64,
        "workers": 0,
        "device": "cpu",
        "skip_augment": True,
        "resamples": 50,
        "overlays": 0,
    }
    return CompareConfig(**(settings | changes))


def _over_folds(mvtec_root: Path) -> Compared:
    return compare(quick(mvtec_root, archs="yolo11n-seg", baselines="efficientnet_lite0_classifier", folds=2))
