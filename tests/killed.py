"""Kills stages of the pipeline at random moments: `python killed.py TASK FOLDER KILLS SEED` prints the outcome.

Each attempt is a fork of this process, which has imported everything: so the moments lie in the work, not in imports.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet  # noqa: F401 - a fork would import it each time
import torch
from files_read_back import names
from random_network import SPEC, network
from small_network import put_in_place
from stained_plates import light, make_dataset
from undrawn import REAL, STUBS, patched

from flawmask.data.augment import AugmentConfig, augment
from flawmask.data.demo import DemoConfig, generate
from flawmask.data.prepare import PrepareConfig, prepare
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import evaluate
from flawmask.files import sha256
from flawmask.inference.archive import predict_records
from flawmask.inference.config import PredictConfig
from flawmask.inference.predict import predict
from flawmask.model import checkpoint
from flawmask.training.config import TrainConfig
from flawmask.training.loop import train

SPEC_OF_TWO = replace(SPEC, classes=("good", "defect"), max_detections=5)
TIMES = {"elapsed", "seconds", "images_per_second", "waiting"}


def train_on(folder: Path) -> None:
    """Train, or resume the training that is there."""
    if (folder / "run" / "config.json").is_file():
        train(TrainConfig(resume=folder / "run"))
    else:
        changes: dict[str, Any] = {"epochs": 3, "save_every": "1", "ema": True, "norm": "batch", "overwrite": True}
        train(light(folder.parent / "data", output_dir=folder / "run", **changes))


def prepare_on(folder: Path) -> None:
    prepare(
        PrepareConfig(mvtec_root=folder.parent / "mvtec", category="demo", output_dir=folder / "out", overwrite=True)
    )


def augment_on(folder: Path) -> None:
    data = folder.parent / "data"
    augment(AugmentConfig(dataset_dir=data, output_dir=folder / "out", augmentation_factor=5, overwrite=True))


def evaluate_on(folder: Path) -> None:
    model, data = folder.parent / "model.pt", folder.parent / "data"
    evaluate(EvaluateConfig(model=model, dataset_dir=data, output_dir=folder / "out", device="cpu", split="train"))


def predict_on(folder: Path) -> None:
    inputs = (str(folder.parent / "data" / "train" / "images"),)
    predict(PredictConfig(model=folder.parent / "model.pt", input=inputs, output_dir=folder / "out", device="cpu"))


def records_on(folder: Path, kind: str) -> None:
    """Go on with rows for the images that a folder, a pattern or a list names."""
    images = folder.parent / "data" / "train" / "images"
    listed = folder.parent / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted(images.iterdir(), reverse=True)))
    inputs = {"folder": images, "pattern": images / "*.png", "list": f"@{listed}"}
    form: Any = "parquet" if kind == "folder" else "jsonl"
    where: dict[str, Any] = {"model": folder.parent / "model.pt", "output_dir": folder / "out", "device": "cpu"}
    predict_records(PredictConfig(input=(str(inputs[kind]),), records=form, rows_per_part=2, **where))


TASKS: dict[str, Callable[[Path], None]] = {
    "train": train_on,
    "prepare": prepare_on,
    "augment": augment_on,
    "evaluate": evaluate_on,
    "predict": predict_on,
    **{f"records of a {kind}": partial(records_on, kind=kind) for kind in ("folder", "pattern", "list")},
}
GOES_ON = ("train", *(name for name in TASKS if name.startswith("records")))
"""Tasks that go on where they were killed. The others begin again."""


def attempt(task: Callable[[Path], None], folder: Path, seconds: float | None) -> bool:
    """Run the task in a process that is killed after some seconds. Return whether it ended before."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        try:
            task(folder)
        except BaseException as error:
            print(f"failed: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if not os.WIFEXITED(status) or os.WEXITSTATUS(status):
                raise SystemExit(f"an attempt failed with status {status}")
            return True
        if end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.001)


def content_of(folder: Path, task: str) -> Any:
    """Return the output that must be the same with and without kills; None where there is none."""
    if task == "train":
        if not (folder / "run" / "last.pt").is_file():
            return None
        history = json.loads((folder / "run" / "history.json").read_text())
        weights = {
            name: sha256(b"".join(one.numpy().tobytes() for one in state_of(folder / "run" / name).values()))
            for name in ("best.pt", "last.pt")
        }
        return [{name: values for name, values in history.items() if name not in TIMES}, weights, names(folder / "run")]
    if not (folder / "out").exists():
        return None
    found = {}
    for path in sorted((folder / "out").rglob("*")):
        if path.is_file():
            # What holds seconds differs, and so does a page that shows them: that it is whole is seen by its end.
            timed = path.name in ("metrics.json", "report.html", "dataset_info.json", "augmentation_info.json")
            data = path.read_bytes()
            found[path.relative_to(folder / "out").as_posix()] = data[-2:].decode() if timed else sha256(data)
    return found


def state_of(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model_state_dict"]
    return state


def main() -> None:
    put_in_place()
    with patched(REAL if os.environ.get("TORTURE") else STUBS):
        kill_and_look()


def kill_and_look() -> None:
    name, base, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    make_dataset(base / "data", training=4 if name == "train" else 12)
    if name == "prepare":
        generate(DemoConfig(mvtec_root=base / "mvtec", image_size=64, good=8, defective=8, train_good=0))
    checkpoint.save(base / "model.pt", network(SPEC_OF_TWO), SPEC_OF_TWO)
    task, draw = TASKS[name], np.random.default_rng(seed)
    whole = base / "whole"
    begun = time.monotonic()
    attempt(task, whole, None)
    takes = time.monotonic() - begun
    expected = content_of(whole, name)
    killed, rounds, absent, complete, wrong = 0, 0, 0, 0, []
    while killed < kills:
        rounds += 1
        folder = base / f"round_{rounds}"
        while True:
            # Of a training, each attempt gets a little further.
            longest = 0.3 * takes if name == "train" else 1.1 * takes
            ended = killed >= kills or attempt(task, folder, draw.uniform(0, longest))
            killed += not ended
            found = content_of(folder, name) if name not in GOES_ON else None
            if name not in GOES_ON:
                absent, complete = absent + (found is None), complete + (found == expected)
                if found not in (None, expected):
                    wrong.append(f"round {rounds}: a mixture")
            if ended or name not in GOES_ON or killed >= kills:
                break
        attempt(task, folder, None)
        if content_of(folder, name) != expected:
            wrong.append(f"round {rounds}: another result")
        litter = [one for one in names(folder) if one.startswith(".")]
        wrong += [f"round {rounds}: {one} was left" for one in litter]
    print(json.dumps({"killed": killed, "rounds": rounds, "absent": absent, "complete": complete, "wrong": wrong}))


if __name__ == "__main__":
    main()
