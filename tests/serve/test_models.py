"""Models are loaded, described, checked, and replaced without losing a request; a bad one never comes into use."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_network import SPEC, patchwork, random_network

from flawmask.errors import FlawmaskError
from flawmask.files import sha256_of, write_json
from flawmask.images import encode_png
from flawmask.inference import threshold
from flawmask.inference.threshold import Threshold
from flawmask.model import checkpoint
from flawmask.prediction import RawDetections
from flawmask.serve.config import ServeConfig
from flawmask.serve.models import figures_of, load, unsound
from flawmask.serve.server import serve
from serve.served import DEFECT, GOOD, Served, config_of, image, save_model, serving, until

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the files ten times as often."""
    monkeypatch.setattr("flawmask.serve.models.WATCH_SECONDS", 0.1)


def save_other(path: Path) -> None:
    """Replace a checkpoint by one with other weights, as a training does: written beside it, then renamed."""
    network = random_network(SPEC)
    with torch.no_grad():
        network.roi_heads.box_predictor.cls_score.weight *= 1.5
    checkpoint.save(path, network, SPEC)


def digest(served: Served) -> str:
    return str(served.get("/v1/model").json["sha256"])


def test_a_new_file_is_used_without_losing_a_request(tmp_path: Path) -> None:
    path = save_model(tmp_path / "best.pt")
    with serving(config_of(path, inference_batch_size=2)) as it:
        first, stop = digest(it), threading.Event()
        seen = set()

        def ask() -> int:
            count = 0
            while not stop.is_set():
                answer = it.predict(image())
                assert answer.status == 200, answer
                seen.add(answer.json["sha256"])
                count += 1
            return count

        with ThreadPoolExecutor(3) as pool:
            counts = [pool.submit(ask) for _ in range(3)]
            save_other(path)
            until(lambda: digest(it) != first)
            stop.set()
            assert all(one.result() > 0 for one in counts)
        assert digest(it) == sha256_of(path)
        assert it.predict(image()).json["sha256"] == sha256_of(path)
        assert seen <= {first, sha256_of(path)}
        assert it.metric("flawmask_model_loads_total", model=tmp_path.name, result="ok") == 2


def test_an_image_keeps_the_model_that_it_began_with(tmp_path: Path) -> None:
    path = save_model(tmp_path / "best.pt")
    with serving(config_of(path)) as it, ThreadPoolExecutor(1) as pool:
        first = digest(it)
        with it.held():
            asked = pool.submit(it.predict, image())
            until(lambda: len(it.server.batcher._waiting) == 1)
            save_other(path)
        until(lambda: digest(it) != first)
        assert asked.result().json["sha256"] == first


@pytest.mark.parametrize("fault", ["no checkpoint", "half", "no numbers", "gone"])
def test_a_bad_file_is_refused_and_the_model_in_use_stays(tmp_path: Path, fault: str) -> None:
    path = save_model(tmp_path / "best.pt")
    with serving(config_of(path)) as it:
        before = digest(it)
        if fault == "gone":
            path.unlink()
        elif fault == "no numbers":
            network = random_network(SPEC)
            with torch.no_grad():
                network.roi_heads.box_predictor.cls_score.weight[0, 0] = float("nan")
            checkpoint.save(path, network, SPEC)
        else:
            content = b"nothing" if fault == "no checkpoint" else path.read_bytes()[:-5000]
            path.with_suffix(".new").write_bytes(content)
            path.with_suffix(".new").replace(path)
        if fault == "gone":  # by itself that changes nothing
            it.call(it.server.models.replace_all())
        until(lambda: it.get("/v1/model").json["problem"])
        assert digest(it) == before
        assert it.predict(image()).json["verdict"] == "defect"
        assert it.metric("flawmask_model_loads_total", model=tmp_path.name, result="refused") == 1
        save_other(path)
        until(lambda: digest(it) == sha256_of(path))
        assert it.get("/v1/model").json["problem"] is None


def test_a_model_that_finds_nothing_on_a_known_defect_is_not_used(tmp_path: Path) -> None:
    path = save_model(tmp_path / "best.pt")
    (tmp_path / "defect.png").write_bytes(image(DEFECT))
    (tmp_path / "good.png").write_bytes(image(GOOD))
    with serving(config_of(path, check_image=tmp_path / "defect.png")) as it:
        assert it.predict(image()).json["verdict"] == "defect"
    with pytest.raises(FlawmaskError, match="finds no defect on --check_image"):
        serve(config_of(path, check_image=tmp_path / "good.png", port=it.port))


def test_the_check_image_of_a_camera_with_12_bits_is_seen_as_the_model_sees_it(tmp_path: Path) -> None:
    """Its score is 0.92 with the levels of 12 bits. With those of 16 it is nearly black, and its score is 0.88."""
    path = save_model(tmp_path / "best.pt", replace(SPEC, intensity=(0, 4095)))
    deep = encode_png(patchwork(60, 90, seed=3).astype(np.uint16) * 16)
    (tmp_path / "deep.png").write_bytes(deep)
    with serving(replace(config_of(path, check_image=tmp_path / "deep.png"), conf=0.9)) as it:
        assert it.predict(deep).json["verdict"] == "defect"
        save_model(path)
        until(lambda: it.get("/v1/model").json["problem"])
        assert "finds no defect on --check_image" in it.get("/v1/model").json["problem"]


