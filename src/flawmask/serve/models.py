"""The models of a server: loaded, checked on an image, and replaced while requests go on."""

import asyncio
import gc
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flawmask import images
from flawmask.data.demo_drawing import draw
from flawmask.errors import FlawmaskError
from flawmask.files import read_json, walk
from flawmask.images import Pixels
from flawmask.inference import exported
from flawmask.inference import threshold as thresholds
from flawmask.inference.backend import Backend, Image, Resized, infer_tiles, prepared
from flawmask.inference.exported_backend import ExportedBackend
from flawmask.inference.predictor import Predictor
from flawmask.inference.threshold import Threshold
from flawmask.inference.tiled import TiledDetections, prediction_of
from flawmask.model.spec import ModelSpec
from flawmask.prediction import RawDetections
from flawmask.serve.config import ServeConfig
from flawmask.serve.metrics import Metrics
from flawmask.tiles import WHOLE_IMAGES

log = logging.getLogger(__name__)

Signature = tuple[tuple[str, int, int, int], ...]
"""Name, size, time of change and inode of each file of a model. If it differs, the model is loaded again."""

WATCH_SECONDS = 1.0
"""How often the files are looked at. A new file is loaded when it has stayed the same for this long."""

CHECK_SIZE = 256
"""Height and width in pixels of the image that is drawn to check a model."""

FIGURES = (
    *("image_auroc", "f1_score", "precision", "recall", "false_alarm_rate"),
    *("mask_ap50", "box_ap50", "pixel_aupro"),
)
"""The metrics of a model that `/v1/model` and the page show."""

AT_THRESHOLD = ("f1_score", "precision", "recall", "false_alarm_rate")
"""Those of `FIGURES` that hold at one threshold only."""


