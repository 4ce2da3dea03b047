"""The stages from Python: settings by name, typed results, and all public names."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import flawmask
from flawmask import api
from flawmask.data.prepare import PrepareConfig
from flawmask.errors import FlawmaskError


def test_every_name_is_there_and_listed() -> None:
    assert dir(flawmask) == sorted(flawmask.__all__)
    for name in flawmask.__all__:
        assert getattr(flawmask, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        flawmask.nothing  # noqa: B018
    stages = {name for name, one in vars(api).items() if callable(one) and one.__module__ == api.__name__}
    assert stages <= set(flawmask.__all__)


def test_importing_it_and_asking_for_errors_loads_no_torch() -> None:
    code = (
        "import sys, flawmask; flawmask.FlawmaskError, flawmask.prepare, dir(flawmask); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_errors_speak_of_arguments_and_on_the_command_line_of_flags(tmp_path: Path) -> None:
    code = """
import flawmask
for call in (
    lambda: flawmask.Predictor("best.pt", "tpu"),
    lambda: flawmask.predict(model="best.pt", input=("a.png",), conf=2.0),
    lambda: flawmask.evaluate(model="best.pt", dataset_dir="nowhere", conf="auto", min_area=-1),
):
    try:
        call()
    except flawmask.FlawmaskError as error:
        print(error)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[0].startswith("device='tpu' is not there: this machine has ")
    assert done.stdout.splitlines()[1:] == [
        "conf is 2.0: it must lie between 0 and 1, or be auto",
        "min_area is -1: it must be 0 or more",
    ]
    command = [sys.executable, "-m", "flawmask", "predict", "--model", "best.pt", "--input", "a.png", "--conf", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["error: --conf is 2.0: it must lie between 0 and 1, or be auto"],
    )


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("x.pt has no threshold: run flawmask evaluate --conf auto --min_area 3 first", None),
        (
            "lower --image_size; flawmask train --resume run continues",
            "lower image_size; flawmask train --resume run continues",
        ),
        ("--conf auto: there is no good image", "conf='auto': there is no good image"),
        ("--folds runs all stages: leave out --split", "folds runs all stages: leave out split"),
        ("a-b--c.png is no image", None),
    ],
)
def test_flags_stay_as_they_are_in_a_command_to_be_typed(
    written: str, read: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(FlawmaskError(written)) == written
    monkeypatch.setattr("flawmask.errors.is_own_process", lambda: False)
    assert str(FlawmaskError(written)) == (written if read is None else read)


def test_a_stage_takes_its_settings_by_name_or_as_one_object(
    tiny_category: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the doctor leaves its sheet
    root = tiny_category(good=6, crack=6).parent
    made = flawmask.prepare(category="part", mvtec_root=str(root), output_dir=str(tmp_path / "one"), seed=3)
    config = PrepareConfig(category="part", mvtec_root=root, output_dir=tmp_path / "other", seed=3)
    other = flawmask.prepare(config)
    assert (made.dataset_dir, other.dataset_dir) == (tmp_path / "one", tmp_path / "other")
    assert (made.train, made.val) == (other.train, other.val)
    report = flawmask.doctor(dataset_dir=str(tmp_path / "one"))
    assert sum(count.images for count in report.counts) == 12
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        flawmask.prepare(category="part", colour="red")
    with pytest.raises(FlawmaskError):
        flawmask.prepare(category="nothing", mvtec_root=str(root))
