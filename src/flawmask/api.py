"""The stages as Python functions. Each takes its settings by name, or as one settings object.

`flawmask COMMAND --help` and the settings classes explain each setting and its default. Paths may be strings. Each
stage checks images, files and settings before it writes anything. It raises a FlawmaskError where they cannot be used,
and a TypeError for an unknown setting. docs/formats.md describes the files.
"""

from typing import TYPE_CHECKING, Any

from flawmask.comparison.config import CompareConfig
from flawmask.data.augment import AugmentConfig
from flawmask.data.doctor import DoctorConfig
from flawmask.data.download import DownloadConfig
from flawmask.data.import_labels import ImportConfig
from flawmask.data.prepare import PrepareConfig
from flawmask.evaluation.config import EvaluateConfig
from flawmask.export.config import ExportConfig
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
    from flawmask.export.export import Exported
    from flawmask.inference.archive import Recorded
    from flawmask.inference.predict import Predicted
    from flawmask.stages import Finished
    from flawmask.training.callbacks import Callback
    from flawmask.training.loader import Transform
    from flawmask.training.loop import Trained


def run(config: RunConfig | None = None, /, **settings: Any) -> "list[Finished]":
    """Prepare, train and evaluate one category or several, and return a result for each.

    Returns:
        One entry for each category, or one for the data set. `name` is the name of the category or data set. `run_dir`
            is the folder with checkpoints and results; None where an earlier stage failed. `metrics` is the content of
            `metrics.json` for the last split that was evaluated; None where none was. `error` says why the category
            failed; None where it did not.

    Raises:
        FlawmaskError: images, files or settings cannot be used. With several categories, a category that fails raises
            nothing: its `error` gives the reason.
    """
    from flawmask import pipeline

    return pipeline.run(config or from_json(RunConfig, settings))


def demo(config: DemoCommand | None = None, /, **settings: Any) -> "list[Finished]":
    """Draw a small category in MVTec AD's layout; with `run=True`, run the whole pipeline on it.

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
        FlawmaskError: the category exists already, the archive cannot be downloaded or has a wrong SHA-256, or it does
            not hold the category. No incomplete category is left.
    """
    from flawmask.data import download

    return download.download(config or from_json(DownloadConfig, settings))


def doctor(config: DoctorConfig | None = None, /, **settings: Any) -> "Report":
    """Check a category or a data set for problems and return a report.

    Returns:
        `problems` holds the problems, errors first, each with `severity` (`error` or `warning`), `kind`, `where` and
            `message`. `counts` holds `images`, `defective` and `instances` for each `split` and `type`. `sizes` counts
            the images of each `width` and `height` in pixels. `contact_sheet` is the path of the sheet with outlined
            images; None where none was written. `name` is the category or data set. `layout` is the layout of a
            category's folders. `tallies` are two counts, one of images and one of annotations or masks: how many can
            be used, and the names of the others by reason. `to_dict()` returns all of this as JSON values.

    Raises:
        FlawmaskError: the category or data set does not exist, or holds no image.
    """
    from flawmask.data import doctor

    return doctor.examine(config or from_json(DoctorConfig, settings))


def prepare(config: PrepareConfig | None = None, /, **settings: Any) -> "Prepared":
    """Make a COCO folder from a category, and return its path and a summary of its content.

    The format is COCO's for object detection (https://cocodataset.org/#format-data). Masks keep every pixel.

    Returns:
        `dataset_dir` is the COCO folder. `train`, `val` and `test` count the images of each split: all, the good ones,
            the defective ones, and those of each type. `test` is None without a test split. `left_out` lists the images
            that were left out, each with `file` and `reason`. `reused` says whether the folder existed already.
            `tallies` are two counts, one of images and one of masks: how many are used, and the names of the others by
            reason.

    Raises:
        FlawmaskError: the category does not exist or has no defect; an image or a mask is bad and `on_error` is `stop`;
            or the output folder holds something else, or a data set made with other settings.
    """
    from flawmask.data import prepare

    return prepare.prepare(config or from_json(PrepareConfig, settings))


def import_labels(source: "ImportConfig | str | Path", /, **settings: Any) -> "Prepared":
    """Make a COCO folder from the labels of a labelling tool, and return its path and a summary of its content.

    docs/formats.md says which parts of each format are read.

    Args:
        source: a label file, or a folder with label files and images; or all settings as one object.
        **settings: the other settings by name. `output_dir` is required. `source_format` is `coco`, `cvat`, `labelme`,
            `via`, `labelstudio`, `yolo` or, by default, `auto`.

    Returns:
        What `prepare` returns.

    Raises:
        FlawmaskError: there are no labels of a known format; no image has a defect; a label or an image is bad and
            `on_error` is `stop`; or the output folder holds something else, or a data set made with other settings.
        UnusedError: an image or a label is not used, and `strict` is on.
    """
    from flawmask.data import import_labels

    if isinstance(source, ImportConfig):
        return import_labels.import_labels(source)
    return import_labels.import_labels(from_json(ImportConfig, {"source": str(source), **settings}))


