"""prepare -> augment -> train -> evaluate, for one category or several; and what of it is skipped."""

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
from flawmask.stages import Finished, RunConfig, augmented, check_judged, check_trained, judged, judged_splits, prepared
from flawmask.training.choose import choose_network
from flawmask.training.config import TrainConfig

log = logging.getLogger(__name__)

DEMO_SIZE = 256
"""Pixels: that of the images that are drawn."""


@dataclass(frozen=True, kw_only=True)
class DemoCommand(DemoConfig):
    """Draw a small category of products with and without defects; with --run, try the whole pipeline on it."""

    run: bool = False
    """Prepare, train, evaluate and predict on it, with settings for two processor cores and no download."""
    arch: ArchChoice = "auto"
    """The network to try. auto: what suits the device and the weights that are there already."""


def run(config: RunConfig) -> list[Finished]:
    """Run the pipeline for each category named and return what became of each.

    One category alone raises what goes wrong; of several, one that fails is reported and the others go on.

    Raises:
        FlawmaskError: see `prepare`, `augment`, `train` and `evaluate`.
    """
    require(
        world_size() == 1,
        "run starts alone: only train and evaluate share their work among processes (prepare first, see docs/scale.md)",
    )
    if config.resume is not None:
        return [_go_on(config.resume)]
    if config.dataset_dir is not None:
        return [_one(config, config.dataset_dir.name)]
    _check_device(config)
    wanted = str(config.category)
    reads_root = not config.skip_prepare or wanted == "all"
    names = chosen_categories(config.mvtec_root, wanted, config) if reads_root else names_in(wanted)
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

    folds = run_dir / FOLDS
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
        return _one(config, config.category or Path(str(config.dataset_dir)).name)
    train(TrainConfig(resume=run_dir), part_of=found)
    name = config.category or Path(str(config.dataset_dir)).name
    prepared_dir = prepared(replace(config, skip_prepare=True), name)
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


def _finish(config: RunConfig, name: str, prepared_dir: Path) -> Finished:
    """Augment, train and judge from a COCO folder on."""
    from flawmask.training.loop import train

    splits = judged_splits(config, prepared_dir)
    if not config.skip_train:
        check_trained(config, prepared_dir, config.arch)
    if not config.skip_inference:
        check_judged(config, prepared_dir, splits)
    # Judging needs no variants, unless the validation images are to be judged as variants too.
    judges_only = config.skip_train and not config.skip_inference and not config.augment_val
    dataset_dir = prepared_dir if judges_only else augmented(config, prepared_dir)
    run_dir = None
    if not config.skip_train:
        training = read_split(dataset_dir, "train", config)
        config = choose_network(config, len(training.images), has_masks=not training.boxes_alone)
        with new_run_dir() as output_dir:
            settings = stage(TrainConfig, config, dataset_dir=dataset_dir, output_dir=output_dir)
            # Of several categories, what goes on later is this one.
            whole = replace(config, category=None if config.dataset_dir else name)
            run_dir = train(settings, part_of=as_json(whole)).run_dir
    if config.skip_inference:
        return Finished(name, run_dir, None)
    run_dir = run_dir or config.model_dir or newest_run(prepared_dir)
    return Finished(name, run_dir, judged(config, run_dir, dataset_dir, splits))


def demo(config: DemoCommand) -> list[Finished]:
    """Draw the demo category and, with `run`, take it through the whole pipeline, prediction included.

    The settings suit two processor cores. Nothing is downloaded: without weights at hand, a network starts from none.

    Raises:
        FlawmaskError: the folder holds something else, or a demo made with other settings.
    """
    drawn = generate(config)
    log.info("the demo category is in %s: %d images, %d of them defective", drawn.folder, drawn.images, drawn.defective)
    if not config.run:
        return []
    finished = run(_demo_run(config, drawn.images))
    run_dir = finished[0].run_dir
    if run_dir is not None:
        from flawmask.inference.predict import predict

        unseen = PrepareConfig(category=config.category).dataset_dir / "val" / "images"
        predict(PredictConfig(model=run_dir / "best.pt", input=(str(unseen),), output=run_dir / "predictions"))
    return finished


def _demo_run(config: DemoCommand, images: int) -> RunConfig:
    """Return the settings with which the demo category is taken through the pipeline."""
    settings = RunConfig(
        category=config.category,
        mvtec_root=config.mvtec_root,
        arch=config.arch,
        offline=True,
        image_size=DEMO_SIZE,
        epochs=8,
        skip_augment=True,
        overwrite=config.overwrite,
        seed=config.seed,
    )
    try:
        return choose_network(settings, images)
    except OutOfReachError as error:
        log.info("%s", error)
        # From nothing, the same images have to be shown more often.
        bare = replace(settings, weights="none", image_size=160, epochs=6, skip_augment=False, augmentation_factor=1)
        return choose_network(bare, images)
