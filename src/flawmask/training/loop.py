"""Training in full view: the step, the epoch, and what is written after it."""

import logging
import math
import os
import platform
import shutil
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN

import flawmask
from flawmask.coco import CocoSplit, read_split
from flawmask.errors import FlawmaskError
from flawmask.evaluation.evaluate import predict_split
from flawmask.evaluation.leak import content_digests, write_training_images
from flawmask.evaluation.measure import quick_figures
from flawmask.files import check_output_folder, read_json, write_json
from flawmask.model import checkpoint
from flawmask.model.build import ModelSpec, Norm, anchors_for, build, count_parameters, freeze, to_device
from flawmask.model.weights import Pretrained, load_matching, pretrained
from flawmask.progress import track
from flawmask.runtime import choose_device, choose_precision, compute_in, refuse_wrong_gradients, seed_everything
from flawmask.settings import as_json, require
from flawmask.training import loader
from flawmask.training.config import TrainConfig
from flawmask.training.curves import VALIDATION_FIGURES, draw_curves
from flawmask.training.pictures import draw_labels, draw_predictions, draw_train_batch
from flawmask.training.trackers import track_run

log = logging.getLogger(__name__)

Loss = dict[str, float]

LARGER_IS_BETTER = set(VALIDATION_FIGURES)

SMALLEST_NORM_BATCH = 4
"""Below this many images, BatchNorm's statistics are too noisy to learn with."""

TABLE_ROWS = 20
"""After so many epochs the table's head is logged once more."""

MADE_BY = "flawmask train"
"""What `config.json` of a run says; a folder whose file says otherwise is never replaced."""


@dataclass(frozen=True)
class Trained:
    """What `train` made.

    Attributes:
        run_dir: the folder with `best.pt`, `last.pt`, `history.json`, `config.json`, `curves.png`, `train_batch.jpg`,
            `labels.png` and, with `--log tensorboard`, `tensorboard/`.
        best_epoch: the epoch that `best.pt` comes from, counted from 1.
        history: the content of `history.json`: a list per figure, an entry per epoch.
    """

    run_dir: Path
    best_epoch: int
    history: dict[str, list[Any]]


