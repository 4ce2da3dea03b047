"""The settings of `evaluate`."""

from dataclasses import dataclass, fields
from pathlib import Path

from flawmask.errors import FlawmaskError
from flawmask.inference.config import InferenceSettings, VerdictSettings
from flawmask.settings import Classes, Reading, Seed, Strict, require


def parse_aim(aim: str) -> tuple[str, float]:
    """Return the name and level of an aim: `f1`, `recall=0.99` or `false_alarms=0.02`; f1 has the level 1.

    Raises:
        FlawmaskError: it is none of these, or its level is not between 0 and 1.
    """
    name, equals, number = aim.partition("=")
    try:
        level = float(number) if equals else 1.0
    except ValueError:
        level = -1.0
    if (name, bool(equals)) not in {("f1", False), ("recall", True), ("false_alarms", True)} or not 0 <= level <= 1:
        raise FlawmaskError(f"--aim {aim} is not known: give f1, recall=0.99 or false_alarms=0.02, a level of 0 to 1")
    return name, level


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(VerdictSettings, Reading):
    """How a split is evaluated."""

    split: str = "val"
    """The split to evaluate: val, train, or any other folder of the data set."""
    overlays: int = 200
    """Number of pictures that show truth beside prediction, the worst images first."""
    aim: str = "f1"
    """The aim of --conf auto, on val: f1, recall=0.99 (at least) or false_alarms=0.02 (at most)."""
    resamples: int = 1000
    """Number of bootstrap samples for the 95 % intervals; 0 leaves these intervals out."""
    allow_leak: bool = False
    """Evaluate a split even if training used some of its images or parts; metrics and report say so."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_aim(self.aim)
        require(0 <= self.resamples <= 10**6, f"--resamples is {self.resamples}: it must be 0 to 1000000")
        require(self.overlays >= 0, f"--overlays is {self.overlays}: it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluateSettings, Seed, Classes, Strict):
    """Evaluate a checkpoint on a labelled split: verdicts, average precision, and pictures of the errors."""

    model: Path | None = None
    """The checkpoint: best.pt of a run."""
    predictions: Path | None = None
    """Instead of --model: the folder of predict --records, or predictions.json of an earlier evaluate."""
    dataset_dir: Path
    """The COCO folder that holds the split."""
    output_dir: Path | None = None
    """The folder for the results; earlier ones are replaced. By default inference_<split> beside --model."""
    against: Path | None = None
    """Another run, or its results on the same images, to compare with: differences, intervals, McNemar's p."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.model is None) != (self.predictions is None),
            "give the checkpoint with --model, or stored predictions with --predictions",
        )
        if self.predictions is not None:
            require(self.conf != "auto", "--conf auto needs the checkpoint: with --predictions, give a number")
            require(self.against is None, "--against needs --model: evaluate the predictions, and then that run")
            for one in fields(InferenceSettings):
                given = getattr(self, one.name) != one.default
                require(not given, f"--{one.name} needs --model: it was chosen when the predictions were stored")

    @property
    def checkpoint(self) -> Path:
        """The checkpoint. There must be one."""
        assert self.model is not None
        return self.model

    @property
    def results_dir(self) -> Path:
        """The folder for the results. If `output_dir` is a run folder, it is `inference_<split>` inside."""
        inside_run = f"inference_{self.split}"
        if self.output_dir is None:
            return (self.model or self.predictions or Path()).parent / inside_run
        is_run = (self.output_dir / "best.pt").is_file()
        return self.output_dir / inside_run if is_run else self.output_dir
