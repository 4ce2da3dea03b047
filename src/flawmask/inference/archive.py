"""`predict --records`: predict any number of images in flat memory, and write rows in parts. A killed run goes on."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from flawmask import remote
from flawmask.data import intensity
from flawmask.errors import FlawmaskError
from flawmask.files import (
    atomic_folder,
    check_output_folder,
    folder_lock,
    read_json,
    remove_partial_files,
    write_json,
)
from flawmask.inference import calibration, exported, records, threshold
from flawmask.inference.backend import Backend, Image
from flawmask.inference.calibration import Calibration
from flawmask.inference.config import PredictConfig
from flawmask.inference.inputs import shard_number, stream_images
from flawmask.inference.predictor import check_floor, load
from flawmask.inference.reading import Reader, read_region
from flawmask.inference.stream import NetworkOutput, predict_all
from flawmask.progress import track
from flawmask.settings import as_json, require
from flawmask.strips import StripImage

log = logging.getLogger(__name__)

MARKER = "records.json"
"""The file with what all rows share: the model, its classes, the threshold and other settings, the number of images."""

INPUTS = "inputs.jsonl"
"""The images, one path per line, as JSON text. Image k, from 0, is in part k // rows_per_part."""

NOT_PREDICTED = "not_predicted.jsonl"
"""The other files among the inputs, one per line, each with the reason."""

MAY_DIFFER = ("model", "input", "output_dir", "device", "inference_batch_size", "fail_on_defect", "ray")
"""Settings that may differ when a run goes on: the model is known by its SHA-256, and the images by their list."""


@dataclass(frozen=True)
class Recorded:
    """The result of `predict_records`.

    Attributes:
        output: the folder with the parts, `records.json`, `inputs.jsonl` and `not_predicted.jsonl`.
        images: the number of images, each a row.
        defective: the number of images with the verdict `defect`.
        good: the number of images with the verdict `good`.
        without_verdict: the number of images that could not be predicted; their rows have the reason.
        not_predicted: the number of other files among the inputs.
    """

    output: Path
    images: int
    defective: int
    good: int
    without_verdict: int
    not_predicted: int


def predict_records(config: PredictConfig) -> Recorded:
    """Predict all input images and write their rows. If an earlier run was interrupted, go on with it.

    The list of the images is written first. Each part holds the rows of a range of that list, and is there as a whole
    or not at all. So the parts that are missing say what is left to do.

    Raises:
        FlawmaskError: there is no image; the checkpoint or the region of interest cannot be used; the output folder
            holds something else, or the rows of other inputs or settings. Nothing is written then.
    """
    form = config.records or "jsonl"
    records.check_format(form)
    config = replace(config, model=exported.file_of(config.model))
    output = folder_of(config)
    check_output_folder(output, MARKER, overwrite=True, what="prediction")
    work = prepare_rows(config)
    with ExitStack() as stack:
        if config.ray is not None:
            from flawmask.inference.on_ray import connected, predict_on_ray

            stack.enter_context(connected(config.ray))
        begun = read_json(output / MARKER) if (output / MARKER).is_file() else _begin(config, output, work.rules)
        _check_same(begun, work.rules, output)
        parts = Parts(output, begun["images"], config.rows_per_part, form)
        stack.enter_context(folder_lock(output))
        remove_partial_files(output)
        counts = Counter(records.verdicts(parts.path(number) for number in parts.done()))
        if before := counts.total():
            log.info("%s: going on: %d of %d images are predicted already", output, before, parts.images)
        starts = list(parts.missing())
        if config.ray is None:
            for number in write_parts(work, parts, starts, config.inference_batch_size, parts.images - before):
                counts.update(records.verdicts([parts.path(number)]))
        elif starts:
            predict_on_ray(config, parts, starts)
            remove_partial_files(output)  # those of workers that died
            counts.update(records.verdicts(parts.path(number) for number, _ in starts))
    done = Recorded(output, parts.images, counts["defect"], counts["good"], counts[None], begun["not_predicted"])
    log.info(
        "predicted %d images: %d with defects, %d good, %d without a verdict; results in %s",
        *(done.images, done.defective, done.good, done.without_verdict, output),
    )
    if done.not_predicted:
        log.warning("%d other files were not predicted: %s names them", done.not_predicted, output / NOT_PREDICTED)
    work.reader.warn(parts.images - before)
    return done


def write_parts(
    work: "RowMaker",
    parts: "Parts",
    starts: Iterable[tuple[int, int]],
    batch_size: int | None,
    total: int | None = None,
) -> Iterator[int]:
    """Predict the images of some parts and write these. Yield the number of each that is written.

    Args:
        work: makes the rows.
        parts: the parts of the archive.
        starts: the parts to write, as `Parts.missing` yields them.
        batch_size: the largest batch; by default the backend's own.
        total: the number of images, for the progress bar.
    """
    items = (item for number, start in starts for item in parts.names(number, start))
    with closing(predict_all(work.backend, items, work.read, work.row, batch_size)) as predicted:
        for number, of_part in groupby(track(predicted, "predicting", total=total), key=itemgetter(0)):
            records.write_part(parts.path(number), [row for _, row in of_part])
            yield number


def folder_of(config: PredictConfig) -> Path:
    """Return the folder for the parts: a shard has one of its own, such as `shard-03-of-16`."""
    number, count = config.shard_of
    return config.output_dir if count == 1 else config.output_dir / f"shard-{number:0{len(str(count))}d}-of-{count}"


