"""`run`: prepare, augment if asked to, train and evaluate, for one category or several, except what is skipped."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from flawmask.coco import read_split
from flawmask.data.demo import DemoConfig, generate
from flawmask.data.layouts import chosen_categories, names_in
from flawmask.data.prepare import PrepareConfig
from flawmask.errors import FlawmaskError, OutOfReachError
from flawmask.files import read_json
from flawmask.inference.config import PredictConfig
from flawmask.launch import world_size
from flawmask.model.arch import ArchChoice
from flawmask.runs import FOLDS, new_run_dir, newest_run
from flawmask.settings import as_json, from_json, require, stage
from flawmask.stages import (
    Finished,
    RunConfig,
    augment_dataset,
    check_evaluation,
    check_training,
    evaluate_run,
    evaluated_splits,
    prepare_dataset,
)
from flawmask.training.choose import choose_network
from flawmask.training.config import TrainConfig

log = logging.getLogger(__name__)

DEMO_SIZE = 256
"""The side of the demo's images in pixels."""


@dataclass(frozen=True, kw_only=True)
class DemoCommand(DemoConfig):
    """Draw a small category of parts with and without defects; with --run, try the whole pipeline on it."""

    run: bool = False
    """Prepare the category, train, evaluate and predict, with settings for two CPU cores and without downloads."""
    arch: ArchChoice = "auto"
    """The network. auto chooses by device and available weights."""


def run(config: RunConfig) -> list[Finished]:
    """Run the pipeline for each category and return a result for each.

    With one category, an error is raised. With several, it is logged, and the other categories go on.

    Raises:
        FlawmaskError: see `prepare`, `augment`, `train` and `evaluate`.
    """
    require(
        world_size() == 1,
        "start run as a single process: only train and evaluate use several (prepare first, see docs/scale.md)",
    )
    if config.resume is not None:
        return [_resume(config.resume)]
    _check_output_dir(config)
    if config.dataset_dir is not None:
        return [_run_category(config, config.dataset_dir.name)]
    _check_device(config)
    wanted = str(config.category)
    reads_root = not config.skip_prepare or wanted == "all"
    names = chosen_categories(config.mvtec_root, wanted, config) if reads_root else names_in(wanted)
    require(bool(names), f"--category {wanted!r} names none: give one, several as a,b,c, or all")
    require(len(names) == 1 or config.output_dir is None, "--output_dir takes one category: leave it out for several")
    finished = []
    for name in names:
        try:
            finished.append(_run_category(config, name))
        except (FlawmaskError, OSError) as error:
            if len(names) == 1:
                raise
            log.error("%s: %s", name, error)
            finished.append(Finished(name, None, None, str(error)))
    return finished


def _resume(run_dir: Path) -> Finished:
    """Continue a run folder of `run`: a training and its evaluation, or a cross-validation."""
    from flawmask.training.loop import train

    folds = run_dir / FOLDS
    path = folds if folds.is_file() else run_dir / "config.json"
    content = read_json(path)
    settings = content.get("settings" if path == folds else "part_of") if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise FlawmaskError(
            f"--resume {run_dir}: it is not a folder of flawmask run: use flawmask train --resume {run_dir}"
        )
    try:
        config = from_json(RunConfig, settings)
    except TypeError:
        raise FlawmaskError(f"{path} was written by another version of Flawmask: start the run anew") from None
    if path == folds:
        return _run_category(replace(config, output_dir=run_dir), config.category or Path(str(config.dataset_dir)).name)
    train(TrainConfig(resume=run_dir), part_of=settings)
    name = config.category or Path(str(config.dataset_dir)).name
    prepared_dir = prepare_dataset(replace(config, skip_prepare=True), name)
    if config.skip_inference:
        return Finished(name, run_dir, None)
    return Finished(
        name,
        run_dir,
        evaluate_run(config, run_dir, Path(content["settings"]["dataset_dir"]), evaluated_splits(config, prepared_dir)),
    )


