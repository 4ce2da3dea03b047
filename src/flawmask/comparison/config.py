"""The settings of `compare`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from flawmask.data.augment import AugmentSettings
from flawmask.data.prepare import PrepareSettings
from flawmask.evaluation.config import EvaluateSettings
from flawmask.inference.exported import file_of
from flawmask.model.arch import ARCHITECTURES
from flawmask.settings import Overwrite, Strict, require, stage
from flawmask.stages import NAME_DATA, DataPaths, RunConfig, check_variants
from flawmask.training.config import KNOWN_WEIGHTS, LearnSettings, check_weights

CLASSIFIER, PATCHCORE = "efficientnet_lite0_classifier", "patchcore"

BASELINES = (CLASSIFIER, PATCHCORE)
"""What detectors are compared with: a classifier of whole images, and a model that is trained on good images only."""


# Dataclass fields, and so the flags in --help, are listed from the last base to the first.
@dataclass(frozen=True, kw_only=True)
class CompareConfig(Overwrite, Strict, EvaluateSettings, LearnSettings, AugmentSettings, PrepareSettings, DataPaths):
    """Train several models with the same images and budget, evaluate them on the same images, and say which to take.

    The budget of each is --epochs or --time_budget. Results go to --output_dir. By default, that is a new folder
    model_maskrcnn/maskrcnn_mvtec_<date>_<time>_comparison. Repeat the command to continue a stopped comparison.
    """

    FORMER_NAMES: ClassVar[Mapping[str, str]] = {"yardsticks": "baselines"}

    category: str | None = None
    """The category: a folder name under --mvtec_root."""
    output_dir: Path | None = None
    """The folder for the comparison. A stopped one in it continues. By default a new folder in model_maskrcnn."""
    archs: str = "auto"
    """The networks, as a,b,c. auto: the one that run chooses, and SSD and YOLO if their weights are available."""
    baselines: str = f"{CLASSIFIER},{PATCHCORE}"
    """Baselines: efficientnet_lite0_classifier, patchcore (extra [anomalib]), both as a,b, or none."""
    exports: str = "none"
    """Exported models to compare with, as folder,folder; they are not trained. With a single split only."""
    weights: str = "auto"
    """Initial weights: auto, coco, imagenet, none or a file. For one model name=FILE: none,patchcore=lite0.pth."""
    offline: bool = False
    """Download nothing; use weights that are on the disk already."""
    overwrite: bool = False
    """Start a new comparison even if a stopped one could be continued, and make the data sets anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.is_named, NAME_DATA)
        check_variants(self.augment_val, self.skip_augment)
        single = self.category is None or ("," not in self.category and self.category != "all")
        require(single, f"--category {self.category}: compare takes one category at a time")
        require(self.fold is None, "--fold is for a single training: compare trains each fold, or one split")
        archs = self.arch_names
        unknown = [name for name in archs if name not in ARCHITECTURES and self.archs != "auto"]
        require(bool(archs) and not unknown, f"--archs {','.join(unknown)}: there are {', '.join(ARCHITECTURES)}")
        unknown = [name for name in self.baseline_names if name not in BASELINES]
        require(not unknown, f"--baselines {','.join(unknown)}: there are {', '.join(BASELINES)} and none")
        self._check_exports()
        for_all, for_single = self._weights
        require(
            len(for_all) <= 1,
            f"--weights {self.weights}: give one for all, and name=FILE for single models",
        )
        unused = set(for_single) - {*archs, *self.baseline_names}
        require(not unused, f"--weights {self.weights}: {', '.join(sorted(unused))} is not compared")
        for name in (*archs, *self.baseline_names):
            check_weights(self.weights_of(name))
        is_known = self.archs != "auto" or self.weights_of("auto") in KNOWN_WEIGHTS
        require(is_known, f"--weights {self.weights} is a file: give --archs the networks that it is for")
        for name in archs:
            self.run_config(name)  # this checks all other settings, such as --folds, for this network

    @property
    def arch_names(self) -> tuple[str, ...]:
        """The networks in the order given, without duplicates."""
        return tuple(dict.fromkeys(_names(self.archs)))

    @property
    def baseline_names(self) -> tuple[str, ...]:
        """The baselines in the order given, without duplicates."""
        return () if self.baselines == "none" else tuple(dict.fromkeys(_names(self.baselines)))

    def _check_exports(self) -> None:
        paths = self.export_paths
        count = 0 if self.exports == "none" else len(_names(self.exports))
        taken = {*self.arch_names, *self.baseline_names}
        require(len(paths) == count and not taken & set(paths), f"--exports {self.exports}: the folders need own names")
        require(not paths or self.folds == 1, f"--exports {self.exports}: leave out --folds, which trains anew")
        for path in paths.values():
            require(path.is_dir(), f"--exports {path}: there is no such folder")
            file_of(path)  # it looks like an export

    @property
    def export_paths(self) -> dict[str, Path]:
        """The folders of the exported models, by the names of these folders."""
        return {} if self.exports == "none" else {Path(one).name: Path(one) for one in _names(self.exports)}

    @property
    def every_name(self) -> tuple[str, ...]:
        """The names of all models of the comparison, in the order of their columns."""
        return (*self.arch_names, *self.baseline_names, *self.export_paths)

    def weights_of(self, name: str) -> str:
        """Return the weights that a model starts from: `auto`, `coco`, `imagenet`, `none` or a file's path."""
        for_all, for_single = self._weights
        return for_single.get(name, next(iter(for_all), "auto"))

    @property
    def _weights(self) -> tuple[list[str], dict[str, str]]:
        """The weights for all models, and those for single models by name. A path may contain = or a comma."""
        if Path(self.weights).is_file():
            return [self.weights], {}
        known = (*ARCHITECTURES, *BASELINES)
        given = _names(self.weights)
        single = dict(one.split("=", 1) for one in given if one.partition("=")[0] in known)
        return [one for one in given if one.partition("=")[0] not in known], single

    def run_config(self, arch: str) -> RunConfig:
        """Return the settings with which `run` would train and evaluate a network."""
        return stage(RunConfig, self, arch=arch, weights=self.weights_of(arch), output_dir=None)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
