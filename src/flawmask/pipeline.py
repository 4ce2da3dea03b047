"""prepare -> augment -> train -> evaluate, for one category or several; and what of it is skipped."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from flawmask.coco import read_split, split_names
from flawmask.data.augment import AugmentConfig, AugmentSettings, augment
from flawmask.data.demo import DemoConfig, generate
from flawmask.data.layouts import chosen_categories, names_in
from flawmask.data.prepare import PrepareConfig, PrepareSettings, prepare
from flawmask.errors import FlawmaskError
from flawmask.evaluation.config import EvaluateConfig, EvaluateSettings
from flawmask.files import read_json
from flawmask.inference.config import PredictConfig
from flawmask.launch import launched
from flawmask.settings import Overwrite, Settings, as_json, from_json, is_of, require
from flawmask.training.config import TrainConfig, TrainSettings

log = logging.getLogger(__name__)

RUNS = Path("model_maskrcnn")
"""Where `run` puts its results."""

NAME_DATA = "name either a --category (a folder under --mvtec_root) or a --dataset_dir (a COCO folder)"

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class DataPaths(Settings):
    """Where the images come from, and what of preparing them is left out."""

    category: str | None = None
    """The category: a folder name under --mvtec_root; several as a,b,c; or all."""
    mvtec_root: Path = Path("datasets/mvtec")
    """The folder that holds the categories."""
    dataset_dir: Path | None = None
    """Start from this labelled COCO folder (train/, val/) instead of a category."""
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
class RunConfig(Overwrite, EvaluateSettings, TrainSettings, AugmentSettings, PrepareSettings, RunPaths):
    """Go all the way: prepare a category, augment it, train on it, and judge the result.

    Results go to model_maskrcnn/maskrcnn_mvtec_<date>_<time>/, data sets to datasets/maskrcnn_mvtec_<category>. With
    --folds, all images are judged, each by a model that has not seen it; said again, it goes on where it stopped.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.crosses:
            return
        skips = self.skip_prepare or self.skip_train or self.skip_inference
        require(not skips, "--folds trains and judges: leave out --skip_prepare, --skip_train and --skip_inference")
        require(self.dataset_dir is None, "--folds divides a --category: it cannot start from a --dataset_dir")
        require(self.split == "val" and not self.test_ratio, "--folds judges every image: no --split, no --test_ratio")
        fixed = self.conf != "auto"
        require(fixed, "--folds judges every image, so none is left to choose a threshold on: give --conf a number")

    @property
    def crosses(self) -> bool:
        """Whether this is a cross-validation over all folds."""
        return self.folds > 1 and self.fold is None


@dataclass(frozen=True, kw_only=True)
class DemoCommand(DemoConfig):
    """Draw a small category of products with and without defects; with --run, try the whole pipeline on it."""

    run: bool = False
    """Prepare, augment, train, evaluate and predict on it, with settings for two processor cores and no download."""


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


def run(config: RunConfig) -> list[Finished]:
    """Run the pipeline for each category named and return what became of each.

    One category alone raises what goes wrong; of several, one that fails is reported and the others go on.

    Raises:
        FlawmaskError: see `prepare`, `augment`, `train` and `evaluate`.
    """
    require(
        launched() == 1,
        "run starts alone: only train and evaluate share their work among processes (prepare first, see docs/scale.md)",
    )
    if config.resume is not None:
        return [_go_on(config.resume)]
    if config.dataset_dir is not None:
        return [_finish(config, config.dataset_dir.name, config.dataset_dir)]
    _check_device(config)
    wanted = str(config.category)
    reads_root = not config.skip_prepare or wanted == "all"
    names = chosen_categories(config.mvtec_root, wanted, config.layout) if reads_root else names_in(wanted)
    require(bool(names), f"--category {wanted!r} names none: give one, several as a,b,c, or all")
    finished = []
    for name in names:
        try:
            finished.append(_one(config, name))
        except (FlawmaskError, OSError) as error:
            if len(names) == 1:
                raise
            log.error("%s: %s", name, error)
            finished.append(Finished(name, None, None, str(error)))
    return finished


def _go_on(run_dir: Path) -> Finished:
    """Go on with what `run` began in a folder: one training and its judgement, or the folds of a cross-validation."""
    from flawmask.training.loop import train

    folds = run_dir / "folds.json"
    path = folds if folds.is_file() else run_dir / "config.json"
    content = read_json(path)
    found = content.get("settings" if path == folds else "part_of") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise FlawmaskError(
            f"--resume {run_dir}: it is no run of the whole pipeline: try flawmask train --resume {run_dir}"
        )
    try:
        config = from_json(RunConfig, found)
    except TypeError:
        raise FlawmaskError(f"{path} was written by another version of Flawmask: start the run anew") from None
    if path == folds:
        return _one(config, str(config.category))
    train(TrainConfig(resume=run_dir), part_of=found)
    prepared_dir = config.dataset_dir or prepared(replace(config, skip_prepare=True), str(config.category))
    name = config.category or prepared_dir.name
    if config.skip_inference:
        return Finished(name, run_dir, None)
    return Finished(
        name,
        run_dir,
        judged(config, run_dir, Path(content["settings"]["dataset_dir"]), judged_splits(config, prepared_dir)),
    )


def _one(config: RunConfig, name: str) -> Finished:
    """Take one category through the pipeline, once or fold by fold."""
    if config.crosses:
        from flawmask.folds import cross_validate

        return cross_validate(config, name)
    return _finish(config, name, prepared(config, name))


