"""The settings of `predict`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flawmask.data.intensity import IntensityRule
from flawmask.settings import Device, Joining, Strict, require

SCORE_FLOOR = 0.05
"""Where `--score_floor` lies unless it is given: torchvision's own, low enough for average precision."""

MAX_PROPOSALS = 300
"""Where `--max_proposals` lies unless it is given: as many as Faster R-CNN's authors judge with (Ren et al., 2015). The
1000 of torchvision are for photographs with dozens of things; an inspection image has a defect or a few."""


@dataclass(frozen=True, kw_only=True)
class InferenceSettings(Joining, Device):
    """How the network looks at images: what makes it faster."""

    inference_batch_size: int | None = None
    """Images that pass through the network at once; results do not depend on it. By default 8 on CUDA, 1 elsewhere."""
    score_floor: float = SCORE_FLOOR
    """Detections that score no more than this are dropped, 0 to 1. AP wants it low; for verdicts --conf will do."""
    max_proposals: int = MAX_PROPOSALS
    """Regions of an image that the heads look at when judging, the surest ones; never more than --proposals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        size, most = self.inference_batch_size, self.max_proposals
        require(size is None or size >= 1, f"--inference_batch_size is {size}: it must be 1 or more")
        require(0 <= self.score_floor <= 1, f"--score_floor is {self.score_floor}: it must lie between 0 and 1")
        require(most >= 1, f"--max_proposals is {most}: it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class VerdictSettings(InferenceSettings):
    """When an image is a defect."""

    conf: float | Literal["auto"] = 0.5
    """An image is a defect when a defect on it scores at least this much, 0 to 1; auto: as chosen on val."""
    min_area: int = 0
    """Defects that cover fewer pixels than this do not count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.conf == "auto" or 0 <= self.conf <= 1
        require(fits, f"--conf is {self.conf}: it must lie between 0 and 1, or be auto")
        # The default floor is no wish of the user's, whose --conf may lie below it.
        above = self.conf != "auto" and self.score_floor > max(self.conf, SCORE_FLOOR)
        require(not above, f"--score_floor is {self.score_floor}, above --conf: defects that count would be dropped")
        require(self.min_area >= 0, f"--min_area is {self.min_area}: it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(VerdictSettings, Strict):
    """Find and outline the defects on images that nobody labelled.

    Exit status: 0; 2 if an image could not be read; with --fail_on_defect, 1 when there is a defect and all could; with
    --strict, 3 when an image was found and not predicted.
    """

    model: Path
    """The checkpoint: best.pt of a run."""
    input: tuple[str, ...]
    """Images, folders of images, or patterns such as 'line3/*.png'; as many as you like."""
    output: Path = Path("predictions")
    """Where the results go. What an earlier predict left there is replaced whole."""
    save_masks: bool = False
    """Write the defects of each image as a black and white PNG at the image's own size too."""
    roi: Path | None = None
    """An image at the size of the inputs, white where defects count."""
    preannotations: Literal["coco", "cvat", "labelstudio"] | None = None
    """Write the defects as labels for this tool too, for a person to correct: preannotations.json, or .xml for CVAT."""
    polygon_tolerance: float = 1.0
    """How far, in pixels, a polygon in --preannotations may be from the outline, 0 to 100; 0 keeps every corner."""
    intensity: IntensityRule | None = None
    """How many bits images of more than 8 use, percentile or auto, see train; by default as the model was trained."""
    page: int | None = None
    """Which image is read of files that hold several, from 1. Without it they are listed as unreadable."""
    fail_on_defect: bool = False
    """Exit with status 1 when a defect was found."""

    def __post_init__(self) -> None:
        super().__post_init__()
        tolerance = self.polygon_tolerance
        require(0 <= tolerance <= 100, f"--polygon_tolerance is {tolerance}: it must lie between 0 and 100")
        require(self.page is None or self.page >= 1, f"--page is {self.page}: pages are counted from 1")
