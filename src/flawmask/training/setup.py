"""The setup of a training: everything that is decided before its first step and written into its run folder."""

import logging
import math
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torchvision

import flawmask
from flawmask.coco import CocoSplit, read_split
from flawmask.coco_files import has_split
from flawmask.data import intensity
from flawmask.distributed import Processes
from flawmask.evaluation.leak import NAME as TRAINING_IMAGES
from flawmask.evaluation.leak import content_digests
from flawmask.files import check_output_folder, read_json, write_json
from flawmask.launch import usable_cores
from flawmask.model.architecture import Start
from flawmask.model.spec import ModelSpec
from flawmask.model.weights import Pretrained, pretrained
from flawmask.settings import as_json, require
from flawmask.tiles import Tiling
from flawmask.training import fit
from flawmask.training.augmentation import Augmentation
from flawmask.training.choose import choose_network
from flawmask.training.config import TrainConfig, seconds_in
from flawmask.training.learnable import check_learnable
from flawmask.training.loader import Augmenting, Transform
from flawmask.training.network import spec_for
from flawmask.training.resume import State
from flawmask.training.tile_choice import choose_tiles
from flawmask.training.tile_data import draws_of

log = logging.getLogger(__name__)

DEFAULT_BATCH = 4
"""Images per step and process if `--batch_size` is auto, which then decides only the micro-batch size."""

MADE_BY = "flawmask train"
"""The value of `made_by` in a run's `config.json`. A folder whose file says something else is never replaced."""


@dataclass(frozen=True)
class Setup:
    """The setup of a training: decided before its first step, unchanged from then on.

    Attributes:
        config: the settings.
        run_dir: the run folder.
        team: the processes that train together.
        device: where the network computes.
        dtype: the precision of its layers.
        training: the training split.
        validation: the validation split; None without one.
        spec: of the network.
        initial_weights: the weights that the network starts from. Empty for a resumed training, whose state has them.
        start: what the training began with, see `architecture.Start`.
        micro_batch_size: images per forward pass.
        batch_size: images per step, over all processes.
        digests: hashes of the training images' pixels, in the main process only.
        augmenting: the augmentation of training images; None without one.
    """

    config: TrainConfig
    run_dir: Path
    team: Processes
    device: torch.device
    dtype: torch.dtype
    training: CocoSplit
    validation: CocoSplit | None
    spec: ModelSpec
    initial_weights: Pretrained
    start: Start
    micro_batch_size: int
    batch_size: int
    digests: dict[str, str]
    augmenting: Augmenting | None = None

    @cached_property
    def images_per_epoch(self) -> int:
        """The number of images that an epoch shows; of tiles, with a network that sees tiles."""
        return _shown(self.training, self.spec.tiling)


def set_up(
    config: TrainConfig,
    state: State | None,
    team: Processes,
    device: torch.device,
    dtype: torch.dtype,
    began: float,
    transform: Transform | None = None,
) -> Setup:
    """Return the setup of a training. A resumed training keeps the setup of its state; otherwise the settings, the
    data, the memory and the time budget decide it."""
    training, validation = _splits(config)
    has_masks = not training.box_only_defects
    config = team.from_main(lambda: choose_network(config, len(training.images), has_masks=has_masks))
    config = team.from_main(lambda: choose_tiles(config, training))
    if state is not None:
        levels = state.model_spec.intensity
    else:
        splits = [training, *([validation] if validation else [])]
        levels = team.from_main(lambda: intensity.of_dataset(config.intensity, splits))
    digests = content_digests(training, levels) if team.is_main else {}
    if transform is not None:  # it takes the place of --train_augment, and a resumed training has to know that
        config = replace(config, train_augment="off")
    augmenting = _augmenting(config, transform, team)
    per_process = DEFAULT_BATCH if config.batch_size == "auto" else config.batch_size
    batch_size = state.batch_size if state else config.effective_batch_size or per_process * team.count
    tiling = Tiling(config.tile, int(config.overlap)) if isinstance(config.tile, int) else None
    shown, what = _shown(training, tiling), "images" if tiling is None else "tiles"
    require(
        team.count <= min(batch_size, shown),
        f"{team.count} processes cannot share a batch of {batch_size} of {shown} {what}: "
        "raise --effective_batch_size, or start fewer",
    )
    setup = partial(
        Setup,
        config,
        Path(str(config.output_dir)),
        team,
        device,
        dtype,
        training,
        validation,
        batch_size=batch_size,
        augmenting=augmenting,
    )
    if state is not None:
        _check_images_are_the_same(digests, config)
        spec = state.model_spec
        initial_weights = Pretrained({}, spec.norm, spec.norm_eps, "")
        return setup(spec, initial_weights, state.start, micro_batch_size=state.at_once, digests=digests)
    initial_weights = team.from_main(lambda: pretrained(config.network, config.weights, offline=config.offline))
    shard_size = math.ceil(batch_size / team.count)
    micro_batch_size, image_size = min(per_process, shard_size), config.image_size
    trial = fit.Trial(config, training, initial_weights, device, dtype, augmenting)
    if config.time_budget is not None and not isinstance(config.tile, int):
        remaining = seconds_in(config.time_budget) - (time.perf_counter() - began)
        image_size = team.from_main(lambda: fit.image_size_for(trial, remaining, batch_size, micro_batch_size))
    tried = spec_for(config, training, initial_weights, image_size, micro_batch_size)
    goes_one_by_one = device.type == "cpu" and tried.norm != "batch" and not tried.architecture.batches_on_cpu
    if goes_one_by_one and tried.architecture.has_known_counts:
        # On a CPU this is as fast as several images at once, and takes less than half the memory. No layer compares
        # images with each other here, so the result is the same.
        micro_batch_size = 1
    elif config.batch_size == "auto":
        micro_batch_size = team.from_main(lambda: fit.largest_micro_batch(trial, image_size, shard_size))
    spec = replace(spec_for(config, training, initial_weights, image_size, micro_batch_size), intensity=levels)
    return setup(spec, initial_weights, initial_weights.start, micro_batch_size=micro_batch_size, digests=digests)


