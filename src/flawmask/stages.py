"""The stages that a run, a cross-validation and a comparison are made of, and the settings of all of them."""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flawmask.coco import read_split
from flawmask.coco_files import split_names
from flawmask.data.augment import AugmentConfig, AugmentSettings, augment
from flawmask.data.import_labels import ImportConfig, import_labels
from flawmask.data.imports import FORMATS, recognised
from flawmask.data.prepare import PrepareConfig, PrepareSettings, prepare
from flawmask.errors import FlawmaskError
from flawmask.evaluation.config import EvaluateConfig, EvaluateSettings
from flawmask.model.arch import ArchChoice
from flawmask.settings import Overwrite, Settings, Strict, require, stage
from flawmask.training.config import TrainSettings
from flawmask.training.learnable import check_learnable

log = logging.getLogger(__name__)

NAME_DATA = "name either a --category (a folder under --mvtec_root) or a --dataset_dir (a COCO folder)"


@dataclass(frozen=True, kw_only=True)
class DataPaths(Settings):
    """Where the images come from, and what of preparing them is left out."""

    category: str | None = None
    """The category: a folder name under --mvtec_root; several as a,b,c; or all."""
    mvtec_root: Path = Path("datasets/mvtec")
    """The folder that holds the categories."""
    dataset_dir: Path | None = None
    """Start from this COCO folder (train/, val/) instead; --folds, --group_by and --test_ratio divide it anew."""
    skip_prepare: bool = False
    """Use the data set that is there already."""
    skip_augment: bool = False
    """Train on the prepared images alone."""

    @property
    def is_named(self) -> bool:
        """Whether either a category or a data set is given."""
        return (self.category is None) != (self.dataset_dir is None)


@dataclass(frozen=True, kw_only=True)
class RunPaths(DataPaths):
    """Where `run` starts, and what it leaves out."""

    skip_train: bool = False
    """Train nothing; judge --model_dir."""
    skip_inference: bool = False
    """Stop after training."""
    resume: Path | None = None
    """Go on with this run folder at the stage that it was in, with its own settings; all other flags are left aside."""
    model_dir: Path | None = None
    """With --skip_train, the run to judge; by default the newest of the same category."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.resume is not None or self.is_named, NAME_DATA)
        require(self.model_dir is None or self.skip_train, "--model_dir is for --skip_train: a training makes its own")


# Dataclass fields, and so the flags in --help, are listed from the last base to the first.
@dataclass(frozen=True, kw_only=True)
class RunConfig(Overwrite, Strict, EvaluateSettings, TrainSettings, AugmentSettings, PrepareSettings, RunPaths):
    """Go all the way: prepare a category, augment it, train on it, and judge the result.

    Results go to model_maskrcnn/maskrcnn_mvtec_<date>_<time>/, data sets to datasets/maskrcnn_mvtec_<category>. With
    --folds, all images are judged, each by a model that has not seen it; said again, it goes on where it stopped.
    """

    arch: ArchChoice = "auto"
    """The network. auto: what suits device, weights at hand, images and time; a line says which and why. Mask R-CNN,
    yolo-seg and rfdetr-seg outline defects, the others find boxes. yolo needs the extra [yolo] (AGPL-3.0), rfdetr the
    extra [rfdetr]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.crosses:
            return
        skips = self.skip_prepare or self.skip_train or self.skip_inference
        require(not skips, "--folds trains and judges: leave out --skip_prepare, --skip_train and --skip_inference")
        require(self.split == "val" and not self.test_ratio, "--folds judges every image: no --split, no --test_ratio")
        fixed = self.conf != "auto"
        require(fixed, "--folds judges every image, so none is left to choose a threshold on: give --conf a number")

    @property
    def crosses(self) -> bool:
        """Whether this is a cross-validation over all folds."""
        return self.folds > 1 and self.fold is None


@dataclass(frozen=True)
class Finished:
    """What became of one category.

    Attributes:
        name: the category, or the data set's folder.
        run_dir: the run folder; None where it failed before.
        metrics: the content of `metrics.json`; None where it was not judged.
        error: why it failed; None where it did not.
    """

    name: str
    run_dir: Path | None
    metrics: dict[str, Any] | None
    error: str | None = None


def prepared(config: RunConfig, name: str) -> Path:
    """Return the COCO folder of a category, or of the data set that the settings name, made or reused.

    Raises:
        FlawmaskError: see `prepare` and `import_labels`; or the data set's folder holds labels of another kind.
    """
    if config.dataset_dir is not None:
        return _divided(config, config.dataset_dir)
    made = stage(PrepareConfig, config, category=name, output_dir=None)
    if not config.skip_prepare:
        return prepare(made).dataset_dir
    require(made.dataset_dir.is_dir(), f"{made.dataset_dir} does not exist: run once without --skip_prepare")
    return made.dataset_dir


