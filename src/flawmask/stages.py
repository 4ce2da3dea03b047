"""The stages of a run, a cross-validation and a comparison, and the settings that these have in common."""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from flawmask.files import read_json
from flawmask.model.arch import ArchChoice
from flawmask.settings import Overwrite, Settings, Strict, require, stage
from flawmask.training.config import TrainSettings
from flawmask.training.learnable import check_learnable

log = logging.getLogger(__name__)

NAME_DATA = "name either a --category (a folder under --mvtec_root) or a --dataset_dir (a COCO folder)"


@dataclass(frozen=True, kw_only=True)
class DataPaths(Settings):
    """Where the images come from, and which steps of preparing them are skipped."""

    category: str | None = None
    """The category: a folder name under --mvtec_root; several as a,b,c; or all."""
    mvtec_root: Path = Path("datasets/mvtec")
    """The folder that holds the categories."""
    dataset_dir: Path | None = None
    """COCO folder (train/, val/) to start from, not a category. --folds, --group_by and --test_ratio divide it anew."""
    skip_prepare: bool = False
    """Use the data set that an earlier run prepared."""
    skip_augment: bool = False
    """Train without the variants of --augmentation_factor."""

    @property
    def is_named(self) -> bool:
        """Whether either a category or a data set is given."""
        return (self.category is None) != (self.dataset_dir is None)


def check_variants(augment_val: bool, skip_augment: bool) -> None:
    """Refuse to both make and skip variants."""
    require(not (augment_val and skip_augment), "--augment_val adds variants, and --skip_augment wants none: give one")


@dataclass(frozen=True, kw_only=True)
class RunPaths(DataPaths):
    """Where `run` starts, which steps it skips, and where its results go."""

    skip_train: bool = False
    """Train nothing; evaluate --model_dir instead."""
    skip_inference: bool = False
    """Stop after training."""
    resume: Path | None = None
    """Resume this run from its last save, with its own settings. All other flags are ignored."""
    model_dir: Path | None = None
    """With --skip_train, the run to evaluate; by default the newest of the same category in model_maskrcnn."""
    output_dir: Path | None = None
    """The folder for the run. With --folds, a stopped run in it continues. Default: a new folder in model_maskrcnn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.resume is not None or self.is_named, NAME_DATA)
        require(
            self.model_dir is None or self.skip_train,
            "--model_dir needs --skip_train: a training makes its own run folder",
        )
        no_folder = "--output_dir is the run folder of a training: leave it out with --skip_train"
        require(self.output_dir is None or not self.skip_train, no_folder)


# Dataclass fields, and so the flags in --help, are listed from the last base to the first.
@dataclass(frozen=True, kw_only=True)
class RunConfig(Overwrite, Strict, EvaluateSettings, TrainSettings, AugmentSettings, PrepareSettings, RunPaths):
    """Run all stages: prepare a category, train a network and evaluate it.

    Data sets go to datasets/maskrcnn_mvtec_<category>, results to --output_dir. By default, that is a new folder
    model_maskrcnn/maskrcnn_mvtec_<date>_<time>. With --folds, each image is evaluated by a model that was not trained
    on it. Repeat the command with --folds to continue a stopped cross-validation.
    """

    arch: ArchChoice = "auto"
    """The network. auto: chosen by device, weights, images and time. yolo needs the extra [yolo] (AGPL-3.0)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variants(self.augment_val, self.skip_augment)
        if self.resume is None and not self.skip_train:
            self.check_tiles_of_training()
            coarse = self.tile is None and self.tile_from == "coarse"
            require(not coarse, "--tile_from coarse is for tiles: give their side with --tile, or --tile auto")
        if not self.is_cross_validation:
            return
        skips = self.skip_prepare or self.skip_train or self.skip_inference
        require(not skips, "--folds runs all stages: leave out --skip_prepare, --skip_train and --skip_inference")
        uses_all = self.split == "val" and not self.test_ratio
        require(uses_all, "--folds evaluates every image: leave out --split and --test_ratio")
        fixed = self.conf != "auto"
        require(fixed, "--folds evaluates every image, so none is left to choose a threshold on: give --conf a number")

    @property
    def is_cross_validation(self) -> bool:
        """Whether this is a cross-validation over all folds."""
        return self.folds > 1 and self.fold is None


@dataclass(frozen=True)
class Finished:
    """The result of one category.

    Attributes:
        name: the category, or the data set's folder.
        run_dir: the run folder; None where an earlier stage failed.
        metrics: the content of `metrics.json`; None where nothing was evaluated.
        error: why the category failed; None where it did not.
    """

    name: str
    run_dir: Path | None
    metrics: dict[str, Any] | None
    error: str | None = None


def prepare_dataset(config: RunConfig, name: str) -> Path:
    """Make or reuse the COCO folder of a category, or of the data set that the settings name, and return it.

    Raises:
        FlawmaskError: see `prepare` and `import_labels`; or the folder holds labels in another format.
    """
    if config.dataset_dir is not None:
        return _divide_dataset(config, config.dataset_dir)
    settings = stage(PrepareConfig, config, category=name, output_dir=None)
    if not config.skip_prepare:
        return prepare(settings).dataset_dir
    require(settings.dataset_dir.is_dir(), f"{settings.dataset_dir} does not exist: run once without --skip_prepare")
    return settings.dataset_dir


