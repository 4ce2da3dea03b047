"""The stages, from Python: each takes its settings by name, or as the settings object that the command line makes.

`flawmask COMMAND --help`, like the class of the settings, says what each setting means and what its default is. Paths
may be strings. Each stage checks images, files and settings before it writes anything, and raises a FlawmaskError where
they cannot be used. All raise a TypeError where there is no such setting. docs/formats.md describes the files.
"""

from typing import TYPE_CHECKING, Any

from flawmask.comparison.config import CompareConfig
from flawmask.data.augment import AugmentConfig
from flawmask.data.doctor import DoctorConfig
from flawmask.data.download import DownloadConfig
from flawmask.data.import_labels import ImportConfig
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
    """Prepare, augment, train and evaluate one category or several; return what became of each, metrics included.

    Returns:
        One entry for each category, or one for the data set. `name` is the category's or the data set's. `run_dir` is
            the folder with checkpoints and results, None where it failed before. `metrics` is the content of
            `metrics.json` of the last split that was judged, None where none was. `error` says why it failed, None
            where it did not.

    Raises:
        FlawmaskError: images, files or settings cannot be used. Where there are several categories, one that fails
            raises nothing: its `error` says why.
    """
    from flawmask import pipeline

    return pipeline.run(config or from_json(RunConfig, settings))


def demo(config: DemoCommand | None = None, /, **settings: Any) -> "list[Finished]":
    """Draw a small category in MVTec AD's layout; with `run=True` take it through the whole pipeline.

    Returns:
        One entry as `run` returns it; none without `run=True`.

    Raises:
        FlawmaskError: the folder holds something else, or a demo made with other settings.
    """
    from flawmask import pipeline

    return pipeline.demo(config or from_json(DemoCommand, settings))


def download(config: DownloadConfig | None = None, /, **settings: Any) -> "Path":
    """Fetch a category of MVTec AD and return its folder.

    Bergmann et al., "MVTec AD: a comprehensive real-world dataset for unsupervised anomaly detection", CVPR 2019. Its
    licence is CC BY-NC-SA 4.0: not for commercial use.

    Raises:
        FlawmaskError: the category is there already, the archive cannot be had or has another SHA-256, or it does not
            hold the category. No part of a category is left.
    """
    from flawmask.data import download

    return download.download(config or from_json(DownloadConfig, settings))


def doctor(config: DoctorConfig | None = None, /, **settings: Any) -> "Report":
    """Look for what is wrong with a category or a data set, and return it.

    Returns:
        `problems` holds errors first, each with `severity` (`error` or `warning`), `kind`, `where` and `message`; it is
            empty where nothing is wrong. `counts` holds `images`, `defective` and `instances` for each `split` and
            `type`, and `sizes` how many images there are of each `width` and `height` in pixels. `contact_sheet` is the
            path of the sheet with outlined images, None where none was written. `name` is what was checked. `layout` is
            how a category's folders lie. `tallies` are two counts, of the images and of the annotations or masks, with
            those that can be used and the names of the others by reason. `to_dict()` gives all as JSON values.

    Raises:
        FlawmaskError: there is no such category or data set, or no image in it.
    """
    from flawmask.data import doctor

    return doctor.examine(config or from_json(DoctorConfig, settings))


def prepare(config: PrepareConfig | None = None, /, **settings: Any) -> "Prepared":
    """Make a COCO folder of a category and return where it is and what is in it.

    The format is COCO's for object detection (https://cocodataset.org/#format-data). Every mask comes through exactly.

    Returns:
        `dataset_dir` is the COCO folder. `train`, `val` and `test` say how many images are in each split, how many are
            good and defective, and how many there are of each type; `test` is None where there is none. `left_out`
            names the images that were left out, each with `file` and `reason`. `reused` says whether it was there
            already. `tallies` are two counts, of the images and of the masks, with those that are used and the names of
            the others by reason.

    Raises:
        FlawmaskError: the category is not there or has no defect, an image or a mask is bad and `on_error` is `stop`,
            or the output folder holds something else, or a data set made otherwise.
    """
    from flawmask.data import prepare

    return prepare.prepare(config or from_json(PrepareConfig, settings))


