"""TensorBoard's files and MLflow's database, read back with their own readers."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_read_back import names
from mlflow import MlflowClient
from mlflow.entities import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from flawmask.errors import FlawmaskError
from flawmask.images import write_png
from flawmask.training.trackers import ARTIFACTS, EXPERIMENT, track_run

PICTURE = np.arange(60 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 80, 3)


def epoch(number: int, **changes: Any) -> dict[str, Any]:
    figures = {"epoch": number, "train_loss": 2.5 / number, "loss_mask": 0.5, "val_loss": 1.5, "learning_rate": 0.25}
    return figures | {"seconds": 3.0, "images_per_second": 8.0, "segm_ap": 0.125 * number} | changes


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for name in ARTIFACTS:
        write_png(tmp_path / "my_run" / name, PICTURE)
    return tmp_path / "my_run"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database made by MLflow. Making one takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("mlflow") / "tracking.db"
    MlflowClient(f"sqlite:///{path.as_posix()}").search_experiments()
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """MLflow's client for reading the database."""
    shutil.copy(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(tmp_path / 'tracking.db').as_posix()}")
    return MlflowClient()


def only_run(client: MlflowClient) -> Run:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def test_without_a_tracker_nothing_is_recorded(tmp_path: Path) -> None:
    with track_run("none", tmp_path / "run", {}) as record:
        assert record is None
    assert names(tmp_path) == []


def test_tensorboard_has_each_metric_and_picture_of_each_epoch(run_dir: Path) -> None:
    with track_run("tensorboard", run_dir, {}) as record:
        assert record is not None
        for number in (1, 2, 3):
            record(epoch(number, val_loss=None if number == 2 else 1.5), {"3.png": PICTURE, "teil/ä.png": PICTURE})
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {
        "loss/train_loss": [(1, 2.5), (2, 1.25), (3, pytest.approx(2.5 / 3))],
        "loss/loss_mask": [(1, 0.5), (2, 0.5), (3, 0.5)],
        "loss/val_loss": [(1, 1.5), (3, 1.5)],
        "training/learning_rate": [(1, 0.25), (2, 0.25), (3, 0.25)],
        "training/seconds": [(1, 3), (2, 3), (3, 3)],
        "training/images_per_second": [(1, 8), (2, 8), (3, 8)],
        "validation/segm_ap": [(1, 0.125), (2, 0.25), (3, 0.375)],
    }
    assert events.Tags()["images"] == ["predictions/3.png", "predictions/teil/ä.png"]
    shown = events.Images("predictions/3.png")
    assert [(image.step, image.width, image.height) for image in shown] == [(1, 80, 60), (2, 80, 60), (3, 80, 60)]


def test_tensorboard_leaves_the_folder_alone_before_the_first_epoch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), track_run("tensorboard", tmp_path / "run", {}):
        raise ValueError("broken")
    assert names(tmp_path) == []


def test_mlflow_has_settings_metrics_and_pictures_of_a_finished_run(store: MlflowClient, run_dir: Path) -> None:
    with track_run("mlflow", run_dir, {"epochs": 2, "device": None, "anchor_sizes": [4, 5, 6, 7, 8]}) as record:
        assert record is not None
        assert only_run(store).info.status == "RUNNING"
        for number in (1, 2):
            record(epoch(number, val_loss=None if number == 2 else 1.5), {"teil/ä (3).png": PICTURE})
    run = only_run(store)
    assert (run.info.run_name, run.info.status) == ("my_run", "FINISHED")
    assert run.data.params == {"epochs": "2", "device": "None", "anchor_sizes": "[4, 5, 6, 7, 8]"}
    history = store.get_metric_history(run.info.run_id, "train_loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.5), (2, 1.25)]
    assert [metric.step for metric in store.get_metric_history(run.info.run_id, "val_loss")] == [1]
    assert set(run.data.metrics) == set(epoch(1)) - {"epoch"}
    assert {file.path for file in store.list_artifacts(run.info.run_id)} == {"images", *ARTIFACTS}
    drawn = [file.path for file in store.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert [path.split("+")[1:3] for path in sorted(drawn)] == [["step", "1"], ["step", "2"]]
    assert all("teil" in path for path in drawn)


def test_two_runs_share_the_experiment(store: MlflowClient, run_dir: Path) -> None:
    for _ in range(2):
        with track_run("mlflow", run_dir, {}):
            pass
    assert len(store.search_runs([only.experiment_id for only in store.search_experiments()])) == 2


@pytest.mark.parametrize("error", [FlawmaskError("the loss is nan"), KeyboardInterrupt()])
def test_an_error_fails_the_mlflow_run_and_is_raised(store: MlflowClient, run_dir: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, track_run("mlflow", run_dir, {}) as record:
        assert record is not None
        record(epoch(1), {})
        raise error
    assert caught.value is error
    assert only_run(store).info.status == "FAILED"
    assert only_run(store).data.metrics["train_loss"] == 2.5


def test_an_unusable_mlflow_store_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(FlawmaskError, match=r"http://127\.0\.0\.1:9 cannot be used: .*MLFLOW_TRACKING_URI") as caught:
        track_run("mlflow", run_dir, {}).__enter__()
    assert "\n" not in str(caught.value)


def test_later_mlflow_errors_are_logged_and_training_goes_on(
    store: MlflowClient, run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = []
    with track_run("mlflow", run_dir, {}) as record:
        assert record is not None
        record(epoch(1), {})
        (tmp_path / "tracking.db").write_bytes(b"no database any more" * 1000)
        record(epoch(2), {})
        told.append("went on")
    assert told
    warnings = [one.getMessage() for one in caplog.records if one.name.startswith("flawmask")]
    assert [warning.split(":")[0] for warning in warnings] == [
        "MLflow did not take epoch 2",
        "MLflow did not take the run's end",
    ]


CLOSED_WORLD = """
import sys
def refuse(event, arguments):
    is_inet = event == "socket.connect" and type(arguments[1]) is tuple
    if is_inet or event in ("socket.getaddrinfo", "socket.gethostbyname"):
        print("NETWORK", event, arguments, file=sys.stderr, flush=True)
sys.addaudithook(refuse)
from pathlib import Path
from flawmask.training.trackers import track_run
with track_run("mlflow", Path("my_run"), {"epochs": 1}) as record:
    record(%r, {})
"""


def outside_of_tests() -> Mapping[str, str]:
    """Return the environment without the variables by which MLflow notices a test. Then it would be silent anyway."""
    telling = ("MLFLOW", "PYTEST", "CI", "GITHUB", "DO_NOT_TRACK")
    return {name: value for name, value in os.environ.items() if not name.startswith(telling)}


@pytest.mark.slow
def test_mlflow_writes_its_default_database_without_network_access(run_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLOSED_WORLD % epoch(1)],
        cwd=run_dir.parent,
        env=outside_of_tests(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr
    assert {"mlflow.db", "mlruns"} <= set(names(run_dir.parent))
    read_back = only_run(MlflowClient(f"sqlite:///{(run_dir.parent / 'mlflow.db').as_posix()}"))
    assert read_back.info.status == "FINISHED"
    assert read_back.data.metrics["train_loss"] == 2.5
