"""What a training is made of: decided before its first step, and written into its run folder."""

import math
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
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
from flawmask.model.spec import ModelSpec
from flawmask.model.weights import Pretrained, pretrained
from flawmask.settings import as_json, require
from flawmask.training import fit
from flawmask.training.augmentation import Augmentation
from flawmask.training.choose import choose_network
from flawmask.training.config import TrainConfig, seconds_in
from flawmask.training.learnable import check_learnable
from flawmask.training.loader import Augmenting, Transform
from flawmask.training.resume import State
from flawmask.training.network import spec_for

DEFAULT_BATCH = 4
"""Images of a step in each process, where `--batch_size auto` decides how many of them pass through at once."""

MADE_BY = "flawmask train"
"""What `config.json` of a run says; a folder whose file says otherwise is never replaced."""


@dataclass(frozen=True)
class Setup:
    """What a training is made of, decided before its first step and unchanged from then on.

    Attributes:
        config: the settings.
        run_dir: where the run goes.
        team: the processes that share it.
        device: where the network computes.
        dtype: what its layers compute in.
        training: what it learns from.
        validation: what it is judged on; None for nothing.
        spec: the network's.
        initial_weights: the weights that it starts from; those of a training that goes on are in its state.
        is_pretrained: whether it started from any.
        micro_batch_size: images that pass through the network together.
        batch_size: images that a step learns from, over all processes.
        digests: of the training images' pixels, in the main process.
        augmenting: what changes training images each time that they are shown; None for nothing.
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
    is_pretrained: bool
    micro_batch_size: int
    batch_size: int
    digests: dict[str, str]
    augmenting: Augmenting | None = None


def set_up(
    config: TrainConfig,
    state: State | None,
    team: Processes,
    device: torch.device,
    dtype: torch.dtype,
    began: float,
    transform: Transform | None = None,
) -> Setup:
    """Return what the training is made of: as it was, or as settings, data, memory and time budget have it."""
    training, validation = _splits(config)
    has_masks = not training.boxes_alone
    config = team.from_main(lambda: choose_network(config, len(training.images), has_masks=has_masks))
    if state is not None:
        levels = state.model_spec.intensity
    else:
        splits = [training, *([validation] if validation else [])]
        levels = team.from_main(lambda: intensity.of_dataset(config.intensity, splits))
    digests = content_digests(training, levels) if team.is_main else {}
    if transform is None and config.train_augment != "off":
        transform = Augmentation(config.train_augment)
    each = DEFAULT_BATCH if config.batch_size == "auto" else config.batch_size
    batch_size = state.batch_size if state else config.effective_batch_size or each * team.count
    require(
        team.count <= min(batch_size, len(training.images)),
        f"{team.count} processes cannot share a batch of {batch_size} of {len(training.images)} images: "
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
        augmenting=Augmenting(transform, config.seed) if transform else None,
    )
    if state is not None:
        _check_images_are_the_same(digests, config)
        spec = state.model_spec
        initial_weights = Pretrained({}, spec.norm, spec.norm_eps, "")
        return setup(spec, initial_weights, state.is_pretrained, micro_batch_size=state.at_once, digests=digests)
    initial_weights = team.from_main(lambda: pretrained(config.network, config.weights, offline=config.offline))
    share = math.ceil(batch_size / team.count)
    micro_batch_size, image_size = min(each, share), config.image_size
    trial = fit.Trial(config, training, initial_weights, device, dtype)
    if config.time_budget is not None:
        left = seconds_in(config.time_budget) - (time.perf_counter() - began)
        image_size = team.from_main(lambda: fit.image_size_for(trial, left, batch_size, micro_batch_size))
    tried = spec_for(config, training, initial_weights, image_size, micro_batch_size)
    is_alone = device.type == "cpu" and tried.norm != "batch" and not tried.architecture.batches_on_cpu
    if is_alone and tried.architecture.has_known_counts:
        micro_batch_size = 1  # as fast as several on a CPU, in less than half the memory, and nothing looks at the others
    elif config.batch_size == "auto":
        micro_batch_size = team.from_main(lambda: fit.largest_micro_batch(trial, image_size, share))
    spec = replace(spec_for(config, training, initial_weights, image_size, micro_batch_size), intensity=levels)
    return setup(spec, initial_weights, bool(initial_weights.state), micro_batch_size=micro_batch_size, digests=digests)


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
    """Refuse to go on with a run on other images than it began with."""
    content = read_json(Path(str(config.output_dir)) / TRAINING_IMAGES)
    require(
        not digests or content.get("sha256_of_pixels") == dict(digests),
        f"--resume {config.output_dir}: the images of {config.dataset_dir} are not those that it began with",
    )


def check_run_folder(config: TrainConfig) -> None:
    """Refuse to replace anything but a run: many programs leave a `config.json`."""
    run_dir = Path(str(config.output_dir))
    check_output_folder(run_dir, "config.json", overwrite=config.overwrite, what="run")
    path = run_dir / "config.json"
    if path.is_file():
        found = read_json(path)
        require(
            isinstance(found, dict) and found.get("made_by") == MADE_BY,
            f"{run_dir} holds something else ({path} is not Flawmask's): name a new folder for the run",
        )


def begin_run(setup: Setup, part_of: Mapping[str, Any] | None, left: list[str]) -> None:
    """Make the run folder and write what the run is made with: settings, network, machine and versions.

    Args:
        setup: of the training.
        part_of: the settings of the pipeline that it is a stage of.
        left: a line for each tensor of the network, or of the weights that it starts from, which these do not fill.
    """
    config, device, run_dir = setup.config, setup.device, setup.run_dir
    check_run_folder(config)  # once more: somebody may have used the folder during the first epoch
    if run_dir.exists():
        shutil.rmtree(run_dir)  # an older run, as was checked: nothing of it may stay beside the new
    write_json(
        run_dir / "config.json",
        {
            "made_by": MADE_BY,
            "settings": as_json(config),
            "part_of": part_of,
            "model": as_json(setup.spec),
            "weights": setup.initial_weights.source,
            "weights_licence": setup.initial_weights.licence,
            "not_loaded": left,
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