def _augmenting(config: TrainConfig, transform: Transform | None, team: Processes) -> Augmenting | None:
    """Return the transform, or else the augmentation of the settings, after saying what that one does."""
    if transform is None and config.train_augment != "off":
        transform = Augmentation(config.train_augment)
        if team.is_main:
            log.info(
                "training images are mirrored, turned and made darker or brighter at random (--train_augment %s; off "
                "leaves them as they are)",
                config.train_augment,
            )
    return Augmenting(transform, config.seed) if transform else None


def _shown(training: CocoSplit, tiling: Tiling | None) -> int:
    """Return the number of images that an epoch shows; of tiles, with a network that sees tiles."""
    return len(training.images) if tiling is None else len(draws_of(training, tiling))


def _splits(config: TrainConfig) -> tuple[CocoSplit, CocoSplit | None]:
    """Return the training split, and the validation split where there is one."""
    dataset_dir = Path(str(config.dataset_dir))
    training = read_split(dataset_dir, "train", config)
    classes = len(training.categories)
    require(
        config.num_classes in (None, classes),
        f"--num_classes is {config.num_classes}, but {training.folder} has {classes}: "
        + ", ".join(training.class_names),
    )
    check_learnable(training, config.arch, config.good_name)
    training.warn(strict=config.strict)
    if not has_split(dataset_dir, "val"):
        require(config.select_by == "train_loss", f"--select_by {config.select_by} needs {dataset_dir / 'val'}")
        return training, None
    validation = read_split(dataset_dir, "val", config)
    require(
        validation.categories == training.categories,
        f"{dataset_dir} has other categories in train than in val: export both with the same ones",
    )
    validation.warn(strict=config.strict)
    return training, validation


def _check_images_are_the_same(digests: Mapping[str, str], config: TrainConfig) -> None:
    """Refuse to resume a run with other training images than it began with."""
    content = read_json(Path(str(config.output_dir)) / TRAINING_IMAGES)
    require(
        not digests or content.get("sha256_of_pixels") == dict(digests),
        f"--resume {config.output_dir}: {config.dataset_dir} has other images than when it began: start a new training",
    )


def check_run_folder(config: TrainConfig) -> None:
    """Refuse to replace a folder that is no run of Flawmask. Many programs write a `config.json`."""
    run_dir = Path(str(config.output_dir))
    check_output_folder(run_dir, "config.json", overwrite=config.overwrite, what="run")
    path = run_dir / "config.json"
    if path.is_file():
        content = read_json(path)
        require(
            isinstance(content, dict) and content.get("made_by") == MADE_BY,
            f"{run_dir} holds something else ({path} is not Flawmask's): name a new folder for the run",
        )


def begin_run(setup: Setup, part_of: Mapping[str, Any] | None, unmatched: list[str]) -> None:
    """Make the run folder and write `config.json`: settings, network, machine and versions.

    Args:
        setup: of the training.
        part_of: the settings of the pipeline, if the training is a stage of one.
        unmatched: a line for each tensor that only the network or only the initial weights have; see `not_loaded`.
    """
    config, device, run_dir = setup.config, setup.device, setup.run_dir
    check_run_folder(config)  # once more: somebody may have used the folder during the first epoch
    if run_dir.exists():
        shutil.rmtree(run_dir)  # an older run, as the check has shown; none of its files may remain
    write_json(
        run_dir / "config.json",
        {
            "made_by": MADE_BY,
            "settings": as_json(config),
            "part_of": part_of,
            "model": as_json(setup.spec),
            "weights": setup.initial_weights.source,
            "weights_licence": setup.initial_weights.licence,
            "not_loaded": unmatched,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "precision": str(setup.dtype).removeprefix("torch."),
            "processes": setup.team.count,
            "images_at_once": setup.micro_batch_size,
            "images_per_step": setup.batch_size,
            "cores": usable_cores(),
            "tally": {split.name: split.tally for split in (setup.training, setup.validation) if split is not None},
            "versions": {
                "flawmask": flawmask.__version__,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "python": platform.python_version(),
            },
        },
    )