def _check_device(config: RunConfig) -> None:
    """Refuse a device that is not there before anything is written, not when the training gets to it."""
    from flawmask.runtime import choose_device

    if config.device is not None:
        choose_device(config.device)


def prepared(config: RunConfig, category: str) -> Path:
    """Return the category's COCO folder, made or reused."""
    made = stage(PrepareConfig, config, category=category, output_dir=None)
    if not config.skip_prepare:
        return prepare(made).dataset_dir
    require(made.dataset_dir.is_dir(), f"{made.dataset_dir} does not exist: run once without --skip_prepare")
    return made.dataset_dir


def _finish(config: RunConfig, name: str, prepared_dir: Path) -> Finished:
    """Augment, train and judge from a COCO folder on."""
    from flawmask.training.loop import train

    splits = judged_splits(config, prepared_dir)
    if not config.skip_inference:
        check_judged(config, prepared_dir, splits)
    # Judging needs no variants, unless the validation images are to be judged as variants too.
    judges_only = config.skip_train and not config.skip_inference and not config.augment_val
    dataset_dir = prepared_dir if judges_only else augmented(config, prepared_dir)
    run_dir = None
    if not config.skip_train:
        with new_run_dir() as output_dir:
            settings = stage(TrainConfig, config, dataset_dir=dataset_dir, output_dir=output_dir)
            # Of several categories, what goes on later is this one.
            whole = replace(config, category=None if config.dataset_dir else name)
            run_dir = train(settings, part_of=as_json(whole)).run_dir
    if config.skip_inference:
        return Finished(name, run_dir, None)
    run_dir = run_dir or config.model_dir or _newest_run(prepared_dir)
    return Finished(name, run_dir, judged(config, run_dir, dataset_dir, splits))


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
        FlawmaskError: a split is not there, or cannot choose a threshold.
    """
    for name in names:
        split = read_split(prepared_dir, name)
        defective = sum(split.is_defective(image) for image in split.images)
        if config.conf == "auto" and name == "val" and defective in (0, len(split.images)):
            lacking = "good" if defective else "defective"
            raise FlawmaskError(f"--conf auto: {split.folder} has no {lacking} image to choose a threshold with")


def augmented(config: RunConfig, prepared_dir: Path) -> Path:
    """Return the COCO folder to train on: with variants, or as it was prepared where none are wanted."""
    if config.skip_augment or not config.augmentation_factor:
        return prepared_dir
    return augment(stage(AugmentConfig, config, dataset_dir=prepared_dir, output_dir=None)).dataset_dir


def stage(kind: type[Config], config: Settings, **given: Any) -> Config:
    """Return the stage's own config: what `given` does not say comes from the run's settings of the same name."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    shared = {field.name: getattr(config, field.name) for field in fields(config) if field.name in names}
    return kind(**{**shared, **given})


@contextmanager
def new_run_dir(suffix: str = "") -> Iterator[Path]:
    """Make and give a run folder named for this second, or for the next one that is free; an empty one goes again."""
    moment = datetime.now()
    while True:
        path = RUNS / f"maskrcnn_mvtec_{moment:%Y%m%d_%H%M%S}{suffix}"
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            moment += timedelta(seconds=1)
    try:
        yield path
    finally:
        if not any(path.iterdir()):
            path.rmdir()


def earlier(pattern: str, origin: Mapping[str, Any]) -> Path | None:
    """Return the newest folder under `RUNS` whose JSON file, found by its pattern, says this very origin; None where
    there is none. What else it says, of how far that came, is left aside."""
    for path in sorted(RUNS.glob(pattern), reverse=True):
        content = read_json(path)
        if is_of(content, origin):
            log.info("going on with %s", path.parent)
            return path.parent
    return None


def _newest_run(prepared_dir: Path) -> Path:
    """Return the newest run under `RUNS` that was trained on this data set or its augmented variant."""
    wanted = {prepared_dir.resolve(), prepared_dir.with_name(f"{prepared_dir.name}_augmented").resolve()}
    for path in sorted(RUNS.glob("maskrcnn_mvtec_*/best.pt"), reverse=True):
        config = path.with_name("config.json")
        if config.is_file() and Path(read_json(config)["settings"]["dataset_dir"]).resolve() in wanted:
            log.info("judging %s, the newest run on %s", path.parent, prepared_dir)
            return path.parent
    raise FlawmaskError(f"{RUNS} holds no run on {prepared_dir}: train one, or name one with --model_dir")


def demo(config: DemoCommand) -> list[Finished]:
    """Draw the demo category and, with `run`, take it through the whole pipeline, prediction included.

    The settings suit two processor cores and a network that starts from nothing.

    Raises:
        FlawmaskError: the folder holds something else, or a demo made with other settings.
    """
    drawn = generate(config)
    log.info("the demo category is in %s: %d images, %d of them defective", drawn.folder, drawn.images, drawn.defective)
    if not config.run:
        return []
    finished = run(
        RunConfig(
            category=config.category,
            mvtec_root=config.mvtec_root,
            arch="maskrcnn_resnet18_fpn",
            weights="none",
            image_size=160,
            epochs=6,
            augmentation_factor=1,
            overwrite=config.overwrite,
            seed=config.seed,
        )
    )
    run_dir = finished[0].run_dir
    if run_dir is not None:
        from flawmask.inference.predict import predict

        unseen = PrepareConfig(category=config.category).dataset_dir / "val" / "images"
        predict(PredictConfig(model=run_dir / "best.pt", input=(str(unseen),), output=run_dir / "predictions"))
    return finished
