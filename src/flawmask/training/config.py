"""The settings of `train`."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from flawmask.model.arch import Arch
from flawmask.settings import Classes, Device, Overwrite, Seed, require

Log = Literal["none", "tensorboard", "mlflow"]
"""Who is told what happens while a network learns: each but none is a package and the extra that installs it."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Seed, Device, Classes):
    """What is trained, and how."""

    epochs: int = 50
    """How often every training image is shown."""
    batch_size: int = 4
    """Images per step. Halve it when memory runs out."""
    lr: float = 0.005
    """Learning rate after warm-up, of SGD. Where --optimizer auto takes AdamW, a tenth of it."""
    arch: Arch = "maskrcnn_resnet50_fpn"
    """The network. resnet18 and mobilenet are faster and enough for many parts."""
    weights: str = "coco"
    """What it starts from: coco, imagenet (downloaded once), none, or a file. No COCO weights: ImageNet's instead."""
    image_size: int = 800
    """Pixels of the shorter side after resizing. Time grows with its square; small defects need it large."""
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    """auto is SGD from pretrained weights, and from none AdamW at a tenth of --lr."""
    scheduler: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate falls: along a cosine to 0, to a tenth after 2/3 and 8/9 of the steps, or not at all."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises from nothing; at most a tenth of all steps."""
    clip_norm: float = 5.0
    """The longest gradient that a step may follow, as its 2-norm."""
    norm: Literal["auto", "batch", "frozen", "group"] = "auto"
    """What normalises. auto: frozen from pretrained weights; from none batch, or group below a --batch_size of 4."""
    trainable_layers: int | None = None
    """How many of the backbone's five stages learn, counted from the heads; by default 3, and 5 from no weights."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "auto"
    """What training computes in; auto is bf16 where the hardware has it. Evaluation is always in fp32."""
    workers: int | None = None
    """Processes that read images; by default one less than there are cores, 4 at most."""
    max_detections: int = 100
    """The most instances that one image can have."""
    proposals: int = 1000
    """Regions of an image that the heads look at; twice as many while training. Fewer are faster on small images."""
    roi_samples: int = 128
    """Regions per image on which the heads learn; torchvision takes 512, few of which a part with few defects needs."""
    anchor_sizes: tuple[int, int, int, int, int] | None = None
    """Five anchor sizes in pixels of the resized image, smallest first; by default 32 to 512 times image_size / 800."""
    select_by: Literal["train_loss", "val_loss", "segm_ap", "f1"] = "train_loss"
    """What decides which epoch becomes best.pt. All but train_loss spend the validation split: its figures flatter."""
    log: Log = "none"
    """Where to follow the training: tensorboard (in the run folder) or mlflow; each adds mask AP and F1 per epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size", "max_detections", "proposals", "roi_samples"):
            value = getattr(self, name)
            require(value >= 1, f"--{name} is {value}: it must be 1 or more")
        require(0 < self.lr < float("inf"), f"--lr is {self.lr}: it must be above 0")
        require(self.clip_norm > 0, f"--clip_norm is {self.clip_norm}: it must be above 0")
        require(self.image_size >= 64, f"--image_size is {self.image_size}: it must be 64 or more")
        known = ("coco", "imagenet", "none")
        require(
            self.weights in known or Path(self.weights).is_file(),
            f"--weights {self.weights}: no such file; give {', '.join(known)} or a file's path",
        )
        require(self.warmup_steps >= 0, f"--warmup_steps is {self.warmup_steps}: it must be 0 or more")
        require((self.workers or 0) >= 0, f"--workers is {self.workers}: it must be 0 or more")
        layers = self.trainable_layers
        require(layers is None or 0 <= layers <= 5, f"--trainable_layers is {layers}: it must be 0 to 5")
        sizes = self.anchor_sizes or (1,)
        require(min(sizes) > 0, f"--anchor_sizes are {sizes}: they must be above 0")
        require(
            self.log == "none" or find_spec(self.log) is not None,
            f'--log {self.log} needs a package that is not installed: pip install "flawmask[{self.log}]"',
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainSettings, Overwrite):
    """Train a Mask R-CNN on a COCO folder."""

    dataset_dir: Path
    """The COCO folder, as prepare or augment makes it."""
    output_dir: Path
    """Where the run goes: best.pt, last.pt, history.json, config.json and pictures."""