def _divide_dataset(config: RunConfig, dataset_dir: Path) -> Path:
    """Return the COCO folder as it is or, where the settings ask for new splits, a folder with these."""
    names = split_names(dataset_dir)
    label_format = None if names else recognised(dataset_dir)
    if label_format is not None:
        command = shlex.join(["flawmask", "import", str(dataset_dir), "--output_dir", f"datasets/{dataset_dir.name}"])
        raise FlawmaskError(
            f"{dataset_dir} holds labels of {FORMATS[label_format].NAME} and no splits: make a COCO folder from it: "
            f"{command}"
        )
    if config.folds == 1 and not config.test_ratio and config.group_by is None:
        return dataset_dir
    require(
        "test" not in names or config.folds > 1 or config.test_ratio > 0,
        f"{dataset_dir} has a test split, and --group_by divides all images anew: give the test split's share with "
        "--test_ratio",
    )
    fold = f"fold{config.fold}of{config.folds}" if config.fold else "divided"
    target = Path("datasets") / f"{dataset_dir.resolve().name}_{fold}"
    if config.skip_prepare:
        require(target.is_dir(), f"{target} does not exist: run once without --skip_prepare")
        return target
    log.info("dividing all images of %s anew (%s)", dataset_dir, ", ".join(names))
    paths = {"source": dataset_dir, "source_format": "coco", "output_dir": target}
    return import_labels(stage(ImportConfig, config, **paths)).dataset_dir


def evaluated_splits(config: RunConfig, prepared_dir: Path) -> list[str]:
    """Return the splits to evaluate, in this order.

    A test split comes last, after the split that may choose the threshold. The metrics of the last split count.
    """
    has_test = config.split == "val" and "test" in split_names(prepared_dir)
    return [config.split, *(["test"] if has_test else [])]


def evaluate_run(config: RunConfig, run_dir: Path, dataset_dir: Path, splits: Sequence[str]) -> dict[str, Any]:
    """Evaluate a run on each split and return the metrics of the last split, which count."""
    from flawmask.evaluation.evaluate import evaluate

    for split in splits:
        evaluated = evaluate(replace(evaluation_of(config, run_dir, dataset_dir), split=split))
    return evaluated.metrics


def evaluation_of(config: RunConfig, run_dir: Path, dataset_dir: Path) -> EvaluateConfig:
    """Return the settings to evaluate a run: if they trained it, in the tiles that the training chose."""
    content = read_json(run_dir / "config.json") if not config.skip_train else {}
    tiles = {} if config.skip_train else own_tiles(config, content.get("model", {}).get("tile"))
    paths = {"model": run_dir / "best.pt", "dataset_dir": dataset_dir, "output_dir": None, "against": None}
    return stage(EvaluateConfig, config, **paths, **tiles)


def own_tiles(config: EvaluateSettings, tile: int | None) -> dict[str, Any]:
    """Return the changes of the settings with which a model sees its own tiles.

    Args:
        config: settings that may describe the tiles of another training.
        tile: the side of the model's tiles; None if it sees images whole.
    """
    return {"tile": None, "overlap": "auto", "tile_from": "all" if tile is None else config.tile_from}


def check_evaluation(config: RunConfig, prepared_dir: Path, names: Sequence[str]) -> None:
    """Check before the training that the splits can be evaluated after it.

    Raises:
        FlawmaskError: a split is missing, lacks good or defective images to choose a threshold with, or shows parts
            that another split uses for training or for choosing the threshold or the epoch.
    """
    trains = not config.skip_train and not config.allow_leak
    used_groups = set(read_split(prepared_dir, "train", config).groups or ()) if trains else set()
    for name in names:
        split = read_split(prepared_dir, name, config)
        if config.strict:
            split.warn(strict=True)
        shared = [group for group in split.groups or () if group in used_groups]
        if shared:
            raise FlawmaskError(
                f"{split.folder}: {len(shared)} of {len(split.images)} images show parts that another split uses "
                f"(for example {shared[0]}): keep each part in one split, or give --allow_leak"
            )
        if trains and name == "val" and (config.conf == "auto" or config.select_by != "train_loss"):
            used_groups.update(split.groups or ())
        defective = sum(split.is_defective(image) for image in split.images)
        if config.conf == "auto" and name == "val" and defective in (0, len(split.images)):
            lacking = "good" if defective else "defective"
            raise FlawmaskError(f"--conf auto: {split.folder} has no {lacking} image to choose a threshold with")


def check_training(config: RunConfig, prepared_dir: Path, arch: ArchChoice) -> None:
    """Check before anything is written that the data set can be trained on.

    Raises:
        FlawmaskError: there is nothing to learn, see `check_learnable`.
        UnusedError: an image or a label is not used, and `strict` is on.
    """
    training = read_split(prepared_dir, "train", config)
    check_learnable(training, arch, config.good_name)
    if config.strict:
        training.warn(strict=True)


def augment_dataset(config: RunConfig, prepared_dir: Path) -> Path:
    """Return the COCO folder to train on: with augmented variants or, if the settings want none, as it is."""
    if config.skip_augment or not config.augmentation_factor:
        return prepared_dir
    return augment(stage(AugmentConfig, config, dataset_dir=prepared_dir, output_dir=None)).dataset_dir
