"""The settings of `train`."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from flawmask.data.intensity import IntensitySettings
from flawmask.model.arch import Arch, ArchChoice, architecture, is_chosen
from flawmask.settings import Classes, Device, Joining, Overwrite, Reading, Seed, Strict, Tiles, require

Log = Literal["none", "tensorboard", "mlflow"]
"""The experiment trackers. Each name but `none` is a Python package and the extra that installs it."""

KNOWN_WEIGHTS = ("auto", "coco", "imagenet", "none")
"""What `--weights` accepts besides a file."""

UNITS = {"h": 3600, "m": 60, "s": 1}


def seconds_in(text: str, flag: str = "--time_budget") -> float:
    """Return the seconds in a duration such as 45m, 1h30m, 90s or 2700.

    Raises:
        FlawmaskError: the text is no duration, or it is zero.
    """
    parts = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s?)?", text.strip())
    seconds = (
        sum(int(number) * unit for number, unit in zip(parts.groups(default="0"), UNITS.values(), strict=True))
        if parts
        else 0
    )
    require(seconds > 0, f"{flag} is {text!r}: give a time such as 45m, 1h30m or 90s")
    return float(seconds)


@dataclass(frozen=True, kw_only=True)
class LearnSettings(IntensitySettings, Tiles, Joining, Seed, Device, Classes, Reading):
    """How a network is trained, whichever network it is."""

    epochs: int = 50
    """Passes over all training images."""
    time_budget: str | None = None
    """Time for the whole training, such as 45m or 1h30m. It decides image size and epochs; --epochs is ignored."""
    save_every: str = "10m"
    """Steps (200) or time (10m, 1h) between two saves of the training. It is also saved after each epoch."""
    patience: int | None = None
    """Stop when the metric of --select_by has not improved for this number of epochs."""
    batch_size: int | Literal["auto"] = 4
    """Micro-batch: images per forward pass and process. auto: as many as fit into memory. On a CPU, it is mostly 1."""
    effective_batch_size: int | None = None
    """Images per step, over all micro-batches and processes. Default: one --batch_size per process, 4 with auto."""
    lr: float = 0.005
    """Learning rate of SGD after warm-up. With --optimizer auto, AdamW uses lr / 10, pretrained rfdetr lr / 50."""
    backbone_lr: float | None = None
    """Learning rate of the backbone, as a share of --lr. Default: 0.1 if only the backbone is pretrained, else 1."""
    ema: bool = False
    """Evaluate and save a moving average of the weights (EMA) instead of the weights themselves."""
    image_size: int = 800
    """Shorter side in pixels; time grows with its square. With --time_budget, the maximum. SSD: 300, SSDlite: 320."""
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    """auto: SGD if the whole network is pretrained, else AdamW at --lr / 10. rfdetr and EfficientNet-Lite: AdamW."""
    scheduler: Literal["cosine", "step", "constant"] = "cosine"
    """Fall of the learning rate. cosine: to 0. step: to a tenth after 2/3 and 8/9 of the steps. constant: none."""
    warmup_steps: int = 200
    """Steps in which the learning rate rises to --lr; at most a tenth of the training."""
    clip_norm: float = 5.0
    """Largest 2-norm of the gradient; longer gradients are scaled down to it."""
    norm: Literal["auto", "batch", "frozen", "group"] = "auto"
    """Normalisation layers. auto: frozen if pretrained; else batch, or group for ssdlite or --batch_size below 4."""
    trainable_layers: int | None = None
    """Backbone stages to train, 0 to 5, the last ones first. Default: 3 if the whole network is pretrained, else 5."""
    workers: int | None = None
    """Processes that read images. Default: the number of cores minus 1, at most 4; with a GPU at most 16."""
    cache_gb: float = 4.0
    """Disk space in GB for a temporary cache of images, resized or, with --train_augment strong, whole; 0: none."""
    semantic_head: Literal["auto", "off"] = "auto"
    """A branch that scores each pixel. auto: Mask R-CNN with EfficientNet-Lite has it. off: no network has it."""
    max_detections: int = 100
    """Maximum number of instances predicted on one image."""
    proposals: int | None = None
    """RPN proposals per image, highest objectness first; doubled in training. Default: 1.25 x image_size, min. 200."""
    roi_samples: int | None = None
    """R-CNN: region proposals per image that train the heads. Default: 32 per instance (32 to 512), 4 with masks."""
    anchor_sizes: tuple[int, int, int, int, int] | None = None
    """R-CNN and RetinaNet: five anchor sizes in pixels, smallest first. Default: 32 to 512 times image_size / 800."""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: record CUDA graphs of an R-CNN's passes, one per batch shape. on: fail if they cannot be recorded."""
    train_augment: Literal["off", "light", "strong"] = "light"
    """Random changes of training images. light: flips, turns, brightness. strong: also crops, blur, noise."""
    select_by: Literal["train_loss", "val_loss", "segm_ap", "f1"] = "train_loss"
    """Metric that chooses best.pt. All but train_loss use the validation split, whose metrics then look too good."""
    log: Log = "none"
    """Experiment tracker: tensorboard (in the run folder) or mlflow. Both also get mask AP and F1 of each epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("epochs", "batch_size", "effective_batch_size", "patience", "max_detections", "proposals")
        for name in (*counts, "roi_samples"):
            value = getattr(self, name)
            require(value in (None, "auto") or value >= 1, f"--{name} is {value}: it must be 1 or more")
        require(self.cache_gb >= 0, f"--cache_gb is {self.cache_gb}: it must be 0 or more")
        if self.time_budget is not None:
            seconds_in(self.time_budget)
        if not re.fullmatch(r"[1-9]\d{0,8}", self.save_every):
            seconds_in(self.save_every, "--save_every")
        require(0 < self.lr < float("inf"), f"--lr is {self.lr}: it must be above 0")
        share = self.backbone_lr
        require(share is None or 0 < share <= 1, f"--backbone_lr is {share}: it must be above 0 and at most 1")
        require(self.clip_norm > 0, f"--clip_norm is {self.clip_norm}: it must be above 0")
        require(64 <= self.image_size <= 10_000, f"--image_size is {self.image_size}: it must be 64 to 10000")
        require(self.warmup_steps >= 0, f"--warmup_steps is {self.warmup_steps}: it must be 0 or more")
        require(0 <= (self.workers or 0) <= 256, f"--workers is {self.workers}: it must be 0 to 256")
        layers = self.trainable_layers
        require(layers is None or 0 <= layers <= 5, f"--trainable_layers is {layers}: it must be 0 to 5")
        sizes = self.anchor_sizes or (1,)
        require(min(sizes) > 0, f"--anchor_sizes are {sizes}: they must be above 0")
        require(
            self.log == "none" or find_spec(self.log) is not None,
            f'--log {self.log} needs a package that is not installed: pip install "flawmask[{self.log}]"',
        )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(LearnSettings):
    """Which network is trained, and how."""

    arch: ArchChoice = "maskrcnn_resnet50_fpn"
    """The network. auto: chosen by device, weights, images and time. yolo needs the extra [yolo] (AGPL-3.0)."""
    weights: str = "auto"
    """Initial weights: coco, imagenet, none or a file. auto: COCO's if on the disk or online, else ImageNet's."""
    offline: bool = False
    """Download nothing; use weights that are on the disk already."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.weights)
        if not is_chosen(self.arch):
            require(self.weights in KNOWN_WEIGHTS, f"--weights {self.weights} is a file: name its network with --arch")
            return
        record = architecture(self.arch)
        known = self.weights != "imagenet" or record.imagenet is not None
        require(known, f"--weights imagenet: there are none for {self.arch}: give auto, none or a file's path")
        require(
            self.compile != "on" or record.is_recordable,
            f"--compile on: {self.arch} cannot be recorded as CUDA graphs, only R-CNNs can: use --compile auto",
        )
        require(
            record.has_masks or self.select_by != "segm_ap",
            f"--select_by segm_ap needs a network that predicts masks, and {self.arch} does not: use f1",
        )

    @property
    def network(self) -> Arch:
        """The network's name.

        Raises:
            ValueError: it is `auto`; `choose.choose_network` has to replace that first.
        """
        if is_chosen(self.arch):
            return self.arch
        raise ValueError("no network has been chosen")


def check_weights(weights: str) -> None:
    """Check the value of `--weights`.

    Raises:
        FlawmaskError: it is neither a known word nor a file.
    """
    require(
        weights in KNOWN_WEIGHTS or Path(weights).is_file(),
        f"--weights {weights}: no such file; give {', '.join(KNOWN_WEIGHTS)} or a file's path",
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainSettings, Overwrite, Strict):
    """Train a network on a COCO folder."""

    dataset_dir: Path | None = None
    """COCO folder, as prepare or augment writes it."""
    output_dir: Path | None = None
    """Folder to write the run to: best.pt, last.pt, history.json, config.json and pictures."""
    resume: Path | None = None
    """Resume this run from its last save, with its own settings. All other flags are ignored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        paths = (self.dataset_dir, self.output_dir)
        require(
            self.resume is not None or None not in paths, "give --dataset_dir and --output_dir, or the run to --resume"
        )
        if self.resume is None:
            self.check_tiles_of_training()
