"""The distribution without PyTorch: its dependencies, and an environment that has nothing else."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from data_to_export import data_set
from packaging.requirements import Requirement
from served_by_command import served

from flawmask.cli import SERVER_PACKAGES

ROOT = Path(__file__).parents[2]
MB = 10**6

LIMITS = {"onnx": (200 * MB, 600 * MB), "openvino": (200 * MB, 700 * MB)}
"""The most bytes to download and on the disk. OpenVINO alone has 190 MB on the disk, most of it for other devices."""


def project(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return found


def test_it_needs_what_flawmask_needs_without_pytorch() -> None:
    whole, runtime = project(ROOT / "pyproject.toml"), project(ROOT / "runtime" / "pyproject.toml")
    without = [one for one in whole["dependencies"] if not one.startswith(("torch", "packaging"))]
    assert [one.removesuffix(",<4.13") for one in runtime["dependencies"]] == without
    extras = whole["optional-dependencies"]
    assert runtime["optional-dependencies"] == {name: extras[name] for name in ("onnx", "openvino", "serve")}
    packages = {Requirement(one).name for one in extras["serve"]}
    assert packages == set(SERVER_PACKAGES.split())
    for name in ("version", "license", "requires-python", "scripts"):
        assert runtime[name] == whole[name]


def extras_of(name: str) -> list[str]:
    """Return what an extra of the runtime's distribution installs."""
    found: list[str] = project(ROOT / "runtime" / "pyproject.toml")["optional-dependencies"][name]
    return found


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_one_pip_install_predicts_evaluates_and_serves_without_pytorch(runtime: Any, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    wheels, data = tmp_path / "wheels", data_set(tmp_path / "data")
    export = [sys.executable, str(Path(__file__).with_name("write_export.py")), runtime, str(data), str(tmp_path)]
    subprocess.run(export, check=True)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = tmp_path / "venv" / "lib"
    before = size_of(packages)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", f"{ROOT / 'runtime'}[{runtime}]", "-w", str(wheels)], check=True, env=environment)
    download, on_disk = LIMITS[runtime]
    assert size_of(wheels) <= download
    offline = ["install", "--no-index", "--find-links", str(wheels), f"flawmask-runtime[{runtime}]"]
    subprocess.run([*pip, *offline], check=True, env=environment)
    missing = subprocess.run([str(python), "-c", "import torch"], capture_output=True, check=False, env=environment)
    assert b"No module named 'torch'" in missing.stderr
    flawmask = [str(tmp_path / "venv" / "bin" / "flawmask")]
    model = ["--model", str(tmp_path / "exported")]
    images = ["--input", str(data / "test" / "images"), "--output_dir", str(tmp_path / "predictions")]
    subprocess.run([*flawmask, "predict", *model, *images], check=True, env=environment)
    of_split = ["--dataset_dir", str(data), "--split", "test", "--conf", "auto", "--output_dir", str(tmp_path / "out")]
    subprocess.run([*flawmask, "evaluate", *model, *of_split], check=True, env=environment)
    assert (tmp_path / "out" / "report.html").is_file()
    assert size_of(packages) - before <= on_disk
    print(
        f"{runtime}: {size_of(wheels) / MB:.0f} MB to download, {(size_of(packages) - before) / MB:.0f} MB on the disk"
    )
    subprocess.run([*pip, "install", *extras_of("serve")], check=True, env=environment)
    image = sorted((data / "test" / "images").glob("*.png"))[0].read_bytes()
    with served([*flawmask, "serve", *model], environment) as ask:
        status, answer = ask("POST", "/v1/predict", image)
    assert (status, len(answer["images"])) == (200, 1)
    assert answer["verdict"] in ("good", "defect")