def test_what_cannot_be_served_is_told_in_a_line_before_anything_is_served(tmp_path: Path) -> None:
    path = save_model(tmp_path / "best.pt")
    with serving(config_of(path)) as it:
        port = it.port
        with pytest.raises(FlawmaskError, match=f"--port {port} cannot be used"):
            serve(config_of(path, port=port))
    with pytest.raises(FlawmaskError, match="no threshold chosen"):
        serve(replace(config_of(path, port=port), conf="auto"))
    with pytest.raises(FlawmaskError, match=r"none\.pt"):
        serve(config_of(tmp_path / "none.pt", port=port))
    with pytest.raises(FlawmaskError, match=r"none\.png"):
        serve(config_of(path, port=port, check_image=tmp_path / "none.png"))


def test_the_chosen_threshold_is_used_and_how_it_was_chosen_is_said(tmp_path: Path) -> None:
    path = save_model(tmp_path / "best.pt")
    chosen = Threshold(0.9, "aim", "recall=0.99", "val", 30, (0.8, 0.95), chosen_by=("a",))
    threshold.save(chosen, path)
    with serving(replace(config_of(path), conf="auto")) as it:
        facts = it.get("/v1/model").json["threshold"]
        assert (facts["value"], facts["how"], facts["aim"], facts["chosen_on"]) == (0.9, "aim", "recall=0.99", "val")
        assert it.predict(image()).json["verdict"] == "good"  # its highest score is 0.82
        threshold.save(replace(chosen, value=0.8), path)  # the file beside the checkpoint is part of the model
        until(lambda: it.get("/v1/model").json["threshold"]["value"] == 0.8)
        assert it.predict(image()).json["verdict"] == "defect"


def test_figures_are_those_of_the_test_split_and_of_this_model_only(tmp_path: Path) -> None:
    path = save_model(tmp_path / "best.pt")
    own = sha256_of(path)
    rules = {"conf": 0.5, "min_area": 0, "join": "off", "tile": None, "overlap": 0, "tile_from": "all"}
    metrics = {"model_sha256": own, "total_images": 30, "image_auroc": 0.97, "mask_ap50": None, **rules}
    metrics |= {"intervals": {"image_auroc": [0.9, 1.0]}}
    assert figures_of(path, own, rules) is None
    for split in ("val", "test"):
        write_json(tmp_path / f"inference_{split}" / "metrics.json", metrics | {"split": split})
        found = figures_of(path, own, rules)
        assert found is not None
        assert found["split"] == split
        assert found["metrics"] == {"image_auroc": {"value": 0.97, "interval": [0.9, 1.0]}}
    assert figures_of(path, "another", rules) is None
    json.dumps(found, allow_nan=False)


AT_ANY_THRESHOLD = {"image_auroc", "mask_ap50", "pixel_aupro"}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, {"f1_score", "precision", "recall", "false_alarm_rate"} | AT_ANY_THRESHOLD),
        ({"conf": 0.9}, AT_ANY_THRESHOLD),
        ({"min_area": 50}, set()),
        ({"join": "touching"}, set()),
        ({"tile": 64}, set()),
    ],
)
def test_figures_are_said_only_if_they_hold_as_the_model_is_served(
    tmp_path: Path, changes: dict[str, Any], kept: set[str]
) -> None:
    path = save_model(tmp_path / "best.pt")
    names = ("f1_score", "precision", "recall", "false_alarm_rate", *AT_ANY_THRESHOLD)
    measured = {"conf": 0.8, "min_area": 0, "join": "off", "tile": None, "overlap": 0, "tile_from": "all"}
    metrics = {"model_sha256": sha256_of(path), "total_images": 30, **dict.fromkeys(names, 0.5), **measured}
    write_json(tmp_path / "inference_test" / "metrics.json", metrics)
    figures = load("plates", path, replace(config_of(path), **changes)).figures
    assert figures is not None
    assert set(figures["metrics"]) == kept
    assert figures["measured_with"] == measured
    assert set(changes) <= set(figures["differs"])
    assert bool(figures["differs"]) is bool(changes)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (("a/best.pt",), ["a"]),
        (("a/best.pt", "b/best.pt"), ["a", "b"]),
        (("bottle=a/best.pt", "cap=a/last.pt"), ["bottle", "cap"]),
    ],
)
def test_a_model_is_named_by_its_folder_or_as_one_says(given: tuple[str, ...], names: list[str]) -> None:
    assert list(ServeConfig(model=given).models) == names


@pytest.mark.parametrize("given", [("a/best.pt", "a/last.pt"), ("x y=a.pt",), ("=a.pt",), ("<b>=a.pt",), ()])
def test_names_that_cannot_be_used_are_refused(given: tuple[str, ...]) -> None:
    with pytest.raises(FlawmaskError, match="--model"):
        ServeConfig(model=given)


@pytest.mark.parametrize("text", ["5", "5 minutes", "-5ms", "", "11s", "ms"])
def test_a_wait_that_is_no_short_time_is_refused(text: str) -> None:
    with pytest.raises(FlawmaskError, match="--max_wait"):
        config_of("best.pt", max_wait=text)
    assert [config_of("a", max_wait=one).wait_seconds for one in ("5ms", "0.1s", "0ms")] == [0.005, 0.1, 0.0]


def test_numbers_that_are_none_are_seen_wherever_they_are() -> None:
    sound = RawDetections(np.ones((2, 4), np.float32), np.ones(2, int), np.full(2, 0.5, np.float32))
    assert unsound(sound) is None
    for one in fields(RawDetections):
        for wrong in (np.nan, np.inf):
            changed: dict[str, Any] = {one.name: np.full((2, 4, 4), wrong, np.float32)}
            assert unsound(replace(sound, **changed)) == f"{one.name} holds what is no number"
    assert unsound(replace(sound, scores=np.full(2, 1.5, np.float32))) == "a score lies outside 0 to 1"


def test_the_serve_package_loads_no_torch() -> None:
    code = "import flawmask.serve.server, sys; assert 'torch' not in sys.modules; print('none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "none\n", done.stderr
