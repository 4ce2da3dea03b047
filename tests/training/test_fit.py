"""The micro-batch size fits into memory, and the image size into a time budget."""

import json
import math
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stained_plates import light, make_dataset, settings

from flawmask.coco import CocoSplit, read_split
from flawmask.distributed import Processes
from flawmask.errors import FlawmaskError
from flawmask.model.weights import Pretrained
from flawmask.training import fit
from flawmask.training.clock import Clock
from flawmask.training.fit import Trial, image_size_for, largest_micro_batch
from flawmask.training.loader import Augmenting, SplitDataset
from flawmask.training.loop import train
from flawmask.training.step import Step

NOTHING = Pretrained({}, "group", None, "no pretrained weights")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four training images and two validation images."""
    return make_dataset(tmp_path / "data")


def trial(dataset: Path, training: CocoSplit | None = None, **changes: Any) -> Trial:
    split = training or read_split(dataset, "train")
    return Trial(settings(dataset, **changes), split, NOTHING, torch.device("cpu"), torch.float32)


@pytest.mark.services
def test_less_memory_means_a_smaller_micro_batch(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = trial(dataset)
    monkeypatch.setattr(fit, "_current_memory", lambda: 10**9)
    monkeypatch.setattr(fit, "_peak_memory", lambda: 10**9 + 10**8)
    found = []
    for free in (10**12, 10**9, 4 * 10**8, 10**8, 1):
        monkeypatch.setattr(fit, "free_memory", lambda free=free: free)
        found.append(largest_micro_batch(tried, 64, 16))
    assert found == [16, 8, 3, 1, 1]


def test_unknown_free_memory_means_the_largest_micro_batch(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "free_memory", lambda: 0)
    assert largest_micro_batch(trial(dataset), 64, 5) == 5


def test_the_memory_of_an_image_is_measured(dataset: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux says it")
    fit._release_memory(torch.device("cpu"))
    before = fit._current_memory()
    taken = torch.ones(50_000_000)
    del taken
    assert fit._peak_memory() - before > 150_000_000
    assert fit.free_memory() > 0


@pytest.mark.slow
def test_the_memory_of_an_image_does_not_depend_on_earlier_trials(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux says it")
    tried = trial(dataset)
    monkeypatch.setattr(fit, "free_memory", lambda: 10**10)
    alone = largest_micro_batch(tried, 256, 1000)
    fit._seconds_per_image(tried, 256, 4, 4)
    assert largest_micro_batch(tried, 256, 1000) < 2 * alone


def test_a_trial_leaves_the_random_state_as_it_was(dataset: Path) -> None:
    before = torch.get_rng_state()
    tried = trial(dataset)
    largest_micro_batch(tried, 64, 2)
    fit._seconds_per_image(tried, 64, 2, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trial_network_is_freed_afterwards(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = trial(dataset)
    made: list[weakref.ref[Any]] = []
    step = Trial.step

    def stepping(self: Trial, *inputs: Any) -> Any:
        one = step(self, *inputs)
        made.append(weakref.ref(one.model.backbone.body.conv1))
        return one

    monkeypatch.setattr(Trial, "step", stepping)
    largest_micro_batch(tried, 64, 2)
    fit._seconds_per_image(tried, 64, 2, 2)
    assert [one() for one in made] == [None, None]


def sized(split: CocoSplit, height: int, width: int, count: int = 100, variants: int = 0) -> CocoSplit:
    """Return the split with `count` images of that size, `variants` of which are augmented from others."""
    images: list[dict[str, Any]] = [
        {"id": number, "file_name": f"{number}.png", "height": height, "width": width} for number in range(count)
    ]
    for image in images[:variants]:
        image["augmentation"] = "flip_h"
    return replace(split, images=tuple(images), annotations=dict.fromkeys(range(count), ()))


def linear_in_pixels(monkeypatch: pytest.MonkeyPatch, constant: float, each: float, reading: float = 0.0) -> list[int]:
    """Make a step take `constant` seconds per image plus `each` per pixel, and reading an image `reading` seconds.

    Return the list of sizes that are tried."""
    tried: list[int] = []

    def seconds(_: Trial, image_size: int, *__: int) -> float:
        tried.append(image_size)
        return constant + each * image_size**2

    monkeypatch.setattr(fit, "_seconds_per_image", seconds)
    monkeypatch.setattr(fit, "_seconds_to_read", lambda *_: reading)
    return tried


def test_the_largest_image_size_that_still_shows_images_often_enough_is_chosen(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear_in_pixels(monkeypatch, 0.01, 1e-6)
    split = sized(read_split(dataset, "train"), 900, 1200)
    tried = trial(dataset, split, image_size=800)
    views = fit.MIN_VIEWS[False]  # more than 30 passes over a hundred images
    chosen = []
    for seconds in (60, 300, 600, 1000, 2000, 4000, 8000, 10**6):
        found = image_size_for(tried, seconds, 4, 4)
        chosen.append(found)
        allowed = (1 - fit.OVERHEAD) * seconds / views
        fits = [size for size in [*range(128, 800, 32), 800] if 0.01 + 1e-6 * size**2 <= allowed]
        assert found == max(fits, default=128)
    assert chosen == sorted(chosen), "more time, smaller images"
    assert (chosen[0], chosen[-1]) == (128, 800)
    assert len(set(chosen)) > 4


@pytest.mark.parametrize(
    ("height", "width", "image_size", "expected"),
    [(900, 1200, 500, 500), (300, 2000, 800, 320), (320, 320, 800, 320), (72, 72, 800, 96), (900, 900, 64, 64)],
)
def test_without_small_defects_the_chosen_size_exceeds_neither_the_images_nor_image_size(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, height: int, width: int, image_size: int, expected: int
) -> None:
    linear_in_pixels(monkeypatch, 0.0, 1e-9)
    split = sized(read_split(dataset, "train"), height, width)
    assert image_size_for(trial(dataset, split, image_size=image_size), 10**6, 4, 4) == expected


@pytest.mark.parametrize(
    ("side", "image_size", "expected"),
    [(6, 800, 480), (9, 800, 448), (12, 800, 320), (40, 800, 320), (6, 400, 400)],
)
def test_images_with_small_defects_are_enlarged_until_the_network_sees_enough_of_them(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, side: int, image_size: int, expected: int
) -> None:
    """The network needs 144 pixels of a defect: 12 x 12. A hundred images of 320 pixels have a square defect each."""
    linear_in_pixels(monkeypatch, 0.0, 1e-9)
    read = read_split(dataset, "train")
    defect = next(one for image in read.images for one in read.defects(image))
    square = {**defect, "area": side**2, "bbox": [0, 0, side, side]}
    split = replace(sized(read, 320, 320), annotations=dict.fromkeys(range(100), (square,)))
    assert image_size_for(trial(dataset, split, image_size=image_size), 10**6, 4, 4) == expected


@pytest.mark.parametrize(("workers", "at_most"), [(0, 128), (4, 256)])
def test_time_to_read_counts_as_well(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, workers: int, at_most: int
) -> None:
    split = sized(read_split(dataset, "train"), 900, 900)
    seconds = 0.066 * fit.MIN_VIEWS[False] / (1 - fit.OVERHEAD)  # 0.066 s per image: 256 pixels, if nothing is read
    linear_in_pixels(monkeypatch, 0.0, 1e-6)
    assert image_size_for(trial(dataset, split, workers=workers, image_size=800), seconds, 4, 4) == 256
    linear_in_pixels(monkeypatch, 0.0, 1e-6, reading=0.05)
    assert image_size_for(trial(dataset, split, workers=workers, image_size=800), seconds, 4, 4) < 256
    on_gpu = replace(trial(dataset, split, workers=workers, image_size=800), device=torch.device("cuda"))
    assert image_size_for(on_gpu, seconds, 4, 4) == at_most


def test_images_are_read_as_the_training_reads_them(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached, uncached = trial(dataset), trial(dataset, cache_gb=0.0)
    shown: list[str] = []

    def slow(image: Any, masks: Any, names: list[str], _: Any) -> Any:
        shown.append("image")
        return image, masks, names

    augmented = replace(cached, augmenting=Augmenting(slow, 0))
    assert fit._seconds_to_read(cached, 64) == 0
    assert fit._seconds_to_read(uncached, 64) > 0
    assert fit._seconds_to_read(augmented, 64) > 0
    timed = min(fit.TIMED_IMAGES, len(augmented.training.images))
    assert len(shown) == 2 * timed  # the second pass finds the images in the cache
    decoded: list[Path] = []
    read = SplitDataset._read_original

    def counting(self: SplitDataset, place: int) -> Any:
        decoded.append(self.split.image_path(self.split.images[place]))
        return read(self, place)

    monkeypatch.setattr(SplitDataset, "_read_original", counting)
    for kept, times in ((cached, 1), (uncached, 2)):
        decoded.clear()
        fit._seconds_to_read(replace(kept, augmenting=Augmenting(slow, 0)), 64)
        assert len(decoded) == times * timed


@pytest.mark.parametrize("arch", ["maskrcnn_resnet18_fpn", "ssd300_vgg16"])
def test_a_budget_of_one_and_a_half_passes_is_refused(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    linear_in_pixels(monkeypatch, 0.1, 0.0)
    split = sized(read_split(dataset, "train"), 900, 900, 100)
    one = trial(dataset, split, arch=arch)
    with pytest.raises(FlawmaskError, match=r"--time_budget: .* the 100 training images 1\.5 times.* Give at least 1m"):
        image_size_for(one, 15 / (1 - fit.OVERHEAD), 4, 4)
    with pytest.raises(FlawmaskError, match=r"0\.0 times"):
        image_size_for(one, -1.0, 4, 4)
    assert image_size_for(one, 31 / (1 - fit.OVERHEAD), 4, 4)
    many = replace(one, training=sized(split, 900, 900, 10**5))
    assert image_size_for(many, 0.11 * fit.MIN_VIEWS[False] / (1 - fit.OVERHEAD), 4, 4), "enough, in a tenth of a pass"


def test_variants_of_a_photograph_count_as_the_photograph(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear_in_pixels(monkeypatch, 0.0, 1e-6)
    split = read_split(dataset, "train")
    photographs = trial(dataset, sized(split, 900, 900, 300), image_size=800)
    variants = trial(dataset, sized(split, 900, 900, 300 * 7, 300 * 6), image_size=800)
    alone = trial(dataset, sized(split, 900, 900, 300 * 7), image_size=800)
    found = [image_size_for(one, 3000.0, 4, 4) for one in (photographs, variants, alone)]
    assert found[0] == found[1] > found[2]


def test_only_two_sizes_are_timed(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = linear_in_pixels(monkeypatch, 0.01, 1e-6)
    image_size_for(trial(dataset, sized(read_split(dataset, "train"), 900, 900), image_size=800), 100.0, 4, 4)
    assert tried == [128, 256]


def test_trials_use_the_images_that_need_most_memory(dataset: Path) -> None:
    split = sized(read_split(dataset, "train"), 100, 100, 3)
    split.images[1]["width"] = 160
    assert trial(dataset, split).largest_images(64, 5)[0] == 1
    assert sorted(trial(dataset, split).largest_images(64, 3)) == [0, 1, 2]
    assert len(trial(dataset, split).largest_images(64, 5)) == 5


@pytest.mark.slow
def test_batch_size_auto_means_four_images_a_step_in_the_largest_micro_batches_that_fit(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "_current_memory", lambda: 10**9)
    monkeypatch.setattr(fit, "_peak_memory", lambda: 10**9 + 10**8)
    monkeypatch.setattr(fit, "free_memory", lambda: 3 * 10**8)
    done = train(settings(dataset, batch_size="auto"))
    written = json.loads((done.run_dir / "config.json").read_text())
    assert (written["images_at_once"], written["images_per_step"]) == (2, 4)
    assert written["model"]["norm"] == "group", "two images are too few for the statistics of a batch"


@pytest.mark.slow
def test_a_time_budget_chooses_the_image_size_by_trials(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "MIN_PASSES", 0)  # the machine may be slow
    done = train(settings(dataset, time_budget="6s", image_size=800))
    written = json.loads((done.run_dir / "config.json").read_text())
    assert written["model"]["image_size"] == 96  # the images have 72 pixels
    assert len(done.history["epoch"]) >= 1


def test_a_time_budget_decides_when_training_ends(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "image_size_for", lambda *_: 64)
    taken: list[float] = []
    plain = Step.__call__

    def stepping(self: Any, *inputs: Any, **more: Any) -> Any:
        found = plain(self, *inputs, **more)
        taken.append(self.optimizer.param_groups[0]["lr"])
        return found

    monkeypatch.setattr(Step, "__call__", stepping)
    done = train(light(dataset, epochs=10**6, time_budget="5s"))
    rates = done.history["learning_rate"]
    assert taken[0] == pytest.approx(0.01 * 0.0005), "the first step is taken at the rate of the last of a warm-up"
    top = taken.index(max(taken))
    assert 1 <= top <= 0.5 * len(taken)  # a tenth of the time; the first step is slow, and others may be slow too
    assert len(rates) >= 1
    assert rates[-1] < 0.3 * max(0.0005, *rates), "it did not end with the rate that a training ends with"
    assert done.history["epoch"] == list(range(1, len(rates) + 1))
    assert all(math.isfinite(value) for value in done.history["train_loss"])


def test_a_budget_shorter_than_an_epoch_ends_within_it(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "image_size_for", lambda *_: 64)
    progress = iter([0.0, 0.5, 1.2, 1.3, 1.4, 1.5])
    monkeypatch.setattr(Clock, "progress", lambda *_: next(progress))
    done = train(light(dataset, time_budget="1h", batch_size=1))
    assert done.history["epoch"] == [1]
    assert done.history["images_per_second"][0] == pytest.approx(2 / done.history["seconds"][0])


def test_progress_is_measured_in_steps_or_in_time() -> None:
    by_steps = Clock(8, None)
    assert [by_steps.progress(taken, Processes()) for taken in (0, 2, 8)] == [0, 0.25, 1]
    by_time = Clock(None, 100.0, before=60.0)
    assert by_time.progress(5, Processes()) == pytest.approx(0.6, abs=0.05)
    assert by_time.seconds == pytest.approx(60, abs=5)


def test_time_before_the_first_step_does_not_count_as_progress() -> None:
    begun = time.perf_counter() - 40
    clock = Clock(None, 100.0, begun=begun)
    assert clock.progress(0, Processes()) == 0, "there would be no warm-up"
    assert clock.before_steps == pytest.approx(40, abs=5)
    clock.begun = begun - 30
    assert clock.progress(1, Processes()) == pytest.approx(0.5, abs=0.05)
    clock.begun = begun - 60
    assert clock.progress(2, Processes()) >= 1
    assert clock.seconds == pytest.approx(100, abs=5)
    late = Clock(None, 30.0, begun=begun)
    assert late.progress(0, Processes()) == 0
    assert late.progress(1, Processes()) >= 1
