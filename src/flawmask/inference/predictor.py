"""An image in, what is wrong with it out: a file, an array, a tensor, or a picture of Pillow's; one, or any number."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

from flawmask import images
from flawmask.errors import FlawmaskError
from flawmask.images import Colour, Source
from flawmask.inference import calibration
from flawmask.inference import threshold as thresholds
from flawmask.inference.backend import Backend, Image, detect
from flawmask.inference.config import MAX_PROPOSALS, SCORE_FLOOR, InferenceSettings
from flawmask.inference.stream import Seen, judge_all
from flawmask.joining import Join
from flawmask.prediction import Prediction
from flawmask.settings import Precision


class Predictor:
    """A trained network that says what is wrong with an image.

    >>> predictor = Predictor("best.pt", threshold="auto")                     # doctest: +SKIP
    >>> predictor("part.png").is_defect                                        # doctest: +SKIP
    True
    >>> for prediction in predictor.predict(["a.png", grey_array, tensor]):    # doctest: +SKIP
    ...     print(prediction.labels, prediction.scores)

    Attributes:
        backend: what runs the network.
        spec: what the network was built from: its classes, among others.
        conf: the threshold of its predictions' verdicts, 0 to 1.
        min_area: how many pixels a defect must cover to count in them.
        calibration: what gives their `defect_probability`; None where the checkpoint has none for this `min_area`.
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
    ) -> None:
        """Load a checkpoint.

        Args:
            model: `best.pt` or `last.pt` of a run, or a state dict of torchvision's maskrcnn_resnet50_fpn.
            device: `cuda`, `cuda:1`, `mps` or `cpu`; by default the first that is there.
            threshold: an image is a defect where a defect on it scores at least this much, 0 to 1; `auto`: as
                `flawmask evaluate --conf auto` chose for this checkpoint.
            min_area: defects that cover fewer pixels than this do not count.
            precision: what the layers compute in; boxes and scores are float32 in any case.
            score_floor: detections that score no more than this are dropped, 0 to 1.
            max_proposals: regions of an image that the heads look at; never more than the checkpoint says.
            join: `touching` makes one instance of those of one class that overlap or touch, `off` leaves them as they
                come; by default as the model was trained.

        Raises:
            FlawmaskError: the file is no checkpoint, the device or the precision is not there, or no threshold was
                chosen for this checkpoint and this `min_area`.
        """
        if threshold != "auto" and not 0 <= threshold <= 1:
            raise FlawmaskError(f"threshold={threshold!r}: it must lie between 0 and 1, or be 'auto'")
        settings = InferenceSettings(
            device=device, precision=precision, score_floor=score_floor, max_proposals=max_proposals, join=join
        )
        self.conf = thresholds.of(threshold, Path(model), min_area).value
        self.min_area = min_area
        self.calibration = calibration.load(Path(model), min_area)
        self.backend = load(Path(model), settings)
        self.spec = self.backend.spec

    def __call__(self, image: Source, *, colour: Colour = "rgb") -> Prediction:
        """Return what is on one image.

        Args:
            image: one of those that `predict` takes.
            colour: the order of the colours in an array or a tensor.

        Raises:
            ImageError: it cannot be read, or is nothing of this.
        """
        pixels = images.pixels_of(image, colour, self.spec.intensity)
        return self._own(detect(self.backend, pixels), pixels)

    def predict(
        self, sources: Iterable[Source], *, batch_size: int | None = None, colour: Colour = "rgb"
    ) -> Iterator[Prediction]:
        """Yield what is on each image, in their order. While the network looks at some, threads read the next.

        Images are converted as files are read: grey is repeated, transparency is dropped, 16-bit values become 0 to 255
        as the checkpoint says (`spec.intensity`). Floats are multiplied by 255 and rounded.

        Args:
            sources: images, as many as you like: a list, a generator of a camera's frames, or one alone. Each is a
                file's path, a picture of Pillow's, an array, (height, width) or (height, width, channels) with 1, 3 or
                4 of them, or a tensor, (height, width) or (channels, height, width); of uint8, uint16, or floats from 0
                to 1.
            batch_size: the most images that pass through the network at once; by default 8 on CUDA and 1 elsewhere.
            colour: the order of the colours in arrays and tensors: OpenCV's frames are `bgr`.

        Raises:
            ImageError: one cannot be read, or is nothing of this. Those before it have been yielded.
        """

        def finish(_: Source, seen: Seen | FlawmaskError) -> Prediction:
            if isinstance(seen, FlawmaskError):
                raise seen
            return self._own(seen.prediction(self.spec), seen.pixels)

        def read(source: Source) -> Image:
            return images.pixels_of(source, colour, self.spec.intensity)

        several = [sources] if images.is_source(sources) else sources
        with closing(judge_all(self.backend, several, read, finish, batch_size)) as judged:
            yield from judged

    def _own(self, prediction: Prediction, pixels: Image) -> Prediction:
        return replace(prediction, conf=self.conf, min_area=self.min_area, image=pixels, calibration=self.calibration)


def load(model: Path, settings: InferenceSettings) -> Backend:
    """Return the backend that runs a checkpoint, with the settings of a stage.

    Raises:
        FlawmaskError: the file is no checkpoint, or the device or the precision is not there.
    """
    from flawmask.inference.torch_backend import TorchBackend

    backend = TorchBackend.load(
        model,
        settings.device,
        precision=settings.precision,
        score_floor=settings.score_floor,
        max_proposals=settings.max_proposals,
    )
    if settings.join is not None:
        backend.spec = replace(backend.spec, join=settings.join)
    return backend
