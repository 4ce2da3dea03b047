"""`Predictor`: predict images from Python. An image is a file, an array, a tensor or a Pillow image."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from flawmask import images
from flawmask.errors import FlawmaskError
from flawmask.images import Colour, Source
from flawmask.inference import calibration, exported
from flawmask.inference import threshold as thresholds
from flawmask.inference.backend import Backend, Image, detect
from flawmask.inference.config import MAX_PROPOSALS, SCORE_FLOOR, InferenceSettings
from flawmask.inference.stream import NetworkOutput, predict_all
from flawmask.joining import Join
from flawmask.model.spec import ModelSpec
from flawmask.prediction import Prediction
from flawmask.settings import Precision, require
from flawmask.strips import StripImage, opened
from flawmask.tiles import TileChoice, TileFrom, default_overlap

log = logging.getLogger(__name__)


class Predictor:
    """A trained network that predicts the defects on images.

    >>> predictor = Predictor("best.pt", threshold="auto")                     # doctest: +SKIP
    >>> predictor("part.png").is_defect                                        # doctest: +SKIP
    True
    >>> for prediction in predictor.predict(["a.png", grey_array, tensor]):    # doctest: +SKIP
    ...     print(prediction.labels, prediction.scores)

    Attributes:
        backend: runs the network.
        spec: the specification of the network; its classes, for example.
        conf: the threshold of the verdict, 0 to 1.
        min_area: the smallest area, in pixels, of a defect that counts for the verdict.
        calibration: gives the `defect_probability` of its predictions; None where the checkpoint has no calibration for
            this `min_area` and these tiles.
    """

    def __init__(
        self,
        model: str | Path,
        device: str | None = None,
        *,
        threshold: float | Literal["auto"] = thresholds.DEFAULT,
        min_area: int = 0,
        precision: Precision = "auto",
        score_floor: float = SCORE_FLOOR,
        max_proposals: int = MAX_PROPOSALS,
        join: Join | None = None,
        tile: int | TileChoice | None = None,
        overlap: int | Literal["auto"] = "auto",
        tile_from: TileFrom = "all",
    ) -> None:
        """Load a checkpoint.

        Args:
            model: `best.pt` or `last.pt` of a run, a folder that `flawmask export` wrote, or a state dict of
                torchvision's maskrcnn_resnet50_fpn.
            device: `cuda`, `cuda:1`, `mps` or `cpu`; by default the first that is there.
            threshold: an image is rejected where a defect on it has at least this score, 0 to 1. `auto` is the
                threshold that `flawmask evaluate --conf auto` chose for this checkpoint.
            min_area: defects with fewer pixels than this do not count.
            precision: the precision of the layers; boxes and scores are always float32.
            score_floor: detections with a score up to this are dropped, 0 to 1.
            max_proposals: RPN proposals kept per image, highest objectness first; never more than the checkpoint's own
                number.
            join: `touching` joins instances of one class that overlap or touch; `off` leaves the network's instances as
                they are. The default is the checkpoint's own rule.
            tile: the side of the tiles in which the network sees an image, in pixels; `off` for whole images. `auto`
                and the default are as the checkpoint was trained.
            overlap: the pixels that neighbouring tiles share; `auto` for the checkpoint's, or an eighth of a tile.
            tile_from: with `coarse`, only the tiles where the network sees something on the whole image, made small.

        Raises:
            FlawmaskError: the file is no checkpoint; the device or the precision is not available; no threshold was
                chosen for this checkpoint, this `min_area` and these tiles; or defects above the threshold would be
                dropped.
        """
        if threshold != "auto" and not 0 <= threshold <= 1:
            raise FlawmaskError(f"threshold={threshold!r}: it must lie between 0 and 1, or be 'auto'")
        settings = InferenceSettings(
            device=device,
            precision=precision,
            score_floor=score_floor,
            max_proposals=max_proposals,
            join=join,
            tile=tile,
            overlap=overlap,
            tile_from=tile_from,
        )
        file = exported.file_of(Path(model))
        self.backend = load(file, settings)
        self.spec = self.backend.spec
        self.conf = thresholds.of(threshold, file, min_area, self.spec.tiles_as_json).value
        check_floor(self.backend, self.conf, settings, file)
        self.min_area = min_area
        self.calibration = calibration.load(file, min_area, self.spec.tiles_as_json)
        self._first_decoded_whole: dict[str, Path] = {}

    def __call__(self, image: Source, *, colour: Colour = "rgb") -> Prediction:
        """Return the prediction for one image.

        Args:
            image: an image as `predict` takes it.
            colour: the order of the colours in an array or a tensor.

        Raises:
            ImageError: the image cannot be read, or is none of these kinds.
        """
        read = self._read(image, colour)
        return self._with_limits(detect(self.backend, read), None if isinstance(read, StripImage) else read)

    def predict(
        self, sources: Iterable[Source], *, batch_size: int | None = None, colour: Colour = "rgb"
    ) -> Iterator[Prediction]:
        """Yield a prediction for each image, in their order. While the network runs, threads read the next images.

        Images are converted like files: grey is repeated, transparency is dropped, and 16-bit values become 0 to 255 as
        in training (`spec.intensity`). Floats are multiplied by 255 and rounded.

        Args:
            sources: any number of images: a list, a generator of camera frames, or a single image. Each is the path of
                a file, a Pillow image, an array or a tensor. An array is (height, width) or (height, width, channels),
                a tensor is (height, width) or (channels, height, width), with 1, 3 or 4 channels. The values are uint8,
                uint16, or floats from 0 to 1.
            batch_size: the largest batch; by default 8 on CUDA and 1 elsewhere.
            colour: the order of the colours in arrays and tensors: OpenCV's frames are `bgr`.

        Raises:
            ImageError: an image cannot be read, or is none of these kinds. The predictions before it have been yielded.
        """

        def finish(_: Source, output: NetworkOutput | FlawmaskError) -> Prediction:
            if isinstance(output, FlawmaskError):
                raise output
            return self._with_limits(output.prediction(self.spec), output.pixels if output.size is None else None)

        several = [sources] if images.is_source(sources) else sources
        read = partial(self._read, colour=colour)
        with closing(predict_all(self.backend, several, read, finish, batch_size)) as predictions:
            yield from predictions

    def _read(self, source: Source, colour: Colour) -> Image | StripImage:
        file = Path(source) if self.spec.tile and isinstance(source, str | Path) else None
        large = None if file is None else opened(file, self._first_decoded_whole)
        return large or images.pixels_of(source, colour, self.spec.intensity)

    def _with_limits(self, prediction: Prediction, pixels: Image | None) -> Prediction:
        return replace(prediction, conf=self.conf, min_area=self.min_area, image=pixels, calibration=self.calibration)


def load(model: Path, settings: InferenceSettings) -> Backend:
    """Return the backend for a checkpoint or an exported model, with the settings of a stage.

    An exported model runs on the CPU, with the precision, the score floor and the proposals that it was exported with.

    Raises:
        FlawmaskError: the file is no checkpoint, or the device or the precision is not available.
    """
    backend = _exported(model, settings) if exported.is_export(model) else _of_checkpoint(model, settings)
    if settings.join is not None:
        backend.spec = replace(backend.spec, join=settings.join)
    backend.spec = _in_tiles(backend.spec, settings, model)
    return backend


def check_floor(backend: Backend, conf: float, settings: InferenceSettings, model: Path) -> None:
    """Refuse a threshold below the score floor, which would drop defects that count. The default floor may be above.

    Args:
        backend: runs the network; the floor of an exported model is fixed in it.
        conf: the threshold of the verdict.
        settings: have the floor of a checkpoint.
        model: the file, for the message.

    Raises:
        FlawmaskError: the threshold is below the floor.
    """
    from flawmask.inference.exported_backend import ExportedBackend

    is_fixed = isinstance(backend, ExportedBackend)
    floor = backend.manifest.score_floor if isinstance(backend, ExportedBackend) else settings.score_floor
    advice = "export it with a lower one" if is_fixed else "give a lower one"
    require(
        floor <= max(conf, SCORE_FLOOR),
        f"{model}: --score_floor is {floor}, above the threshold {conf:.4g}, so defects that count would be dropped: "
        f"{advice}, or a higher threshold",
    )


def _of_checkpoint(model: Path, settings: InferenceSettings) -> Backend:
    try:
        from flawmask.inference.torch_backend import TorchBackend
    except ModuleNotFoundError as error:
        raise FlawmaskError(f"{model} needs {error.name}, which is not installed: export it, or install it") from None
    return TorchBackend.load(
        model,
        settings.device,
        precision=settings.precision,
        score_floor=settings.score_floor,
        max_proposals=settings.max_proposals,
    )


def _exported(model: Path, settings: InferenceSettings) -> Backend:
    from flawmask.inference.exported_backend import ExportedBackend

    require(settings.device in (None, "cpu"), f"--device {settings.device}: {model} runs on the CPU")
    backend = ExportedBackend.load(exported.file_of(model))
    manifest = backend.manifest
    fixed = {
        "--precision": (settings.precision, ("auto", manifest.precision)),
        "--score_floor": (settings.score_floor, (SCORE_FLOOR, manifest.score_floor)),
        "--max_proposals": (settings.max_proposals, (MAX_PROPOSALS, manifest.max_proposals)),
    }
    for flag, (wanted, allowed) in fixed.items():
        require(wanted in allowed, f"{flag} {wanted}: {model} was exported with {allowed[1]}")
    return backend


def _in_tiles(spec: ModelSpec, settings: InferenceSettings, model: Path) -> ModelSpec:
    """Return the spec with the tiles that the settings ask for, and warn where they are not those of the training.

    Raises:
        FlawmaskError: the settings do not fit the tiles of the checkpoint.
    """
    tile = spec.tile if settings.tile in (None, "auto") else None if settings.tile == "off" else settings.tile
    assert tile is None or isinstance(tile, int)
    if tile is None:
        flag = "--tile_from coarse" if settings.tile_from == "coarse" else "--overlap"
        wants_tiles = settings.tile_from == "coarse" or settings.overlap != "auto"
        require(not wants_tiles, f"{flag}: {model} was trained on whole images: give the side of tiles with --tile")
        overlap = 0
    else:
        known = spec.overlap if tile == spec.tile else default_overlap(tile)
        overlap = known if settings.overlap == "auto" else settings.overlap
    if tile != spec.tile:
        trained = "whole images" if spec.tile is None else f"tiles of {spec.tile} pixels"
        used = "whole images" if tile is None else f"tiles of {tile} pixels"
        log.warning(
            "%s was trained on %s and is used on %s: both are resized to %d pixels, so defects have another size for "
            "the network. Figures, threshold and calibration of its training do not hold: evaluate it like this",
            *(model, trained, used, spec.image_size),
        )
    return replace(spec, tile=tile, overlap=overlap, tile_from=settings.tile_from)
