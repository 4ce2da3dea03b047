"""Find the defects on images that nobody labelled, and write them down."""

import csv
import glob
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flawmask import images
from flawmask.data import intensity
from flawmask.draw import PREDICTION, title_bar
from flawmask.errors import FlawmaskError
from flawmask.files import check_output_folder, real_path, whole_folder, write_json
from flawmask.inference import preannotations, threshold
from flawmask.inference.config import PredictConfig
from flawmask.inference.overlay import draw_instances, viewing_size
from flawmask.inference.predictor import load
from flawmask.inference.stream import Seen, judge_all
from flawmask.masks import Mask
from flawmask.prediction import post_process
from flawmask.progress import track
from flawmask.settings import require

log = logging.getLogger(__name__)

ENTRIES = (
    *("predictions.json", "predictions.csv", "overlays", "masks"),
    *("preannotations.json", "preannotations.xml"),
)
COLUMNS = ("file", "verdict", "score", "instances", "defect_area_px", "defect_area_percent")


@dataclass(frozen=True)
class Predicted:
    """What `predict` found.

    Attributes:
        output: where `predictions.json`, `predictions.csv`, `overlays/` and perhaps `masks/` are.
        defective: the files with a defect.
        good: the files without.
        unreadable: the files that could not be read, each with the reason.
    """

    output: Path
    defective: list[Path]
    good: list[Path]
    unreadable: dict[Path, str]


def predict(config: PredictConfig) -> Predicted:
    """Find the defects on all images named and write the results.

    A file that cannot be read is listed, and the others go on.

    Raises:
        FlawmaskError: there is no image at all, the checkpoint or the region of interest cannot be used, or the
            output folder holds something else. Nothing is written then.
    """
    check_output_folder(config.output, "predictions.json", overwrite=True, what="prediction", entries=ENTRIES)
    paths = find_images(config.input, config.output)
    region = _read_region(config.roi) if config.roi else None
    backend = load(config.model, config)
    require(
        backend.spec.has_masks or not config.save_masks,
        f"--save_masks: {backend.spec.arch} finds boxes and outlines nothing",
    )
    conf = threshold.of(config.conf, config.model, config.min_area).value
    levels = backend.spec.intensity
    if config.intensity is not None:
        levels = intensity.of_images(config.intensity, paths, "--input")
    records: list[dict[str, Any]] = []
    with whole_folder(config.output) as folder:
        for name in ("overlays", "masks") if config.save_masks else ("overlays",):
            (folder / name).mkdir()
        job = _Job(config, backend.spec.classes, conf, region, folder, _unique_names(paths), levels)
        judged = judge_all(backend, paths, job.read, job.write, config.inference_batch_size)
        with closing(judged):
            for record in track(judged, "predicting", total=len(paths)):
                if "error" in record:
                    log.error("%s", record["error"])
                records.append(record)
        write_json(folder / "predictions.json", {"conf": conf, "min_area": config.min_area, "images": records})
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
        config.output,
    )
    _warn_of_outside(job)
    return Predicted(config.output, defective, good, unreadable)


@dataclass(frozen=True)
class _Job:
    """What is done for each image before and after the network, by several threads at once.

    Attributes:
        config: the stage's.
        classes: the network's.
        conf: the verdict's threshold.
        region: (height, width) bool, where defects count; None for everywhere.
        folder: where the results go.
        names: of each image's pictures.
        levels: what becomes black and white, of values of more than 8 bits.
        outside: how images lie outside the levels, those of them that do.
    """

    config: PredictConfig
    classes: tuple[str, ...]
    conf: float
    region: Mask | None
    folder: Path
    names: dict[Path, str]
    levels: images.Levels
    outside: dict[Path, str] = field(default_factory=dict)

    def read(self, path: Path) -> npt.NDArray[np.uint8]:
        pixels = images.read_pixels(path, self.config.page)
        _check_size(pixels, self.region, path, self.config)
        if how := images.outside(pixels, self.levels):
            self.outside[path] = how
        return images.to_rgb(pixels, self.levels)

    def write(self, path: Path, seen: Seen | FlawmaskError) -> dict[str, Any]:
        """Write the pictures of an image and return its record."""
        if isinstance(seen, FlawmaskError):
            return {"file": path.as_posix(), "error": str(seen)}
        prediction = post_process(seen.found, self.classes, *seen.pixels.shape[:2])
        if self.region is not None:
            prediction = prediction.within(self.region)
        limits = (self.conf, self.config.min_area)
        record: dict[str, Any] = {"file": path.as_posix(), **prediction.to_dict(*limits)}
        caption = f"{path.name}: {record['verdict']} ({record['score']:.2f})"
        size = viewing_size(seen.pixels)
        picture = title_bar(draw_instances(seen.pixels, prediction.defects(*limits), PREDICTION, size), caption)
        record["overlay"] = f"overlays/{self.names[path]}"
        (self.folder / record["overlay"]).write_bytes(images.encode_png(picture))
        if self.config.save_masks:
            mask = prediction.defect_mask(*limits)
            record["mask"] = f"masks/{self.names[path]}"
            (self.folder / record["mask"]).write_bytes(images.encode_png(mask.astype(np.uint8) * 255))
        return record


