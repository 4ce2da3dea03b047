"""The code in docstrings, README and `examples/` runs, and docs/api.md agrees with the docstrings."""

import doctest
import json
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_network import SPEC, network, patchwork
from stained_plates import make_dataset, part

from flawmask.images import read_image, write_png
from flawmask.inference.config import PredictConfig
from flawmask.inference.predict import predict
from flawmask.model import checkpoint

pytestmark = pytest.mark.usefixtures("small_network", "undrawn")

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    **{"arch": "maskrcnn_resnet18_fpn", "image_size": 64, "epochs": 1, "device": "cpu", "workers": 0},
    **{"proposals": 30, "roi_samples": 16, "weights": "none"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a checkpoint `best.pt`, an image `part.png` and others in `frames`."""
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "best.pt", network(), SPEC)
    write_png(tmp_path / "part.png", patchwork(60, 90))
    for seed in range(3):
        write_png(tmp_path / "frames" / f"{seed}.png", patchwork(60, 90, seed))
    return tmp_path


@pytest.mark.parametrize("module", ["flawmask", "flawmask.prediction", "flawmask.inference.predictor"])
def test_examples_in_docstrings_give_what_they_say(module: str) -> None:
    result = doctest.testmod(import_module(module))
    assert result.failed == 0
    assert result.attempted > 2 or module != "flawmask.prediction"


def test_the_python_of_the_readme_runs(folder: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    make_dataset(folder / "parts_coco")
    own: dict[str, Any] = {"grey_array": np.zeros((40, 50), np.uint8), "tensor": torch.zeros(3, 40, 50)}
    own |= {"bgr_frame": patchwork(60, 90)}
    for block in blocks:
        shortened = block.replace("epochs=20", ", ".join(f"{name}={value!r}" for name, value in SMALL.items()))
        exec(compile(shortened, "README.md", "exec"), own)
    assert (folder / "run" / "best.pt").is_file()


def test_a_network_is_trained_and_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(folder / "parts_coco")
    example = runpy.run_path(str(ROOT / "examples" / "train_and_evaluate.py"))
    example["main"]("parts_coco", "run", **SMALL)
    printed = capsys.readouterr().out
    assert printed.startswith("epoch 1: loss ")
    assert "accuracy: " in printed
    assert printed.endswith(f"look at {Path('run/inference_val/report.html')}\n")


def test_frames_are_evaluated_as_they_come(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "predict_frames.py"))["main"]("best.pt", "frames")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["frame 0", "frame 1", "frame 2"]
    rejected = [number for number, line in enumerate(lines) if ", score " in line]
    assert all("good" not in lines[number] for number in rejected)
    assert rejected
    assert sorted(folder.glob("frame_*.png")) == [folder / f"frame_{number}.png" for number in rejected]


def test_predictions_are_read_and_shown_by_other_tools(folder: Path) -> None:
    pytest.importorskip("supervision", reason="supervision is not installed")
    write_png(folder / "frames" / "plate.png", part(3)[0])
    predict(PredictConfig(model=Path("best.pt"), input=("frames",), conf=0.3, device="cpu"))
    runpy.run_path(str(ROOT / "examples" / "show_predictions.py"))["main"]("predictions", "shown")
    content = json.loads((folder / "predictions" / "predictions.json").read_text())
    defective = [Path(one["file"]) for one in content["images"] if one["instances"]]
    assert defective
    assert {path.name for path in (folder / "shown").iterdir()} == {path.name for path in defective}
    for path in defective:
        assert (read_image(folder / "shown" / path.name) != read_image(path)).any()


def test_no_example_is_long() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 40


def test_the_api_docs_agree_with_the_docstrings() -> None:
    pytest.importorskip("griffe2md", reason="griffe2md is not installed")
    (modules,) = re.findall(r"^API := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    code = f"from griffe2md import main; [main(['flawmask.' + name]) for name in {modules.split()!r}]"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert made == (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), "run make docs"
