"""`predict`: predict the defects on unlabelled images, and write the predictions."""

import logging
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flawmask import images
from flawmask.csv_tables import write_table
from flawmask.data import intensity
from flawmask.draw import PREDICTION, title_bar
from flawmask.errors import FlawmaskError
from flawmask.files import atomic_folder, check_output_folder, write_json
from flawmask.fonts import first_writable
from flawmask.inference import calibration, exported, preannotations, threshold
from flawmask.inference.calibration import Calibration
from flawmask.inference.config import PredictConfig
from flawmask.inference.inputs import find_images
from flawmask.inference.overlay import draw_instances, viewing_size
from flawmask.inference.predictor import check_floor, load
from flawmask.inference.reading import Reader, read_region
from flawmask.inference.stream import NetworkOutput, predict_all
from flawmask.masks import Mask
from flawmask.model.spec import ModelSpec
from flawmask.png_rows import write_mask
from flawmask.progress import track
from flawmask.settings import require
from flawmask.tally import tallies_to_dict, warn_of_unused

log = logging.getLogger(__name__)

ENTRIES = (
    *("predictions.json", "predictions.csv", "overlays", "masks"),
    *("preannotations.json", "preannotations.xml"),
)
MAX_LISTED = 20
"""The most files without a prediction that are named on the console. `predictions.json` names all of them."""
COLUMNS = (
    *("file", "verdict", "score", "instances", "defect_area_px", "defect_area_percent"),
    "defect_probability",
)


@dataclass(frozen=True)
class Predicted:
    """The result of `predict`.

    Attributes:
        output: the folder with `predictions.json`, `predictions.csv`, `overlays/` and perhaps `masks/`.
        defective: the files with a defect.
        good: the files without a defect.
        unreadable: the files that could not be read, each with the reason.
        not_predicted: the other files in the input folders, each with the reason.
    """

    output: Path
    defective: list[Path]
    good: list[Path]
    unreadable: dict[Path, str]
    not_predicted: dict[Path, str] = field(default_factory=dict)


def predict(config: PredictConfig) -> Predicted:
    """Find the defects on all input images and write the results.

    Files that cannot be read, and files in folders that are not predicted, are listed with the reason.

    Raises:
        FlawmaskError: there is no image at all; the checkpoint or the region of interest cannot be used; or the output
            folder holds something else. Nothing is written then.
        UnusedError: `strict` is on, and an image is not predicted or cannot be read. Nothing is written then.
    """
    require(config.records is None, "records is for flawmask.predict_records: predict writes pictures")
    config = replace(config, model=exported.file_of(config.model))
    check_output_folder(config.output_dir, "predictions.json", overwrite=True, what="prediction", entries=ENTRIES)
    inputs = find_images(config.input, config.output_dir)
    paths, tally = inputs.images, inputs.tally
    where = config.input[0] if len(config.input) == 1 else "--input"
    _list_others(inputs.not_predicted)
    if config.strict:
        warn_of_unused([tally], where, strict=True)
    region = read_region(config.roi) if config.roi else None
    backend = load(config.model, config)
    require(
        backend.spec.has_masks or not config.save_masks,
        f"--save_masks: {backend.spec.arch} predicts boxes and no masks",
    )
    tiles = backend.spec.tiles_as_json
    conf = threshold.of(config.conf, config.model, config.min_area, tiles).value
    check_floor(backend, conf, config, config.model)
    levels = backend.spec.intensity
    if config.intensity is not None:
        levels = intensity.of_images(config.intensity, paths, "--input")
    read = Reader(config, backend.spec, region, levels)
    records: list[dict[str, Any]] = []
    with atomic_folder(config.output_dir) as folder:
        for name in ("overlays", "masks") if config.save_masks else ("overlays",):
            (folder / name).mkdir()
        stored = calibration.load(config.model, config.min_area, tiles)
        job = _Job(config, backend.spec, conf, stored, region, folder, _unique_names(paths))
        written = predict_all(backend, paths, read, job.write, config.inference_batch_size)
        with closing(written):
            for record in track(written, "predicting", total=len(paths)):
                if "error" in record:
                    log.error("%s", record["error"])
                    tally.leave_out(record["file"], "unreadable")
                records.append(record)
        tally.used = sum("error" not in record for record in records)
        warn_of_unused([tally], where, strict=config.strict)
        others = [{"file": path.as_posix(), "reason": reason} for path, reason in inputs.not_predicted.items()]
        rules = {"conf": conf, "min_area": config.min_area, "join": backend.spec.join, **tiles}
        content = {**rules, "tally": tallies_to_dict([tally])}
        write_json(folder / "predictions.json", {**content, "images": records, "not_predicted": others})
        _write_table(folder / "predictions.csv", records)
        if config.preannotations is not None:
            classes = backend.spec.classes
            preannotations.write(folder, config.preannotations, records, classes, config.polygon_tolerance)
    by_path = dict(zip(paths, records, strict=True))
    defective = [path for path, record in by_path.items() if record.get("verdict") == "defect"]
    good = [path for path, record in by_path.items() if record.get("verdict") == "good"]
    unreadable = {path: record["error"] for path, record in by_path.items() if "error" in record}
    log.info(
        "predicted %d images: %d with defects, %d good, %d unreadable; results in %s",
        len(paths),
        len(defective),
        len(good),
        len(unreadable),
        config.output_dir,
    )
    read.warn(len(paths))
    return Predicted(config.output_dir, defective, good, unreadable, inputs.not_predicted)


