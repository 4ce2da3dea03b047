"""Measure seconds per image, from pixels to predictions. All models run in one process and take turns, so that noise of
the machine affects all of them alike."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask import images
from flawmask.coco import CocoSplit
from flawmask.comparison import baseline
from flawmask.comparison.config import BASELINES, CompareConfig
from flawmask.comparison.contender import begin
from flawmask.comparison.entry import Entry
from flawmask.comparison.exports import ON_CPU
from flawmask.data import intensity
from flawmask.files import write_json
from flawmask.images import Levels
from flawmask.inference.backend import detect, prepared
from flawmask.inference.exported import is_export
from flawmask.inference.predictor import load
from flawmask.prediction import post_process
from flawmask.progress import track
from flawmask.runtime import choose_device, on_device

log = logging.getLogger(__name__)

Image = npt.NDArray[np.uint8]

NAME = "speed.json"

BATCHES = (1, 8)
"""The batch sizes that are timed."""

MAX_ROUNDS, MAX_SECONDS, MIN_ROUNDS = 100, 30.0, 5
"""Each model is timed for at most so many rounds, and for about so many seconds; but for at least so many rounds."""

MAX_BYTES = 500 * 2**20
"""The most memory for the images to time with."""

Predict = Callable[[Sequence[Image]], Any]


def main(
    config: CompareConfig,
    folder: Path,
    entries: Sequence[Entry],
    split: CocoSplit,
    *,
    is_shown: bool,
    has_details: bool,
) -> None:
    """Time all models that have a checkpoint and write `speed.json`: the main function of a process."""
    begin(is_shown=is_shown, has_details=has_details)
    with on_device(choose_device(config.device)):
        _time_all(config, folder, entries, split)


def _time_all(config: CompareConfig, folder: Path, entries: Sequence[Entry], split: CocoSplit) -> None:
    models: dict[str, Predict] = {}
    failed: dict[str, Any] = {}
    for one in entries:
        try:
            models[one.name] = _load(config, one.name, folder / str(one.checkpoint))
        except Exception as error:  # a library may raise anything for a bad file or too little memory
            failed[one.name] = _reason(one.name, error)
    levels = intensity.of_dataset(config.intensity, [split])
    write_json(folder / NAME, measure(models, _images(split, levels)) | failed)


def _reason(name: str, error: Exception, where: str = "") -> dict[str, str]:
    text = f"{where}{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    log.warning("%s cannot be timed: %s", name, text)
    return {"reason": text}


def _load(config: CompareConfig, name: str, path: Path) -> Predict:
    """Return a function that runs a model on a batch of images, as `predict` does: network and masks."""
    if name in BASELINES:
        return baseline.load(config, name, path)
    backend = load(path, replace(config, **ON_CPU) if is_export(path) else config)

    def predict(batch: Sequence[Image]) -> Any:
        """Return the predictions for a batch, as `Predictor` computes them."""
        if backend.spec.tile is not None:
            return [detect(backend, pixels) for pixels in batch]
        detections = backend.infer([prepared(pixels, backend) for pixels in batch])
        classes, join = backend.spec.classes, backend.spec.join
        pairs = zip(detections, batch, strict=True)
        return [post_process(one, classes, *pixels.shape[:2], join=join) for one, pixels in pairs]

    return predict


def _images(split: CocoSplit, levels: Levels) -> list[Image]:
    """Return images to time with. All have the most common size of the split, because a batch needs one size."""
    sizes = Counter((image["height"], image["width"]) for image in split.images)
    ((height, width), _), *_ = sizes.most_common(1)
    count = min(MAX_ROUNDS, max(BATCHES[-1], MAX_BYTES // (3 * height * width)))
    chosen = [image for image in split.images if (image["height"], image["width"]) == (height, width)][:count]
    return [images.read_image(split.image_path(image), levels) for image in chosen]


def measure(models: Mapping[str, Predict], pictures: Sequence[Image]) -> dict[str, dict[str, Any]]:
    """Return each model's seconds per image for each batch size.

    Args:
        models: the functions that run the models on a batch, by name.
        pictures: images of one size. They are used again where there are more rounds than images.

    Returns:
        For each model and each of `BATCHES`: `median` and `p99`, in seconds per image, and `rounds`, the number of
        batches that were timed. A model that failed has `reason`, and its times for smaller batches. The other models
        go on without it.
    """
    times: dict[str, dict[str, Any]] = {name: {} for name in models}
    for batch in BATCHES:
        taking_part = [name for name in models if "reason" not in times[name]]
        seconds: dict[str, list[float]] = {name: [] for name in taking_part}
        begun = time.perf_counter()
        for number in track(range(MAX_ROUNDS + 1), f"timing batches of {batch}"):
            chosen = [pictures[(number * batch + at) % len(pictures)] for at in range(batch)]
            first = number % max(1, len(taking_part))
            for name in taking_part[first:] + taking_part[:first]:  # each round starts with another model
                start = time.perf_counter()
                try:
                    models[name](chosen)
                except Exception as error:  # out of memory, say
                    times[name] |= _reason(name, error, f"in batches of {batch}: ")
                seconds[name].append((time.perf_counter() - start) / batch)
            taking_part = [name for name in taking_part if "reason" not in times[name]]
            if number >= MIN_ROUNDS and time.perf_counter() - begun > MAX_SECONDS * len(models):
                break
        for name in taking_part:
            timed = np.array(seconds[name][1:])  # the first round warms up
            times[name][str(batch)] = {
                "median": float(np.median(timed)),
                "p99": float(np.percentile(timed, 99, method="higher")),
                "rounds": len(timed),
            }
    return times
