"""The settings of `compare`."""

from dataclasses import dataclass
from pathlib import Path

from flawmask.data.augment import AugmentSettings
from flawmask.data.prepare import PrepareSettings
from flawmask.evaluation.config import EvaluateSettings
from flawmask.model.arch import ARCHITECTURES
from flawmask.settings import Overwrite, Strict, require, stage
from flawmask.stages import NAME_DATA, DataPaths, RunConfig
from flawmask.training.config import KNOWN_WEIGHTS, LearnSettings, check_weights

CLASSIFIER, PATCHCORE = "resnet18_classifier", "patchcore"

PUBLISHED = ("auto", "coco", "imagenet")
"""What `--weights` says of a yardstick whose weights are those that torchvision publishes."""

YARDSTICKS = (CLASSIFIER, PATCHCORE)
"""What detectors are held against: a classifier of whole images, and a model that sees good parts alone."""


# Dataclass fields, and so the flags in --help, are listed from the last base to the first.
@dataclass(frozen=True, kw_only=True)
class CompareConfig(Overwrite, Strict, EvaluateSettings, LearnSettings, AugmentSettings, PrepareSettings, DataPaths):
    """Train several models on the same images with the same budget, judge them on the same images, and say what shows.

    The budget is --epochs or --time_budget, for each. Results go to
    model_maskrcnn/maskrcnn_mvtec_<date>_<time>_comparison; said again, it goes on where it stopped.
    """

    category: str | None = None
    """The category: a folder name under --mvtec_root."""
    archs: str = "auto"
    """The networks, as a,b,c: any that --arch of train knows. auto: the one that run takes, and of ssd300_vgg16 and
    yolo11n-seg those that have weights to start from."""
    yardsticks: str = "resnet18_classifier,patchcore"
    """What they are held against: resnet18_classifier, patchcore (needs the extra [anomalib]), both, or none."""
    weights: str = "auto"
    """What they start from: auto (COCO's, else ImageNet's), coco, imagenet, none, or a file; for single ones name=FILE,
    as in none,patchcore=wide_resnet50_2.pth."""
    offline: bool = False
    """Download nothing: take weights that are there already."""
    overwrite: bool = False
    """Begin a new comparison, whatever was finished of an earlier one, and make the data sets anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.is_named, NAME_DATA)
        single = self.category is None or ("," not in self.category and self.category != "all")
        require(single, f"--category {self.category}: compare takes one category at a time")
        require(self.fold is None, "--fold is for a single training: compare trains each fold, or one split")
        archs = self.arch_names
        unknown = [name for name in archs if name not in ARCHITECTURES and self.archs != "auto"]
        require(bool(archs) and not unknown, f"--archs {','.join(unknown)}: there are {', '.join(ARCHITECTURES)}")
        unknown = [name for name in self.yardstick_names if name not in YARDSTICKS]
        require(not unknown, f"--yardsticks {','.join(unknown)}: there are {', '.join(YARDSTICKS)} and none")
        for_all, for_single = self._weights
        require(
            len(for_all) <= 1,
            f"--weights {self.weights}: give one for all, and name=FILE for single models",
        )
        strangers = set(for_single) - {*archs, *self.yardstick_names}
        require(not strangers, f"--weights {self.weights}: {', '.join(sorted(strangers))} takes no part")
        for name in (*archs, *self.yardstick_names):
            check_weights(self.weights_of(name))
        is_known = self.archs != "auto" or self.weights_of("auto") in KNOWN_WEIGHTS
        require(is_known, f"--weights {self.weights} is a file: say with --archs which networks it is for")
        for name in archs:
            self.run_config(name)  # checks the rest: folds, and what suits this network

    @property
    def arch_names(self) -> tuple[str, ...]:
        """The networks, each once, in their order."""
        return tuple(dict.fromkeys(_names(self.archs)))

    @property
    def yardstick_names(self) -> tuple[str, ...]:
        """The yardsticks, each once, in their order."""
        return () if self.yardsticks == "none" else tuple(dict.fromkeys(_names(self.yardsticks)))

    def weights_of(self, name: str) -> str:
        """Return what a model starts from: `auto`, `coco`, `imagenet`, `none` or a file's path."""
        for_all, for_single = self._weights
        return for_single.get(name, next(iter(for_all), "auto"))

    @property
    def _weights(self) -> tuple[list[str], dict[str, str]]:
        """What is given for all, at most one, and for single models by name. A path may have a = or a comma in it."""
        if Path(self.weights).is_file():
            return [self.weights], {}
        known = (*ARCHITECTURES, *YARDSTICKS)
        given = _names(self.weights)
        single = dict(one.split("=", 1) for one in given if one.partition("=")[0] in known)
        return [one for one in given if one.partition("=")[0] not in known], single

    def run_config(self, arch: str) -> RunConfig:
        """Return the settings with which `run` would train and judge a network."""
        return stage(RunConfig, self, arch=arch, weights=self.weights_of(arch))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