def import_labels(source: "ImportConfig | str | Path", /, **settings: Any) -> "Prepared":
    """Make a COCO folder of what a labelling tool wrote, and return where it is and what is in it.

    docs/formats.md says what is read of each format.

    Args:
        source: a label file, or a folder with label files and images; or all settings as one object.
        **settings: the other settings by name: `output_dir`, which must be given, and `source_format` (`coco`, `cvat`,
            `labelme`, `via`, `labelstudio`, `yolo`; by default `auto`) among them.

    Returns:
        What `prepare` returns.

    Raises:
        FlawmaskError: there are no labels of a known format, no image has a defect, a label or an image is bad and
            `on_error` is `stop`, or the output folder holds something else, or a data set made otherwise.
        UnusedError: an image or a label is not used, and `strict` is on.
    """
    from flawmask.data import import_labels

    given = source if isinstance(source, ImportConfig) else from_json(ImportConfig, {"source": str(source), **settings})
    return import_labels.import_labels(given)


def augment(config: AugmentConfig | None = None, /, **settings: Any) -> "Augmented":
    """Add variants to the training images of a COCO folder, in a new one, and return where it is.

    Image and masks are transformed together. The images that were there arrive byte for byte, in all splits.

    Returns:
        `dataset_dir` is the augmented COCO folder. `originals` and `variants` count the training images that were there
            before and that were added. `reused` says whether it was there already.

    Raises:
        FlawmaskError: the COCO folder is damaged, or the output folder holds something else, or a data set made
            otherwise.
    """
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
    """Train a network on the `train` split of a COCO folder, and write a run folder.

    Args:
        config: the settings.
        transform: what is made of each training image each time that it is shown: a function that takes the image,
            (height, width, 3) uint8 RGB, the masks of its N instances, (N, height, width) bool, their class names, and
            a NumPy generator to draw from; and returns image, masks and names, of any size.
        callbacks: what is told of the training; see `flawmask.training.callbacks.Callback`.
        **settings: the settings by name, where no `config` is given.

    Returns:
        `run_dir` is the run folder, with `best.pt` and `last.pt`. `best_epoch` is the epoch that `best.pt` comes from,
            counted from 1. `history` is the content of `history.json`, a list for each figure with an entry for each
            epoch.

    Raises:
        FlawmaskError: the data set or the weights cannot be used, the device is not there, the output folder holds
            something else, the transform returned no image with masks of its size, or the loss stopped being finite.
        KeyboardInterrupt: Ctrl-C was pressed. The training was saved, and `resume` goes on from there.
        SystemExit: the process was told to end by SIGTERM. The same holds.
    """
    from flawmask.training import loop

    return loop.train(config or from_json(TrainConfig, settings), transform=transform, callbacks=callbacks)


def evaluate(config: EvaluateConfig | None = None, /, **settings: Any) -> "Evaluated":
    """Evaluate a checkpoint on a labelled split; return the metrics and the folder with the results.

    docs/metrics.md defines each metric and names its source.

    Returns:
        `metrics` is the content of `metrics.json`: shares are fractions from 0 to 1, times are seconds, what is
            undefined is None. `results_dir` is the folder where it lies, with `report.html` and `predictions.json`.

    Raises:
        FlawmaskError: the checkpoint or the data set is damaged, they do not belong together, an image cannot be read
            or was trained on, there is no threshold to be had, or the output folder holds something else.
    """
    from flawmask.evaluation import evaluate

    return evaluate.evaluate(config or from_json(EvaluateConfig, settings))


def predict(config: PredictConfig | None = None, /, **settings: Any) -> "Predicted":
    """Find the defects on image files, write them down, and return which files have some; see `Predictor` for images
    that are no files, or for results that are not written.

    Returns:
        `output` is the folder with `predictions.json`, `predictions.csv` and `overlays/`. `defective` and `good` are
            the paths of the files with a defect and without. `unreadable` holds the reason for each path that could not
            be read, `not_predicted` that for each other file in the folders that were named.

    Raises:
        FlawmaskError: there is no image at all, the checkpoint or the region of interest cannot be used, or the output
            folder holds something else; `strict` is on, and an image was found that is not predicted.
    """
    from flawmask.inference import predict

    return predict.predict(config or from_json(PredictConfig, settings))


def compare(config: CompareConfig | None = None, /, **settings: Any) -> "Compared":
    """Train and evaluate several kinds of networks on one data set; return their table and what it shows.

    docs/metrics.md says how differences are told from chance.

    Returns:
        `folder` is where everything is, `comparison.html` and `comparison.json` among it. `head` and `body` are the
            table as text: its first row, then the others. `said` holds sentences on what shows, what to take and what
            to mind. `failed` says whether a model has no results though it was to take part.

    Raises:
        FlawmaskError: the data set or the settings cannot be used. What goes wrong with one model is told in its
            column.
        KeyboardInterrupt: Ctrl-C was pressed. The same call goes on from there.
        SystemExit: the process was told to end by SIGTERM. The same holds.
    """
    from flawmask.comparison import compare

    return compare.compare(config or from_json(CompareConfig, settings))