@dataclass(eq=False)
class Loaded:
    """A model that is ready to compute.

    Attributes:
        name: its name on this server.
        path: its file or folder.
        predictor: runs it, and has its threshold.
        threshold: the threshold, and how it was chosen.
        digest: the SHA-256 of its file; of an exported model, of its `export.json`.
        figures: how good it was measured, see `figures_of`; None where it was not.
        batch_size: the largest batch.
        since: when it was loaded, in seconds since 1970.
        expected_seconds: how long a batch takes, as far as is known.
    """

    name: str
    path: Path
    predictor: Predictor
    threshold: Threshold
    digest: str
    figures: dict[str, Any] | None
    batch_size: int
    since: float = field(default_factory=time.time)
    expected_seconds: float = 0.0

    @property
    def backend(self) -> Backend:
        """What runs the network."""
        return self.predictor.backend

    @property
    def notes(self) -> list[str]:
        """What to mind about the model, as sentences: that its export is unproven, say."""
        return self.backend.manifest.unproven_note if isinstance(self.backend, ExportedBackend) else []

    @property
    def spec(self) -> ModelSpec:
        """The specification of the network."""
        return self.predictor.spec

    def prepare(self, pixels: Image) -> Resized:
        """Return the image, (height, width, 3) uint8 RGB, as `infer` takes it."""
        return prepared(pixels, self.backend) if self.spec.tile is None else Resized(pixels, *pixels.shape[:2])

    def infer(self, batch: Sequence[Resized]) -> Sequence[RawDetections | TiledDetections]:
        """Return the detections of each image, or those of its tiles. Only one thread may call it at a time."""
        if self.spec.tile is None:
            return self.backend.infer(batch)
        return [infer_tiles(self.backend, image.pixels, self.batch_size).detections for image in batch]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What `GET /v1/model` says."""
        chosen = self.threshold.to_dict()
        del chosen["chosen_by"]  # digests of hundreds of images
        calibration = self.predictor.calibration
        return {
            "model": self.name,
            "sha256": self.digest,
            "loaded_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.since)),
            "architecture": self.spec.arch,
            "classes": list(self.spec.classes),
            "image_size": self.spec.image_size,
            "has_masks": self.spec.has_masks,
            "join": self.spec.join,
            **self.spec.tiles_as_json,
            "min_area": self.predictor.min_area,
            "threshold": chosen,
            "calibrated_on": None if calibration is None else calibration.fitted_on,
            "figures": self.figures,
            "notes": self.notes,
        }


def load(name: str, path: Path, config: ServeConfig) -> Loaded:
    """Load a model.

    Raises:
        FlawmaskError: it cannot be used, or has no chosen threshold where `conf` is `auto`.
    """
    file = exported.file_of(path)
    try:
        digest = exported.digest_of(file)
    except OSError as error:
        raise FlawmaskError(f"{path} cannot be read: {error.strerror}") from None
    predictor = Predictor(
        path,
        config.device,
        threshold=config.conf,
        min_area=config.min_area,
        precision=config.precision,
        score_floor=config.score_floor,
        max_proposals=config.max_proposals,
        join=config.join,
        tile=config.tile,
        overlap=config.overlap,
        tile_from=config.tile_from,
    )
    return Loaded(
        name,
        path,
        predictor,
        thresholds.of(config.conf, file, config.min_area, predictor.spec.tiles_as_json),
        digest,
        figures_of(file, digest, _rules(predictor)),
        config.inference_batch_size or predictor.backend.batch_size,
    )


def _rules(predictor: Predictor) -> dict[str, Any]:
    """Return what decides on verdicts beside the network, by the keys that `evaluate` writes."""
    spec = predictor.spec
    return {"conf": predictor.conf, "min_area": predictor.min_area, "join": spec.join, **spec.tiles_as_json}


def figures_of(path: Path, digest: str, rules: dict[str, Any]) -> dict[str, Any] | None:
    """Return how good a model was measured, from the results beside it: those of its test split, or else of val.

    Args:
        path: the model's file.
        digest: its SHA-256.
        rules: with what the server decides on verdicts, see `_rules`.

    Returns:
        `split`, `images`, `measured_with` (the rules of the measurement), `differs` (the names of the rules that are
        not the server's), and `metrics`: each of `FIGURES` with `value` and `interval` (95 %, or None). At another
        threshold, those of `AT_THRESHOLD` are left out. With other rules, all are. None if the model was not evaluated,
        or another one was.
    """
    for split in ("test", "val"):
        results = path.parent / f"inference_{split}" / "metrics.json"
        metrics = read_json(results) if results.is_file() else {}
        if metrics.get("model_sha256") != digest:
            continue
        intervals = metrics.get("intervals", {})
        measured_with = {name: metrics.get(name, WHOLE_IMAGES.get(name)) for name in rules}
        differs = [name for name in rules if measured_with[name] != rules[name]]
        left_out = FIGURES if set(differs) - {"conf"} else AT_THRESHOLD if differs else ()
        measured = {
            key: {"value": metrics[key], "interval": intervals.get(key)}
            for key in FIGURES
            if metrics.get(key) is not None and key not in left_out
        }
        return {
            "split": split,
            "images": metrics["total_images"],
            "measured_with": measured_with,
            "differs": differs,
            "metrics": measured,
        }
    return None


def check(model: Loaded, pixels: Pixels, config: ServeConfig) -> None:
    """Refuse a model that does not give sound numbers for the check image, or misses the defect on `--check_image`.

    It predicts twice: the second time is the one that is expected from now on.

    Args:
        model: the model.
        pixels: the check image as its file has it. The model's own levels make 8 bits of more.
        config: says which file it is. Only on a file, a defect must be predicted.

    Raises:
        FlawmaskError: the model must not be used.
    """
    seen = images.as_seen(pixels, model.spec.intensity, config.check_image or Path("the drawn check image"))
    height, width = seen.shape[:2]
    for _ in range(2):
        begun = time.monotonic()
        (detections,) = model.infer([model.prepare(seen)])
        model.expected_seconds = time.monotonic() - begun
    problem = unsound(detections)
    if problem is not None:
        raise FlawmaskError(f"{model.path} is not used: on the check image, {problem}")
    prediction = prediction_of(detections, model.spec, height, width)
    if config.check_image and not prediction.verdict(model.predictor.conf, model.predictor.min_area).is_defect:
        raise FlawmaskError(f"{model.path} is not used: it finds no defect on --check_image")


def unsound(detections: RawDetections | TiledDetections) -> str | None:
    """Return what is wrong with a network's numbers; None if nothing is. A verdict from them would mean nothing."""
    if isinstance(detections, TiledDetections):
        return next((problem for _, one in detections.tiles if (problem := unsound(one))), None)
    for one in fields(detections):
        values = getattr(detections, one.name)
        if values is not None and not np.isfinite(values).all():
            return f"{one.name} holds what is no number"
    if ((detections.scores < 0) | (detections.scores > 1)).any():
        return "a score lies outside 0 to 1"
    return None


class Models:
    """The models by name. Each can be replaced while requests go on: an accepted image keeps the model it began with.

    Attributes:
        problems: why the newest file of a model is not used, by its name.
    """

    def __init__(
        self,
        config: ServeConfig,
        compute: Callable[[Callable[[], None]], Awaitable[None]],
        metrics: Metrics,
    ) -> None:
        """Take the settings, and a function that runs another one in the network's thread."""
        self._config, self._compute, self._metrics = config, compute, metrics
        self._loaded: dict[str, Loaded] = {}
        self._seen: dict[str, Signature] = {}
        self.problems: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """The names of all models, the default first."""
        return list(self._loaded)

    def get(self, name: str | None) -> Loaded | None:
        """Return a model by its name, the first without a name; None where there is none."""
        return self._loaded.get(next(iter(self._loaded)) if name is None else name)

    async def load_all(self) -> None:
        """Load all models.

        Raises:
            FlawmaskError: one of them cannot be used.
        """
        self._image = await asyncio.to_thread(self._check_image)
        for name, path in self._config.models.items():
            self._seen[name] = signature(path)
            self._loaded[name] = await self._load(name, path)

    async def watch(self) -> None:
        """Load each model whose files changed, when they have stayed the same for `WATCH_SECONDS`. Never ends."""
        before = dict(self._seen)
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for name, path in self._config.models.items():
                now = await asyncio.to_thread(signature, path)
                if now == before[name] != self._seen[name] and now:
                    await self.replace(name)
                before[name] = now

    async def replace_all(self) -> None:
        """Load all models again."""
        for name in self.names:
            await self.replace(name)

    async def replace(self, name: str) -> None:
        """Load a model's file beside the model in use, and use it if it is sound. Otherwise the old one stays."""
        path = self._config.models[name]
        self._seen[name] = signature(path)
        try:
            model = await self._load(name, path)
        except Exception as error:  # a damaged file may raise anything, and the model in use must go on
            self.problems[name] = str(error)
            log.error("%s: the model in use stays: %s", name, error)
            return
        self._loaded[name] = model
        self.problems.pop(name, None)
        await asyncio.to_thread(gc.collect)  # networks have cycles of references, and are large
        log.info("%s: now %s, SHA-256 %s", name, path, model.digest[:12])

    async def _load(self, name: str, path: Path) -> Loaded:
        result = "refused"
        try:
            model = await asyncio.to_thread(load, name, path, self._config)
            await self._compute(lambda: check(model, self._image, self._config))
            result = "ok"
        finally:
            self._metrics.loads.labels(name, result).inc()
        return model

    def _check_image(self) -> Pixels:
        if self._config.check_image is None:
            return draw(np.random.default_rng(0), "plate", "scratch", CHECK_SIZE)[0]
        return images.read_pixels(self._config.check_image)


def signature(path: Path) -> Signature:
    """Return what tells whether a model's files changed; empty where there is none.

    Files beside a checkpoint that begin with its name are part of it: its threshold and its calibration.
    """
    try:
        paths = walk(path) if path.is_dir() else sorted(path.parent.glob(f"{path.stem}.*"))
        facts = [(one.name, one.stat()) for one in paths]
    except OSError:  # a file was renamed just now, or the disk is gone
        return ()
    return tuple((name, fact.st_size, fact.st_mtime_ns, fact.st_ino) for name, fact in facts)