@dataclass(frozen=True)
class Parts:
    """The parts of a folder. Each holds the rows of a range of the list of images.

    Attributes:
        folder: where they are.
        images: the number of images.
        rows: the number of rows of each part; the last may have fewer.
        form: their format.
    """

    folder: Path
    images: int
    rows: int
    form: records.Format

    def path(self, number: int) -> Path:
        """Return the path of a part, from 0."""
        return self.folder / f"part-{number:06d}.{self.form}"

    def done(self) -> list[int]:
        """Return the numbers of the parts that are there."""
        return [number for number in range(-(-self.images // self.rows)) if self.path(number).is_file()]

    def missing(self) -> Iterator[tuple[int, int]]:
        """Yield the number of each part that is not there, and at which byte of the list its images begin."""
        done = frozenset(self.done())
        start = 0
        with (self.folder / INPUTS).open("rb") as file:
            for place, line in enumerate(file):
                number, row = divmod(place, self.rows)
                if row == 0 and number not in done:
                    yield number, start
                start += len(line)

    def names(self, number: int, start: int) -> Iterator[tuple[int, str]]:
        """Yield the images of a part that begin at a byte of the list, each with the number of the part."""
        with (self.folder / INPUTS).open("rb") as file:
            file.seek(start)
            for line in islice(file, self.rows):
                yield number, json.loads(line)


@dataclass(frozen=True)
class RowMaker:
    """Makes the rows of images.

    Attributes:
        backend: runs the network.
        reader: reads the images.
        conf: the threshold of the verdicts.
        min_area: defects with fewer pixels do not count for verdicts and scores.
        calibration: gives the probability of a defect; None without a calibration for this checkpoint.
        rules: all that two runs must share for their rows to belong together, as JSON values.
    """

    backend: Backend
    reader: Reader
    conf: float
    min_area: int
    calibration: Calibration | None
    rules: dict[str, Any]

    def read(self, item: tuple[int, str]) -> Image | StripImage:
        """Return an image. An item is the number of its part and its path."""
        return self.reader(item[1] if remote.is_address(item[1]) else Path(item[1]))

    def row(self, item: tuple[int, str], output: NetworkOutput | FlawmaskError) -> tuple[int, records.Row]:
        """Return the row of an image, with the number of its part."""
        if isinstance(output, FlawmaskError):
            return item[0], records.row(item[1], output, self.conf, self.min_area)
        prediction = replace(output.prediction(self.backend.spec), calibration=self.calibration)
        if self.reader.region is not None:
            prediction = prediction.within(self.reader.region)
        return item[0], records.row(item[1], prediction, self.conf, self.min_area)


def prepare_rows(config: PredictConfig) -> RowMaker:
    """Load the network and all else that rows need.

    Raises:
        FlawmaskError: the checkpoint or the region of interest cannot be used, or no threshold was chosen for it.
    """
    region = read_region(config.roi) if config.roi else None
    backend = load(config.model, config)
    spec = backend.spec
    tiles = spec.tiles_as_json
    conf = threshold.of(config.conf, config.model, config.min_area, tiles).value
    check_floor(backend, conf, config, config.model)
    stored = calibration.load(config.model, config.min_area, tiles)
    levels = spec.intensity if config.intensity is None else intensity.of_bits(int(config.intensity))
    settings = {name: value for name, value in as_json(config).items() if name not in MAY_DIFFER}
    rules = {
        "model_sha256": exported.digest_of(config.model),
        "classes": list(spec.classes),
        "finds": "masks" if spec.has_masks else "boxes",
        **{"conf": conf, "min_area": config.min_area, "join": spec.join, **tiles, "intensity": list(levels)},
        "calibration": None if stored is None else {"slope": stored.slope, "intercept": stored.intercept},
        "notes": exported.manifest_of(config.model).unproven_note if exported.is_export(config.model) else [],
        "settings": settings,
    }
    reader = Reader(config, spec, region, levels)
    return RowMaker(backend, reader, conf, config.min_area, stored, json.loads(json.dumps(rules)))


def _begin(config: PredictConfig, output: Path, rules: dict[str, Any]) -> dict[str, Any]:
    """Write the list of the images and what all rows share. Return the latter."""
    number, count = config.shard_of
    images = others = 0
    with ExitStack() as stack:
        folder = stack.enter_context(atomic_folder(output))
        listed, not_predicted = (stack.enter_context((folder / name).open("wb")) for name in (INPUTS, NOT_PREDICTED))
        for name, reason in track(stream_images(config.input, config.output_dir), "listing the images"):
            if shard_number(name, count) != number:
                continue
            if reason is None:
                images += 1
                listed.write(_line(name))
            else:
                others += 1
                not_predicted.write(_line({"file": name, "reason": reason}))
        begun = {"model": config.model.as_posix(), **rules, "images": images, "not_predicted": others}
        write_json(folder / MARKER, begun)
    return begun


def _line(value: Any) -> bytes:
    return f"{json.dumps(value, ensure_ascii=False)}\n".encode(errors="backslashreplace")


def _check_same(begun: Any, rules: dict[str, Any], output: Path) -> None:
    """Refuse to go on with another model or with other settings."""
    require(isinstance(begun, dict) and isinstance(begun.get("settings"), dict), f"{output / MARKER} is damaged")
    for before, now in ((begun["settings"], rules["settings"]), (begun, rules)):
        for name, value in now.items():
            require(
                before.get(name) == value,
                f"{output} was begun with {name} {before.get(name)!r}, and not {value!r}: give the same settings to go "
                "on, or name another --output_dir",
            )