def _warn_of_outside(job: _Job) -> None:
    """Warn of images whose range of grey is another than the one that they were read with."""
    if not job.outside:
        return
    first = min(job.outside)
    log.warning(
        "%d of %d images do not fit the range of grey from %d to %d (%s): %s %s; if the camera has fewer bits or more, "
        "say how many with --intensity, or train on its images",
        len(job.outside),
        len(job.names),
        *job.levels,
        "as the model was trained" if job.config.intensity is None else f"--intensity {job.config.intensity}",
        first,
        job.outside[first],
    )


def _read_region(path: Path) -> Mask:
    region = images.read_mask(path)
    require(bool(region.any()), f"{path} has no white pixel: no defect would ever count")
    return region


def _check_size(pixels: images.Pixels, region: Mask | None, path: Path, config: PredictConfig) -> None:
    """Refuse an image that the region of interest was not drawn for."""
    if region is not None and region.shape != pixels.shape[:2]:
        sizes = [f"{width}x{height}" for height, width in (pixels.shape[:2], region.shape)]
        raise FlawmaskError(f"{path} is {sizes[0]} but {config.roi} is {sizes[1]}: draw the region at the images' size")


def find_images(inputs: tuple[str, ...], output: Path) -> list[Path]:
    """Return the image files that files, folders and patterns name, each once, in the order named, folders sorted.

    A file named outright is taken whatever its suffix.

    Args:
        inputs: as on the command line.
        output: where the results go; the pictures that an earlier run left there are none to be judged.

    Raises:
        FlawmaskError: one of them leads to no image.
    """
    found: dict[Path, None] = {}
    results = real_path(output)
    for text in inputs:
        paths = [path for path in _expand(text) if results not in real_path(path).parents]
        if not paths:
            raise FlawmaskError(f"--input {text}: there is no such file, or no image (png, jpg, bmp, tif) there")
        found |= dict.fromkeys(paths)
    if not found:
        raise FlawmaskError("--input names no image: give it files, folders or patterns")
    return list(found)


def _expand(text: str) -> Iterator[Path]:
    path = Path(text)
    if path.is_dir():
        yield from sorted(one for one in path.rglob("*") if images.is_readable(one) and not one.is_dir())
    elif path.is_file():
        yield path
    else:
        # Not Path.glob, which refuses patterns that start at the root.
        found = glob.glob(text, recursive=True)  # noqa: PTH207
        yield from sorted(Path(one) for one in found if images.is_readable(Path(one)))


def _unique_names(paths: list[Path]) -> dict[Path, str]:
    """Return a PNG name for each image that no other has, not even one that differs in case only."""
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
    """Write a line per image; one that could not be read has the verdict `unreadable`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for record in records:
            if "error" in record:
                table.writerow([record["file"], "unreadable", "", "", "", ""])
                continue
            percent = "" if record["defect_area_percent"] is None else f"{record['defect_area_percent']:.4f}"
            score, count = f"{record['score']:.6f}", len(record["instances"])
            table.writerow([record["file"], record["verdict"], score, count, record["defect_area_px"], percent])
