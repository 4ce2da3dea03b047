"""The stages, from Python: each takes its settings by name, or as the settings object that the command line makes.

`flawmask COMMAND --help`, like the class of the settings, says what each setting means and what its default is. Paths
may be strings. All raise a FlawmaskError where images, files or settings cannot be used, and nothing is written then;
and a TypeError where there is no such setting.
"""

from typing import TYPE_CHECKING, Any

from flawmask.comparison.config import CompareConfig
from flawmask.data.augment import AugmentConfig
from flawmask.data.doctor import DoctorConfig
from flawmask.data.download import DownloadConfig
from flawmask.data.prepare import PrepareConfig
from flawmask.evaluation.config import EvaluateConfig
from flawmask.inference.config import PredictConfig
from flawmask.pipeline import DemoCommand
from flawmask.settings import from_json
from flawmask.stages import RunConfig
from flawmask.training.config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flawmask.comparison.conclusions import Compared
    from flawmask.data.augment import Augmented
    from flawmask.data.doctor import Report
    from flawmask.data.prepare import Prepared
    from flawmask.evaluation.evaluate import Evaluated
    from flawmask.inference.predict import Predicted
    from flawmask.stages import Finished
    from flawmask.training.callbacks import Callback
    from flawmask.training.loader import Transform
    from flawmask.training.loop import Trained


def run(config: RunConfig | None = None, /, **settings: Any) -> "list[Finished]":
    """Prepare, augment, train and evaluate one category or several; return what became of each, metrics included."""
    from flawmask import pipeline

    return pipeline.run(config or from_json(RunConfig, settings))


def demo(config: DemoCommand | None = None, /, **settings: Any) -> "list[Finished]":
    """Draw a small category; with `run=True` take it through the whole pipeline, and return what became of it."""
    from flawmask import pipeline

    return pipeline.demo(config or from_json(DemoCommand, settings))


def download(config: DownloadConfig | None = None, /, **settings: Any) -> "Path":
    """Fetch a category of MVTec AD and return its folder."""
    from flawmask.data import download

    return download.download(config or from_json(DownloadConfig, settings))


def doctor(config: DoctorConfig | None = None, /, **settings: Any) -> "Report":
    """Look for what is wrong with a category or a data set, and return it."""
    from flawmask.data import doctor

    return doctor.examine(config or from_json(DoctorConfig, settings))


def prepare(config: PrepareConfig | None = None, /, **settings: Any) -> "Prepared":
    """Make a COCO folder of a category and return where it is and what is in it."""
    from flawmask.data import prepare

    return prepare.prepare(config or from_json(PrepareConfig, settings))


def augment(config: AugmentConfig | None = None, /, **settings: Any) -> "Augmented":
    """Add variants to the training images of a COCO folder, in a new one, and return where it is."""
    from flawmask.data import augment

    return augment.augment(config or from_json(AugmentConfig, settings))


def train(
    config: TrainConfig | None = None,
    /,
    *,
    transform: "Transform | None" = None,
    callbacks: "Sequence[Callback]" = (),
    **settings: Any,
) -> "Trained":
    """Train a network on a COCO folder; return the run folder, the best epoch and what each epoch came to.

    Args:
        config: the settings.
        transform: what is made of each training image each time that it is shown: a function that takes the image,
            (height, width, 3) uint8 RGB, the masks of its N instances, (N, height, width) bool, their class names, and
            a NumPy generator to draw from; and returns image, masks and names, of any size.
        callbacks: what is told of the training; see `flawmask.training.callbacks.Callback`.
        **settings: the settings by name, where no `config` is given.
    """
    from flawmask.training import loop

    return loop.train(config or from_json(TrainConfig, settings), transform=transform, callbacks=callbacks)


def evaluate(config: EvaluateConfig | None = None, /, **settings: Any) -> "Evaluated":
    """Evaluate a checkpoint on a labelled split; return the metrics and the folder with the results."""
    from flawmask.evaluation import evaluate

    return evaluate.evaluate(config or from_json(EvaluateConfig, settings))


def predict(config: PredictConfig | None = None, /, **settings: Any) -> "Predicted":
    """Find the defects on image files, write them down, and return which files have some; see `Predictor` for images
    that are no files, or for results that are not written."""
    from flawmask.inference import predict

    return predict.predict(config or from_json(PredictConfig, settings))


def compare(config: CompareConfig | None = None, /, **settings: Any) -> "Compared":
    """Train and evaluate several kinds of networks on one data set; return their table and what it shows."""
    from flawmask.comparison import compare

    return compare.compare(config or from_json(CompareConfig, settings))