def _divided(config: RunConfig, dataset_dir: Path) -> Path:
    """Return the COCO folder as it is, or divided anew where the settings say how."""
    names = split_names(dataset_dir)
    found = None if names else recognised(dataset_dir)
    if found is not None:
        made = shlex.join(["flawmask", "import", str(dataset_dir), "--output_dir", f"datasets/{dataset_dir.name}"])
        raise FlawmaskError(
            f"{dataset_dir} holds labels of {FORMATS[found].NAME} and no splits: make a COCO folder of it with {made}"
        )
    if config.folds == 1 and not config.test_ratio and config.group_by is None:
        return dataset_dir
    require(
        "test" not in names or config.folds > 1 or config.test_ratio > 0,
        f"{dataset_dir} has a test split, and --group_by divides all anew: say with --test_ratio how much is held back",
    )
    fold = f"fold{config.fold}of{config.folds}" if config.fold else "divided"
    target = Path("datasets") / f"{dataset_dir.resolve().name}_{fold}"
    if config.skip_prepare:
        require(target.is_dir(), f"{target} does not exist: run once without --skip_prepare")
        return target
    log.info("dividing the images of %s anew, those of %s together", dataset_dir, ", ".join(names))
    given = {"source": dataset_dir, "source_format": "coco", "output_dir": target}
    return import_labels(stage(ImportConfig, config, **given)).dataset_dir


def judged_splits(config: RunConfig, prepared_dir: Path) -> list[str]:
    """Return the splits that are judged, in their order. A test split comes after the one that may have chosen the
    threshold, and its figures are those that count."""
    has_test = config.split == "val" and "test" in split_names(prepared_dir)
    return [config.split, *(["test"] if has_test else [])]


def judged(config: RunConfig, run_dir: Path, dataset_dir: Path, splits: Sequence[str]) -> dict[str, Any]:
    """Judge a run on each split and return the metrics of the last one, which count."""
    from flawmask.evaluation.evaluate import evaluate

    for split in splits:
        place = {"model": run_dir / "best.pt", "dataset_dir": dataset_dir, "output_dir": None}
        found = evaluate(stage(EvaluateConfig, config, **place, split=split, against=None))
    return found.metrics


def check_judged(config: RunConfig, prepared_dir: Path, names: Sequence[str]) -> None:
    """Refuse what could not be judged after the training, before it.

    Raises:
        FlawmaskError: a split is not there, cannot choose a threshold, or shows parts that train, or that are on the
            split that chooses the threshold or the epoch.
    """
    trains = not config.skip_train and not config.allow_leak
    used = set(read_split(prepared_dir, "train", config).groups or ()) if trains else set()
    for name in names:
        split = read_split(prepared_dir, name, config)
        if config.strict:
            split.warn(strict=True)
        seen = [group for group in split.groups or () if group in used]
        if seen:
            raise FlawmaskError(
                f"{split.folder}: {len(seen)} of {len(split.images)} images show parts that another split uses "
                f"({seen[0]} for one): keep each part on one split, or say --allow_leak"
            )
        if trains and name == "val" and (config.conf == "auto" or config.select_by != "train_loss"):
            used.update(split.groups or ())
        defective = sum(split.is_defective(image) for image in split.images)
        if config.conf == "auto" and name == "val" and defective in (0, len(split.images)):
            lacking = "good" if defective else "defective"
            raise FlawmaskError(f"--conf auto: {split.folder} has no {lacking} image to choose a threshold with")


def check_trained(config: RunConfig, prepared_dir: Path, arch: ArchChoice) -> None:
    """Refuse what could not be trained on, before anything is written.

    Raises:
        FlawmaskError: there is nothing to learn, see `check_learnable`.
        UnusedError: something is not used, and `strict` is on.
    """
    training = read_split(prepared_dir, "train", config)
    check_learnable(training, arch, config.good_name)
    if config.strict:
        training.warn(strict=True)


def augmented(config: RunConfig, prepared_dir: Path) -> Path:
    """Return the COCO folder to train on: with variants, or as it was prepared where none are wanted."""
    if config.skip_augment or not config.augmentation_factor:
        return prepared_dir
    return augment(stage(AugmentConfig, config, dataset_dir=prepared_dir, output_dir=None)).dataset_dir
