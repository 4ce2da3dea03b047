"""Trainings on tiles: what `--tile auto` chooses and says, what the checkpoint keeps, and resuming to the bit."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stained_plates import CATEGORIES, make_dataset, make_split, part, same_weights, settings

from flawmask.coco import CocoSplit, annotation, write_split
from flawmask.comparison.config import CompareConfig
from flawmask.distributed import Processes
from flawmask.errors import FlawmaskError
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import evaluate
from flawmask.files import read_json
from flawmask.images import write_png
from flawmask.model import checkpoint
from flawmask.pipeline import run
from flawmask.settings import stage
from flawmask.stages import RunConfig
from flawmask.training.callbacks import Callback
from flawmask.training.config import TrainConfig
from flawmask.training.loop import train
from flawmask.training.setup import set_up
from flawmask.training.tile_choice import choose_tiles


def make_large(folder: Path, names: Sequence[str] = ("train", "val")) -> Path:
    """Write images of 144 x 144 pixels: four stained plates each, of which one is clean."""
    for first, name in enumerate(names):
        records: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(1, 4):
            corners = [part(10 * first + 4 * number + at) for at in range(3)]
            grey = np.full((72, 72, 3), 170, np.uint8)
            pixels = np.vstack((np.hstack((corners[0][0], grey)), np.hstack((corners[1][0], corners[2][0]))))
            write_png(folder / name / "images" / f"{number}.png", pixels)
            records.append({"id": number, "file_name": f"{number}.png", "width": 144, "height": 144})
            for (_, mask), (y, x) in zip(corners, ((0, 0), (72, 0), (72, 72)), strict=True):
                whole = np.zeros((144, 144), dtype=bool)
                whole[y : y + 72, x : x + 72] = mask
                annotations.append(annotation(whole, id=len(annotations) + 1, image_id=number, category_id=2))
        write_split(folder / name, records, annotations, CATEGORIES)
    return folder


def labelled(*defects: tuple[float, float, float], size: tuple[int, int] = (3000, 4000), images: int = 1) -> CocoSplit:
    """Return a split with defects of these widths, heights and areas."""
    records = [
        {"id": at, "image_id": 1, "category_id": 2, "bbox": [0, 0, wide, high], "area": area}
        for at, (wide, high, area) in enumerate(defects, start=1)
    ]
    every = tuple({"id": at, "height": size[0], "width": size[1]} for at in range(1, images + 1))
    of_image = {at: tuple(records) if at == 1 else () for at in range(1, images + 1)}
    return CocoSplit(Path("parts"), every, of_image, tuple(CATEGORIES))


class Interrupted(Callback):
    def on_epoch_end(self, run: Any, figures: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("defects", "size", "image_size", "tile", "overlap", "says"),
    [
        # 144 pixels are needed. On the whole image, 400 pixels shrink by 512 / 3000 in each direction.
        (
            [(20, 20, 400)] * 9,
            (3000, 4000),
            512,
            832,
            104,
            "--tile auto: 832. A tenth of the 9 defects have at most 400",
        ),
        ([(10, 10, 80)] * 9, (3000, 4000), 512, 512, 64, "--tile auto: 512."),  # never below its own resolution
        ([(10, 10, 80)] * 8 + [(150, 9, 900)] * 2, (3000, 4000), 512, 512, 150, "overlap by 150"),
        ([(200, 200, 30_000)], (3000, 4000), 512, "off", "auto", "--tile auto: off. A tenth of the 1 defects"),
        ([(9, 9, 60)], (500, 700), 512, "off", "auto", "off"),  # the images are not shrunk
        ([(90, 90, 4500)], (3000, 4000), 512, 2848, 356, "--tile auto: 2848"),
    ],
)
def test_auto_follows_from_the_sizes_of_defects_and_images_and_says_why(
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    defects: list[tuple[float, float, float]],
    size: tuple[int, int],
    image_size: int,
    tile: int | str,
    overlap: int | str,
    says: str,
) -> None:
    config = settings(tmp_path, tile="auto", image_size=image_size)
    with caplog.at_level(logging.INFO):
        chosen = choose_tiles(config, labelled(*defects, size=size))
    assert (chosen.tile, chosen.overlap) == (tile, overlap)
    assert says in caplog.text
    if tile == 512:
        assert "The network sees them at 512 pixels\n" in caplog.text
    elif isinstance(tile, int):
        assert f"--image_size {tile} would show them at their own resolution" in caplog.text


def test_a_tile_that_is_given_gets_an_overlap_that_suits_the_defects(tmp_path: Path) -> None:
    split = labelled(*[(30, 5, 90)] * 10, size=(400, 500))
    assert choose_tiles(settings(tmp_path, tile=128), split).overlap == 30
    assert choose_tiles(settings(tmp_path, tile=128, overlap=40), split).overlap == 40
    assert choose_tiles(settings(tmp_path, tile=128), labelled(size=(400, 500))).overlap == 16
    assert choose_tiles(settings(tmp_path), split).tile is None


@pytest.mark.parametrize(
    ("arch", "tile", "says"),
    [
        ("ssd300_vgg16", 128, "The network sees them at 300 pixels\n"),  # enlarged: its input has one size
        ("ssd300_vgg16", 400, "The network sees them at 300 pixels\n"),  # and --image_size cannot change that
        ("maskrcnn_resnet18_fpn", 128, "The network sees them at 128 pixels\n"),
        ("maskrcnn_resnet18_fpn", 400, "at 256 pixels: --image_size 400 would show them at their own resolution"),
    ],
)
def test_the_log_says_at_which_size_the_network_sees_tiles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, arch: str, tile: int, says: str
) -> None:
    with caplog.at_level(logging.INFO):
        choose_tiles(settings(tmp_path, arch=arch, tile=tile, image_size=256), labelled((30, 5, 90)))
    assert says in caplog.text


def test_tiles_that_do_not_fit_the_images_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    make_large(tmp_path / "data")
    with pytest.raises(
        FlawmaskError, match=r"--tile 200 is larger than every image of .*train \(the largest is 144x144"
    ):
        train(settings(tmp_path / "data", tile=200))
    with pytest.raises(FlawmaskError, match="--overlap is for tiles"):
        train(settings(tmp_path / "data", overlap=20))
    assert not (tmp_path / "run").exists()


class Together(Processes):
    """Processes of which only the main one is there."""

    def from_main(self, work: Any) -> Any:
        return work()


def test_processes_share_tiles_so_there_may_be_more_of_them_than_images(tmp_path: Path) -> None:
    make_large(tmp_path / "data", ["train"])
    whole = settings(tmp_path / "data", effective_batch_size=8)
    on_cpu: Any = (None, Together(0, 4), torch.device("cpu"), torch.float32, 0.0)
    with pytest.raises(FlawmaskError, match="4 processes cannot share a batch of 8 of 3 images"):
        set_up(whole, *on_cpu)
    assert set_up(replace(whole, tile=64), *on_cpu).images_per_epoch == 15
    with pytest.raises(FlawmaskError, match="20 processes cannot share a batch of 30 of 15 tiles"):
        set_up(replace(whole, tile=64, effective_batch_size=30), None, Together(0, 20), *on_cpu[2:])


def run_config(dataset: Path, **changes: Any) -> RunConfig:
    """Return the settings of `run` for a small training."""
    small = stage(RunConfig, settings(dataset), weights="none", resamples=0, overlays=0, skip_augment=True)
    return replace(small, output_dir=dataset.parent / "run", **changes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tile_from": "coarse"}, "--tile_from coarse is for tiles: give their side with --tile"),
        ({"overlap": 40}, "--overlap is for tiles: give their side with --tile"),
    ],
)
def test_settings_of_tiles_for_a_training_without_tiles_are_refused_before_anything_is_made(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(FlawmaskError, match=message):
        RunConfig(dataset_dir=tmp_path, **given)
    with pytest.raises(FlawmaskError, match=message):
        CompareConfig(dataset_dir=tmp_path, **given)
    RunConfig(dataset_dir=tmp_path, skip_train=True, **given)  # the checkpoint may have tiles
    RunConfig(resume=tmp_path, **given)
    if "overlap" in given:
        with pytest.raises(FlawmaskError, match=message):
            TrainConfig(dataset_dir=tmp_path, output_dir=tmp_path, **given)


def test_after_auto_chose_no_tiles_the_run_is_evaluated_on_whole_images(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    (finished,) = run(run_config(tmp_path / "data", tile="auto", overlap=40, tile_from="coarse"))
    assert finished.metrics is not None
    assert [finished.metrics[name] for name in ("tile", "overlap", "tile_from")] == [None, 0, "all"]


def test_after_a_training_on_tiles_smaller_validation_images_are_evaluated_in_the_same_tiles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_large(tmp_path / "data", ["train"])
    make_split(tmp_path / "data" / "val", range(100, 102))
    (finished,) = run(run_config(tmp_path / "data", tile=96, overlap=20, tile_from="coarse"))
    assert finished.metrics is not None
    assert [finished.metrics[name] for name in ("tile", "overlap", "tile_from")] == [96, 20, "coarse"]
    assert re.search("2 of 2 images of .*val are smaller than a tile of 96 pixels", caplog.text)


@pytest.mark.slow
def test_the_folds_of_a_cross_validation_are_evaluated_with_the_tiles_that_auto_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the folds are written to datasets/
    make_dataset(tmp_path / "data")
    config = run_config(tmp_path / "data", tile="auto", overlap=40, tile_from="coarse", folds=2)
    (finished,) = run(config)
    assert finished.metrics is not None


@pytest.mark.slow
def test_a_training_on_tiles_resumes_to_the_bit_and_its_checkpoint_is_evaluated_in_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_large(tmp_path / "data")
    with caplog.at_level(logging.INFO):
        expected = train(settings(tmp_path / "data", epochs=2, tile=64, select_by="f1"))
    assert (
        "an epoch shows 15 tiles, drawn anew each time, of 3 images that 27 tiles cover: 9 with a defect" in caplog.text
    )
    _, spec = checkpoint.load(expected.run_dir / "best.pt")
    assert (spec.tile, spec.overlap, spec.image_size) == (64, 23, 64)
    assert read_json(expected.run_dir / "config.json")["settings"]["tile"] == 64
    with pytest.raises(KeyboardInterrupt):
        config = settings(tmp_path / "data", epochs=2, tile=64, select_by="f1", output_dir=tmp_path / "stopped")
        train(config, callbacks=[Interrupted()])
    again = train(settings(tmp_path / "data", resume=tmp_path / "stopped"))
    assert same_weights(again.run_dir / "last.pt", expected.run_dir / "last.pt")
    plain = train(settings(tmp_path / "data", epochs=2, output_dir=tmp_path / "plain"))
    assert not same_weights(plain.run_dir / "last.pt", expected.run_dir / "last.pt")
    assert checkpoint.load(plain.run_dir / "last.pt")[1].tile is None
    evaluation = EvaluateConfig(
        model=again.run_dir / "best.pt", dataset_dir=tmp_path / "data", device="cpu", resamples=0
    )
    metrics = evaluate(evaluation).metrics
    assert [metrics[name] for name in ("tile", "overlap", "tile_from")] == [64, 23, "all"]
    with pytest.raises(FlawmaskError, match=r"--tile 200 is larger than every image of .*val"):
        evaluate(replace(evaluation, tile=200))


@pytest.mark.slow
def test_a_training_on_tiles_stops_and_resumes_within_an_epoch(tmp_path: Path) -> None:
    make_large(tmp_path / "data", ["train"])
    expected = train(settings(tmp_path / "data", tile=64, train_augment="light", workers=1))

    class Saved(Callback):
        def on_begin(self, run: Any) -> None:
            raise KeyboardInterrupt

    config = settings(
        tmp_path / "data", tile=64, train_augment="light", save_every="3", output_dir=tmp_path / "stopped", workers=1
    )
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Saved()])  # the first save, after three steps, begins the run folder
    again = train(settings(tmp_path / "data", resume=tmp_path / "stopped"))
    assert same_weights(again.run_dir / "last.pt", expected.run_dir / "last.pt")
