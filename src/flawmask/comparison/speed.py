"""Seconds per image, from pixels to what was found: all models in one process, in turn, so that they share noise."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask import images
from flawmask.coco import CocoSplit
from flawmask.comparison import yardstick
from flawmask.comparison.config import YARDSTICKS, CompareConfig
from flawmask.comparison.contender import begin
from flawmask.comparison.entry import Entry
from flawmask.data import intensity
from flawmask.files import write_json
from flawmask.images import Levels
from flawmask.inference.backend import resized
from flawmask.inference.predictor import load
from flawmask.prediction import post_process
from flawmask.progress import track
from flawmask.runtime import choose_device, on_device

log = logging.getLogger(__name__)

Image = npt.NDArray[np.uint8]

NAME = "speed.json"

BATCHES = (1, 8)
"""How many images pass through at once."""

ROUNDS, MOST_SECONDS, FEWEST_ROUNDS = 100, 30.0, 5
"""Each model is timed in so many rounds, or for about so long; but in so many rounds at least."""

MOST_BYTES = 500 * 2**20
"""Of images that are held in memory meanwhile."""

Judge = Callable[[Sequence[Image]], Any]


def main(
    config: CompareConfig,
    folder: Path,
    entries: Sequence[Entry],
    split: CocoSplit,
    *,
    is_shown: bool,
    has_details: bool,
) -> None:
    """Time all models that have a checkpoint and write `speed.json`: the whole work of a process."""
    begin(is_shown=is_shown, has_details=has_details)
    with on_device(choose_device(config.device)):
        _time_all(config, folder, entries, split)


def _time_all(config: CompareConfig, folder: Path, entries: Sequence[Entry], split: CocoSplit) -> None:
    models: dict[str, Judge] = {}
    failed: dict[str, Any] = {}
    for one in entries:
        try:
            models[one.name] = _judge(config, one.name, folder / str(one.checkpoint))
        except Exception as error:  # whatever a library makes of a file or of too little memory
            failed[one.name] = _reason(one.name, error)
    levels = intensity.of_dataset(config.intensity, [split])
    write_json(folder / NAME, measure(models, _images(split, levels)) | failed)


def _reason(name: str, error: Exception, where: str = "") -> dict[str, str]:
    text = f"{where}{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    log.warning("%s cannot be timed: %s", name, text)
    return {"reason": text}


def _judge(config: CompareConfig, name: str, path: Path) -> Judge:
    """Return a function that does with a batch what `predict` does: network and masks."""
    if name in YARDSTICKS:
        return yardstick.load(config, name, path)
    backend = load(path, config)

    def judge(batch: Sequence[Image]) -> Any:
        found = backend.infer([resized(pixels, backend.spec) for pixels in batch])
        classes, join = backend.spec.classes, backend.spec.join
        pairs = zip(found, batch, strict=True)
        return [post_process(one, classes, *pixels.shape[:2], join=join) for one, pixels in pairs]

    return judge


def _images(split: CocoSplit, levels: Levels) -> list[Image]:
    """Return images of the size that most of them have, as many as are timed: a batch is of one size."""
    sizes = Counter((image["height"], image["width"]) for image in split.images)
    ((height, width), _), *_ = sizes.most_common(1)
    most = min(ROUNDS, max(BATCHES[-1], MOST_BYTES // (3 * height * width)))
    chosen = [image for image in split.images if (image["height"], image["width"]) == (height, width)][:most]
    return [images.read_image(split.image_path(image), levels) for image in chosen]


def measure(models: Mapping[str, Judge], pictures: Sequence[Image]) -> dict[str, dict[str, Any]]:
    """Return each model's seconds per image by the size of a batch.

    Args:
        models: functions that judge a batch, by name.
        pictures: images of one size; they come round again.

    Returns:
        For each name and each of `BATCHES`: `median` and `p99`, in seconds per image, and `rounds`, how many batches
        these are of. For one that failed at a batch, `reason`, and what it was timed at before; the others go on.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for batch in BATCHES:
        taking_part = [name for name in models if "reason" not in found[name]]
        seconds: dict[str, list[float]] = {name: [] for name in taking_part}
        begun = time.perf_counter()
        for number in track(range(ROUNDS + 1), f"timing batches of {batch}"):
            chosen = [pictures[(number * batch + at) % len(pictures)] for at in range(batch)]
            first = number % max(1, len(taking_part))
            for name in taking_part[first:] + taking_part[:first]:  # nobody always comes first
                start = time.perf_counter()
                try:
                    models[name](chosen)
                except Exception as error:  # out of memory, say
                    found[name] |= _reason(name, error, f"in batches of {batch}: ")
                seconds[name].append((time.perf_counter() - start) / batch)
            taking_part = [name for name in taking_part if "reason" not in found[name]]
            if number >= FEWEST_ROUNDS and time.perf_counter() - begun > MOST_SECONDS * len(models):
                break
        for name in taking_part:
            timed = np.array(seconds[name][1:])  # the first one warms up
            found[name][str(batch)] = {
                "median": float(np.median(timed)),
                "p99": float(np.percentile(timed, 99, method="higher")),
                "rounds": len(timed),
            }
    return found