def _run_category(config: RunConfig, name: str) -> Finished:
    """Run the pipeline for one category, once or fold by fold."""
    if config.is_cross_validation:
        from flawmask.folds import cross_validate

        return cross_validate(config, name)
    return _train_and_evaluate(config, name, prepare_dataset(config, name))


def _check_device(config: RunConfig) -> None:
    """Refuse a device that is not there before anything is written."""
    from flawmask.runtime import choose_device

    if config.device is not None:
        choose_device(config.device)


def _check_output_dir(config: RunConfig) -> None:
    """Refuse an `--output_dir` that holds something else before anything is written."""
    if config.output_dir is None:
        return
    if config.is_cross_validation:
        from flawmask.folds import check_output_dir

        check_output_dir(config)
        return
    from flawmask.training.setup import check_run_folder

    check_run_folder(stage(TrainConfig, config, dataset_dir=Path(), resume=None))


def _train_and_evaluate(config: RunConfig, name: str, prepared_dir: Path) -> Finished:
    """Train on a COCO folder, after augmenting it if asked to, and evaluate the result."""
    from flawmask.training.loop import train

    splits = evaluated_splits(config, prepared_dir)
    if not config.skip_train:
        check_training(config, prepared_dir, config.arch)
    if not config.skip_inference:
        check_evaluation(config, prepared_dir, splits)
    # Evaluation needs no augmented variants, unless --augment_val makes variants of validation images.
    only_evaluates = config.skip_train and not config.skip_inference and not config.augment_val
    dataset_dir = prepared_dir if only_evaluates else augment_dataset(config, prepared_dir)
    run_dir = None
    if not config.skip_train:
        training = read_split(dataset_dir, "train", config)
        config = choose_network(config, len(training.images), has_masks=not training.box_only_defects)
        with new_run_dir(output_dir=config.output_dir) as output_dir:
            settings = stage(TrainConfig, config, dataset_dir=dataset_dir, output_dir=output_dir)
            # With several categories, --resume continues only this one.
            run_config = replace(config, category=None if config.dataset_dir else name)
            run_dir = train(settings, part_of=as_json(run_config)).run_dir
    if config.skip_inference:
        return Finished(name, run_dir, None)
    run_dir = run_dir or config.model_dir or newest_run(prepared_dir)
    return Finished(name, run_dir, evaluate_run(config, run_dir, dataset_dir, splits))


def demo(config: DemoCommand) -> list[Finished]:
    """Draw the demo category and, with `run`, run the whole pipeline on it, prediction included.

    The settings suit two CPU cores. Nothing is downloaded: if there are no weights, the network starts without any.

    Raises:
        FlawmaskError: the folder holds something else, or a demo made with other settings.
    """
    drawn = generate(config)
    log.info("the demo category is in %s: %d images, %d of them defective", drawn.folder, drawn.images, drawn.defective)
    if not config.run:
        return []
    finished = run(_demo_settings(config, drawn.images))
    run_dir = finished[0].run_dir
    if run_dir is not None:
        from flawmask.inference.predict import predict

        images = PrepareConfig(category=config.category).dataset_dir / "val" / "images"
        predict(PredictConfig(model=run_dir / "best.pt", input=(str(images),), output_dir=run_dir / "predictions"))
    return finished


def _demo_settings(config: DemoCommand, images: int) -> RunConfig:
    """Return the settings of the pipeline for the demo category."""
    settings = RunConfig(
        category=config.category,
        mvtec_root=config.mvtec_root,
        arch=config.arch,
        offline=True,
        image_size=DEMO_SIZE,
        batch_size=2,
        epochs=5,
        overwrite=config.overwrite,
        seed=config.seed,
    )
    try:
        return choose_network(settings, images)
    except OutOfReachError as error:
        log.info("%s", error)
        # Without pretrained weights, training needs more steps: each image and a variant of it.
        untrained = replace(settings, weights="none", image_size=160, epochs=6, batch_size=4, train_augment="off")
        untrained = replace(untrained, augmentation_factor=1)
        return choose_network(untrained, images)