def augment(config: AugmentConfig | None = None, /, **settings: Any) -> "Augmented":
    """Make a new COCO folder with variants of the training images added, and return its path.

    An image and its masks are transformed together. The original images of all splits are copied byte for byte.

    Returns:
        `dataset_dir` is the augmented COCO folder. `originals` and `variants` count the original training images and
            the added ones. `reused` says whether the folder existed already.

    Raises:
        FlawmaskError: the COCO folder is damaged, or the output folder holds something else, or a data set made with
            other settings.
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
        transform: a function that is applied to a training image each time it is shown. It takes the image, (height,
            width, 3) uint8 RGB; the masks of its N instances, (N, height, width) bool; their class names; and a NumPy
            random generator. It returns image, masks and names. The image may have another size. It takes the place of
            `train_augment`.
        callbacks: objects whose methods are called during training; see `flawmask.training.callbacks.Callback`.
        **settings: the settings by name, where no `config` is given.

    Returns:
        `run_dir` is the run folder, with `best.pt` and `last.pt`. `best_epoch` is the epoch of `best.pt`, counted from
            1. `history` is the content of `history.json`: for each metric, a list with a value for each epoch.

    Raises:
        FlawmaskError: the data set or the weights cannot be used; the device is not there; the output folder holds
            something else; the transform returned masks of another size than its image; or the loss is not finite.
        KeyboardInterrupt: Ctrl-C was pressed. The training has been saved, and `resume` continues it.
        SystemExit: the process received SIGTERM. The training has been saved, and `resume` continues it.
    """
    from flawmask.training import loop

    return loop.train(config or from_json(TrainConfig, settings), transform=transform, callbacks=callbacks)


def evaluate(config: EvaluateConfig | None = None, /, **settings: Any) -> "Evaluated":
    """Evaluate a checkpoint on a labelled split; return the metrics and the folder with the results.

    docs/metrics.md defines each metric and names its source.

    Returns:
        `metrics` is the content of `metrics.json`. Ratios are fractions from 0 to 1, times are seconds, and an
            undefined metric is None. `results_dir` is the folder with `metrics.json`, `report.html` and
            `predictions.json`.

    Raises:
        FlawmaskError: the checkpoint or the data set is damaged; they have different classes; an image cannot be read
            or was used for training; no threshold can be chosen; or the output folder holds something else.
    """
    from flawmask.evaluation import evaluate

    return evaluate.evaluate(config or from_json(EvaluateConfig, settings))


def predict(config: PredictConfig | None = None, /, **settings: Any) -> "Predicted":
    """Predict the defects on image files, write the predictions, and return which files have defects.

    For images in memory, or without writing files, use `Predictor`.

    Returns:
        `output` is the folder with `predictions.json`, `predictions.csv` and `overlays/`. `defective` and `good` are
            the paths of the files with and without a defect. `unreadable` gives the reason for each path that could not
            be read; `not_predicted` gives it for each other file in the input folders.

    Raises:
        FlawmaskError: there is no image at all; the checkpoint or the region of interest cannot be used; the output
            folder holds something else; or `strict` is on and an image was found that is not predicted.
    """
    from flawmask.inference import predict

    return predict.predict(config or from_json(PredictConfig, settings))


def predict_records(config: PredictConfig | None = None, /, **settings: Any) -> "Recorded":
    """Predict any number of images in flat memory, write their rows in parts, and return how many there are.

    `records` is the format, `jsonl` (the default) or `parquet`. Called again with the same settings, it goes on where
    an earlier call was interrupted. docs/formats.md describes the rows.

    Returns:
        `output` is the folder with the parts. `images`, `defective`, `good` and `without_verdict` are numbers of rows;
            those without a verdict have the reason. `not_predicted` is the number of other files among the inputs.

    Raises:
        FlawmaskError: there is no image at all; the checkpoint or the region of interest cannot be used; or the output
            folder holds something else, or rows of other settings. Nothing is written then.
    """
    from flawmask.inference import archive

    return archive.predict_records(config or from_json(PredictConfig, {"records": "jsonl", **settings}))


def export_model(config: ExportConfig | None = None, /, **settings: Any) -> "Exported":
    """Write a checkpoint for another runtime, prove that it predicts the same there, and return the folder.

    Returns:
        `folder` is the exported model, which `Predictor`, `predict` and `evaluate` take in place of a checkpoint.
            `parity` is the content of its `parity.json`, see docs/formats.md; None for an unproven export.

    Raises:
        FlawmaskError: the checkpoint or the data set cannot be used, a package is missing, or the export does not
            predict the same within the tolerance. No incomplete export is left.
    """
    from flawmask.export import export

    return export.export(config or from_json(ExportConfig, settings))


def compare(config: CompareConfig | None = None, /, **settings: Any) -> "Compared":
    """Train and evaluate several models on one data set; return a table of them and a recommendation.

    docs/metrics.md says how differences are tested.

    Returns:
        `folder` is the folder with `comparison.html`, `comparison.json` and a folder for each model. `head` and `body`
            are the table as text: its first row and its other rows. `said` holds sentences: the recommendation, what
            the metrics show, and notes on the protocol. `failed` says whether a model failed.

    Raises:
        FlawmaskError: the data set or the settings cannot be used. An error in a single model is shown in its column.
        KeyboardInterrupt: Ctrl-C was pressed. The same call continues the comparison.
        SystemExit: the process received SIGTERM. The same call continues the comparison.
    """
    from flawmask.comparison import compare

    return compare.compare(config or from_json(CompareConfig, settings))