def _list_others(not_predicted: dict[Path, str]) -> None:
    for path, reason in list(not_predicted.items())[:MAX_LISTED]:
        log.warning("%s: not predicted: %s", path.as_posix(), reason)
    if len(not_predicted) > MAX_LISTED:
        log.warning("%d more were not predicted: predictions.json names them", len(not_predicted) - MAX_LISTED)


@dataclass(frozen=True)
class _Job:
    """The work for each image after the network. Several threads do it.

    Attributes:
        config: the settings of the stage.
        spec: the specification of the network.
        conf: the verdict's threshold.
        calibration: gives the probability of a defect; None without a calibration for this checkpoint.
        region: the region of interest, (height, width) bool; None for the whole image.
        folder: where the results go.
        names: the name of the pictures for each image.
    """

    config: PredictConfig
    spec: ModelSpec
    conf: float
    calibration: Calibration | None
    region: Mask | None
    folder: Path
    names: dict[Path, str]

    def write(self, path: Path, output: NetworkOutput | FlawmaskError) -> dict[str, Any]:
        """Write the pictures of an image and return its record."""
        if isinstance(output, FlawmaskError):
            return {"file": path.as_posix(), "error": str(output)}
        prediction = replace(output.prediction(self.spec), calibration=self.calibration)
        if self.region is not None:
            prediction = prediction.within(self.region)
        limits = (self.conf, self.config.min_area)
        record: dict[str, Any] = {"file": path.as_posix(), **prediction.to_dict(*limits)}
        verdict = f"{record['verdict']} ({record['score']:.2f})"
        caption = first_writable(f"{path.name}: {verdict}", verdict)
        size = viewing_size(output.pixels)
        picture = title_bar(draw_instances(output.pixels, prediction.defects(*limits), PREDICTION, size), caption)
        record["overlay"] = f"overlays/{self.names[path]}"
        (self.folder / record["overlay"]).write_bytes(images.encode_png(picture))
        if self.config.save_masks:
            record["mask"] = f"masks/{self.names[path]}"
            if output.size is None:
                mask = prediction.defect_mask(*limits)
                (self.folder / record["mask"]).write_bytes(images.encode_png(mask.astype(np.uint8) * 255))
            else:
                write_mask(self.folder / record["mask"], prediction.defect_rle(*limits))
        return record


def _unique_names(paths: list[Path]) -> dict[Path, str]:
    """Return a unique PNG name for each image. Names that differ only in case count as equal."""
    taken: set[str] = set()
    names = {}
    for path in paths:
        name, number = f"{path.stem}.png", 2
        while name.lower() in taken:
            name, number = f"{path.stem}-{number}.png", number + 1
        taken.add(name.lower())
        names[path] = name
    return names


def _write_table(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a line for each image. An image that could not be read has the verdict `unreadable`."""
    rows = []
    for record in records:
        if "error" in record:
            rows.append([record["file"], "unreadable", "", "", "", "", ""])
            continue
        percent = "" if record["defect_area_percent"] is None else f"{record['defect_area_percent']:.4f}"
        score, count = f"{record['score']:.6f}", len(record["instances"])
        probability = "" if record["defect_probability"] is None else f"{record['defect_probability']:.6f}"
        rows.append([record["file"], record["verdict"], score, count, record["defect_area_px"], percent, probability])
    write_table(path, COLUMNS, rows)