@dataclass(frozen=True)
class Step:
    """Everything that a training step needs and that lives as long as the training."""

    model: MaskRCNN
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    device: torch.device
    clip_norm: float

    def __call__(self, batch: loader.Batch) -> Loss:
        """Take one step and return its losses by name, their sum as `train_loss`.

        Raises:
            FlawmaskError: the loss is not finite; the message names the images.
        """
        images, targets = loader.to_device(batch, self.device)
        losses = self.model(images, targets)
        total = sum(losses.values(), torch.zeros((), device=self.device))
        _require_finite(total.detach(), "loss", targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        length = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        if not self.scaler.is_enabled():  # the scaler skips such a step by itself, and scales less from then on
            _require_finite(length, "gradient", targets)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return {name: float(value.detach()) for name, value in {"train_loss": total, **losses}.items()}


def _require_finite(value: torch.Tensor, what: str, targets: list[loader.Target]) -> None:
    """Stop before a step that makes the weights NaN: so would be the boxes, on which RoIAlign can crash the process.

    Raises:
        FlawmaskError: the value is not finite; the message names the images.
    """
    if not torch.isfinite(value):
        shown = ", ".join(str(int(target["image_id"])) for target in targets)
        raise FlawmaskError(
            f"the {what} is {float(value)} on the images with the ids {shown}: look at them, or lower --lr"
        )


def train(config: TrainConfig) -> Trained:
    """Train a network on the `train` split of a COCO folder and write the run folder.

    The validation split, where there is one, gives `val_loss` and, with `select_by`, chooses the epoch.

    Raises:
        FlawmaskError: the data set or the weights cannot be used, the device is not there, the output folder holds
            something else, or the loss stopped being finite. Nothing is written, and nothing of an older run
            replaced, before the first epoch has gone well.
    """
    _check_run_folder(config)
    device = choose_device(config.device)
    refuse_wrong_gradients(device)
    dtype = choose_precision(config.precision, device)
    training, validation = _splits(config)
    digests = content_digests(training)
    given = pretrained(config.arch, config.weights)
    seed_everything(config.seed)
    spec = _spec(config, training, given)
    model = _start(config, spec, given, device)
    compute_in(model, device, dtype)
    make_loader = partial(loader.make_loader, seed=config.seed, workers=config.workers, pin=device.type == "cuda")
    batches = make_loader(training, config.batch_size, shuffle=True)
    val_batches = make_loader(validation, config.batch_size, shuffle=False) if validation else None
    step = _make_step(config, model, device, dtype, config.epochs * len(batches), bool(given.state))

    history: dict[str, list[Any]] = {}
    best_epoch, best_value = 0, math.inf
    begun = time.perf_counter()
    with track_run(config.log, config.output_dir, as_json(config)) as record:
        for epoch in range(1, config.epochs + 1):
            start = time.perf_counter()
            losses = _train_epoch(step, batches, f"epoch {epoch}/{config.epochs}")
            seconds = time.perf_counter() - start
            figures: dict[str, Any] = {"epoch": epoch, **losses, "val_loss": None}
            if val_batches is not None:
                figures |= _validation_loss(model, val_batches, device, config.seed)
            if validation is not None and (record or config.select_by in LARGER_IS_BETTER):
                figures |= _validation_figures(model, spec, validation)
            figures["learning_rate"] = step.optimizer.param_groups[0]["lr"]
            figures |= {"seconds": seconds, "images_per_second": len(training.images) / seconds}
            for name, value in figures.items():
                history.setdefault(name, []).append(value)
            best_value, is_best = _compare(figures[config.select_by], best_value, config.select_by)
            if epoch == 1:
                _begin_run(config, spec, given, device, dtype)
                write_training_images(digests, config.output_dir)
                draw_labels(training, spec, config.output_dir / "labels.png")
                # The order of a loader is its seed's: these are the batches that the first epoch began with.
                shown = loader.read(make_loader(training, config.batch_size, shuffle=True, workers=0, pin=False))
                draw_train_batch(model, shown, training, config.output_dir / "train_batch.jpg")
            facts = {"epoch": epoch, "train_loss": figures["train_loss"], "val_loss": figures["val_loss"]}
            if is_best:
                best_epoch = epoch
                checkpoint.save(config.output_dir / "best.pt", model, spec, **facts)
            checkpoint.save(config.output_dir / "last.pt", model, spec, **facts)
            write_json(config.output_dir / "history.json", history)
            draw_curves(history, best_epoch, config.select_by, config.output_dir / "curves.png")
            if record is not None:
                record(figures, draw_predictions(model, spec, validation) if validation else {})
            _log_epoch(figures, config.epochs, time.perf_counter() - begun, is_best)
    log.info("trained %s: best.pt is epoch %d by %s", config.output_dir, best_epoch, config.select_by)
    return Trained(config.output_dir, best_epoch, history)


def _check_run_folder(config: TrainConfig) -> None:
    """Refuse to replace anything but a run: many programs leave a `config.json`."""
    check_output_folder(config.output_dir, "config.json", overwrite=config.overwrite, what="run")
    path = config.output_dir / "config.json"
    if path.is_file():
        found = read_json(path)
        require(
            isinstance(found, dict) and found.get("made_by") == MADE_BY,
            f"{config.output_dir} holds something else ({path} is not Flawmask's): name a new folder for the run",
        )


def _splits(config: TrainConfig) -> tuple[CocoSplit, CocoSplit | None]:
    """Return the training split, and the validation split where there is one."""
    training = read_split(config.dataset_dir, "train")
    classes = len(training.categories)
    require(
        config.num_classes in (None, classes),
        f"--num_classes is {config.num_classes}, but {training.folder} has {classes}: "
        + ", ".join(training.class_names),
    )
    require(
        any(training.is_defective(image) for image in training.images),
        f"{training.folder / 'annotations.json'} has no defect annotated: there is nothing to learn",
    )
    if not (config.dataset_dir / "val").is_dir():
        require(config.select_by == "train_loss", f"--select_by {config.select_by} needs {config.dataset_dir / 'val'}")
        return training, None
    validation = read_split(config.dataset_dir, "val")
    require(
        validation.categories == training.categories,
        f"{config.dataset_dir} has other categories in train than in val: export both with the same ones",
    )
    return training, validation


def _spec(config: TrainConfig, training: CocoSplit, given: Pretrained) -> ModelSpec:
    return ModelSpec(
        arch=config.arch,
        classes=training.class_names,
        image_size=config.image_size,
        norm=_norm(config, given),
        norm_eps=given.norm_eps,
        anchor_sizes=config.anchor_sizes or anchors_for(config.image_size),
        max_detections=config.max_detections,
        proposals=config.proposals,
    )


def _norm(config: TrainConfig, given: Pretrained) -> Norm:
    """Return what normalises: pretrained statistics stay as they are, and a network that starts from nothing makes its
    own where a batch is large enough for them (docs/results.md has the comparison with GroupNorm)."""
    if config.norm != "auto":
        return config.norm
    if given.state:
        return given.norm
    return "batch" if config.batch_size >= SMALLEST_NORM_BATCH else "group"


def _start(config: TrainConfig, spec: ModelSpec, given: Pretrained, device: torch.device) -> MaskRCNN:
    """Return the network in training mode, its weights loaded, its first stages frozen, on the device."""
    model = build(spec)
    if given.state:
        filled, left = load_matching(model, given)
        log.info("%s: %d tensors loaded, %d left as drawn", given.source, filled, len(left))
        for line in left:
            log.info("  not loaded: %s", line)
    freeze(model, config.trainable_layers if config.trainable_layers is not None else 3 if given.state else 5)
    model.roi_heads.fg_bg_sampler.batch_size_per_image = config.roi_samples
    log.info("%s learns %.1f million numbers on %s", config.arch, count_parameters(model) / 1e6, device)
    return to_device(model, device).train()


def _make_step(
    config: TrainConfig,
    model: MaskRCNN,
    device: torch.device,
    dtype: torch.dtype,
    total_steps: int,
    is_pretrained: bool,
) -> Step:
    """Return the step with the optimiser that suits how the network starts.

    SGD at 0.005 is what pretrained weights are tuned for; from none it was seen to reach NaN within 100 images, and
    AdamW at a tenth of it trains.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd" or (config.optimizer == "auto" and is_pretrained):
        optimizer = torch.optim.SGD(parameters, lr=config.lr, momentum=0.9, weight_decay=0.0005, fused=True)
    else:
        rate = config.lr / 10 if config.optimizer == "auto" else config.lr
        log.info("AdamW at a learning rate of %g", rate)
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, fused=True)
    warmup = min(config.warmup_steps, total_steps // 10)
    factor = partial(_rate_factor, total=total_steps, warmup=warmup, scheduler=config.scheduler)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Step(model, optimizer, scheduler, scaler, device, config.clip_norm)


def _rate_factor(step: int, total: int, warmup: int, scheduler: str) -> float:
    """Return what the learning rate is multiplied by at a step, counted from 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if scheduler == "step":
        return 1.0 if done < 2 / 3 else 0.1 if done < 8 / 9 else 0.01
    return 1.0


def _train_epoch(step: Step, batches: DataLoader[Any], label: str) -> Loss:
    """Show every training image once and return the losses, averaged over the images."""
    step.model.train()
    sums: Loss = {}
    seen = 0
    for batch in track(loader.read(batches), label, total=len(batches)):
        size = len(batch[0])
        for name, value in step(batch).items():
            sums[name] = sums.get(name, 0.0) + value * size
        seen += size
    return {name: value / seen for name, value in sums.items()}


@torch.no_grad()
def _validation_loss(
    model: MaskRCNN, batches: DataLoader[Any], device: torch.device, seed: int
) -> dict[str, float | None]:
    """Return the loss on the validation split, on the same random regions each time and without a trace on training.

    None where it is not finite: training goes on, and JSON has no word for it.

    torchvision gives losses in training mode only; the norms alone are put into evaluation mode, so that they neither
    look at the batch nor learn from it.
    """
    total, seen = 0.0, 0
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch in loader.read(batches):
            images, targets = loader.to_device(batch, device)
            losses = model(images, targets)
            total += float(sum(losses.values())) * len(images)
            seen += len(images)
    return {"val_loss": total / seen if math.isfinite(total) else None}


def _validation_figures(model: MaskRCNN, spec: ModelSpec, split: CocoSplit) -> dict[str, float | None]:
    """Return mask AP and F1 at a confidence of 0.5 on the validation split."""
    model.eval()
    predictions, _ = predict_split(model, spec, split)
    return quick_figures(split, predictions)


def _compare(value: float | None, best: float, select_by: str) -> tuple[float, bool]:
    """Return the best value so far, smaller being better, and whether it is this one; an undefined one never is,
    unless there is no other."""
    cost = math.inf if value is None else -value if select_by in LARGER_IS_BETTER else value
    is_first = best == math.inf
    return (cost, True) if cost < best or is_first else (best, False)


def _log_epoch(figures: dict[str, Any], epochs: int, elapsed: float, is_best: bool) -> None:
    """Log a row of a table that reads the same in a terminal, above the progress bar, and in a file."""
    epoch = figures["epoch"]
    losses = {name: figures[name] for name in ("train_loss", "val_loss", *VALIDATION_FIGURES) if name in figures}
    cells = {
        "epoch": f"{epoch:{len(str(epochs))}}/{epochs}",
        **{name: "n/a" if value is None else f"{value:.4f}" for name, value in losses.items()},
        "lr": f"{figures['learning_rate']:.2e}",
        "images/s": f"{figures['images_per_second']:.1f}",
        "remaining": str(timedelta(seconds=round(elapsed / epoch * (epochs - epoch)))),
    }
    widths = [max(8, len(name), len(text)) for name, text in cells.items()]
    if epoch % TABLE_ROWS == 1:
        log.info("  ".join(name.rjust(width) for name, width in zip(cells, widths, strict=True)))
    row = "  ".join(text.rjust(width) for text, width in zip(cells.values(), widths, strict=True))
    log.info("%s%s", row, "  best so far" if is_best else "")


def _begin_run(
    config: TrainConfig, spec: ModelSpec, given: Pretrained, device: torch.device, dtype: torch.dtype
) -> None:
    """Make the run folder and write what the run is made with: settings, network, machine and versions."""
    _check_run_folder(config)  # once more: somebody may have used the folder during the first epoch
    if config.output_dir.exists():
        shutil.rmtree(config.output_dir)  # an older run, as was checked: nothing of it may stay beside the new
    write_json(
        config.output_dir / "config.json",
        {
            "made_by": MADE_BY,
            "settings": as_json(config),
            "model": as_json(spec),
            "weights": given.source,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "precision": str(dtype).removeprefix("torch."),
            "cores": os.cpu_count(),
            "versions": {
                "flawmask": flawmask.__version__,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "python": platform.python_version(),
            },
        },
    )
