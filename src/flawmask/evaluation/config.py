"""The settings of `evaluate`."""

from dataclasses import dataclass
from pathlib import Path

from flawmask.inference.config import VerdictSettings
from flawmask.settings import Classes, Device, require


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(VerdictSettings):
    """How a split is judged."""

    split: str = "val"
    """The split to judge: val, train, or any other folder of the data set."""
    overlays: int = 200
    """How many pictures of truth beside prediction are drawn, the worst first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.overlays >= 0, f"--overlays is {self.overlays}: it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluateSettings, Device, Classes):
    """Judge a labelled split: verdicts, average precision, and pictures of what went wrong."""

    model: Path
    """The checkpoint: best.pt of a run."""
    dataset_dir: Path
    """The COCO folder that holds the split."""
    output_dir: Path | None = None
    """Where the results go, replaced whole; by default inference_<split> beside the checkpoint."""

    @property
    def results_dir(self) -> Path:
        """Where the results go. Named a run's own folder, they go into `inference_<split>` inside it."""
        inside_run = f"inference_{self.split}"
        if self.output_dir is None:
            return self.model.parent / inside_run
        is_run = (self.output_dir / "best.pt").is_file()
        return self.output_dir / inside_run if is_run else self.output_dir
