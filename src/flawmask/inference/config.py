"""The settings of `predict`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from flawmask.data.intensity import IntensityRule
from flawmask.settings import Device, Joining, Strict, Tiles, require
from flawmask.tiles import TileFrom

SCORE_FLOOR = 0.05
"""The default of `--score_floor`: torchvision's own, low enough for average precision."""

MAX_PROPOSALS = 300
"""The default of `--max_proposals`, with which Faster R-CNN's authors evaluate (Ren et al., 2015). The 1000 of
torchvision are for photographs with dozens of objects; an inspection image has only a few defects."""


@dataclass(frozen=True, kw_only=True)
class InferenceSettings(Tiles, Joining, Device):
    """How the network runs on images; these settings affect its speed."""

    inference_batch_size: int | None = None
    """Batch size for inference; it does not change results. By default 8 on CUDA, 1 elsewhere."""
    score_floor: float = SCORE_FLOOR
    """Drop instances with a score up to this, 0 to 1. AP needs a low value; for verdicts, --conf is low enough."""
    max_proposals: int = MAX_PROPOSALS
    """RPN proposals kept per image for inference, highest objectness first; never more than --proposals."""
    tile_from: TileFrom = "all"
    """coarse: only tiles where the network sees something on the whole image, made small. Faster; may miss defects."""

    def __post_init__(self) -> None:
        super().__post_init__()
        size, proposals = self.inference_batch_size, self.max_proposals
        require(size is None or size >= 1, f"--inference_batch_size is {size}: it must be 1 or more")
        require(0 <= self.score_floor <= 1, f"--score_floor is {self.score_floor}: it must lie between 0 and 1")
        require(proposals >= 1, f"--max_proposals is {proposals}: it must be 1 or more")
        require(self.tile_from in get_args(TileFrom), f"--tile_from is {self.tile_from}: it must be all or coarse")
        whole = self.tile == "off" and self.tile_from == "coarse"
        require(not whole, "--tile_from coarse is for tiles: leave it out with --tile off")


@dataclass(frozen=True, kw_only=True)
class VerdictSettings(InferenceSettings):
    """When an image is rejected."""

    conf: float | Literal["auto"] = 0.5
    """The threshold: an image is rejected if a predicted defect scores at least this, 0 to 1. auto: chosen on val."""
    min_area: int = 0
    """Ignore defects with fewer pixels than this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.conf == "auto" or 0 <= self.conf <= 1
        require(fits, f"--conf is {self.conf}: it must lie between 0 and 1, or be auto")
        # A --conf below the default floor is allowed: the user did not ask for that floor.
        above = self.conf != "auto" and self.score_floor > max(self.conf, SCORE_FLOOR)
        require(not above, f"--score_floor is {self.score_floor}, above --conf: defects that count would be dropped")
        require(self.min_area >= 0, f"--min_area is {self.min_area}: it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(VerdictSettings, Strict):
    """Predict and outline the defects on unlabelled images.

    The exit status is 0. It is 2 if an image could not be read. With --fail_on_defect, it is 1 if all images were read
    and one has a defect. With --strict, it is 3 if an image was found but not predicted.
    """

    FORMER_NAMES: ClassVar[Mapping[str, str]] = {"output": "output_dir"}

    model: Path
    """The checkpoint: best.pt of a run."""
    input: tuple[str, ...]
    """Images, folders, patterns such as 'line3/*.png', or @list.txt, a file with one path per line; any number."""
    output_dir: Path = Path("predictions")
    """The folder for the results. It is replaced as a whole if an earlier predict made it."""
    save_masks: bool = False
    """Also write the mask of each image's defects, as a black and white PNG at the image's size."""
    roi: Path | None = None
    """The region of interest: an image of the inputs' size, white where defects count."""
    preannotations: Literal["coco", "cvat", "labelstudio"] | None = None
    """Also write the defects as labels to be corrected in this tool: preannotations.json, or .xml for CVAT."""
    polygon_tolerance: float = 1.0
    """Largest distance of a polygon in --preannotations from its mask, in pixels, 0 to 100; 0 keeps every corner."""
    intensity: IntensityRule | None = None
    """Bit depth of images with more than 8 bits, see --intensity of train. By default as in the training."""
    page: int | None = None
    """Which page to read of files with several images, from 1. By default, such files are listed as unreadable."""
    fail_on_defect: bool = False
    """Exit with status 1 if a defect was found."""
    records: Literal["jsonl", "parquet"] | None = None
    """For archives: write rows in parts instead of pictures and predictions.json. A killed run goes on where it was."""
    shard: str | None = None
    """With --records: 3/16 predicts the third of 16 shards of the images, into a folder of its own in --output_dir."""
    rows_per_part: int = 1000
    """With --records: images in a part. A killed run repeats at most one part."""

    ray: str | None = None
    """With --records: predict on Ray, one worker per GPU or core. local, or the address of a cluster."""

    @property
    def shard_of(self) -> tuple[int, int]:
        """The number of the shard, from 1, and the number of shards; (1, 1) for all images."""
        number, _, count = (self.shard or "1/1").partition("/")
        is_shard = number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)
        require(is_shard, f"--shard is {self.shard}: give 1/16 to 16/16, for example")
        return int(number), int(count)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_records()
        tolerance = self.polygon_tolerance
        require(0 <= tolerance <= 100, f"--polygon_tolerance is {tolerance}: it must lie between 0 and 100")
        require(self.page is None or self.page >= 1, f"--page is {self.page}: pages are counted from 1")

    def _check_records(self) -> None:
        require(self.records in (None, "jsonl", "parquet"), f"--records is {self.records}: it must be jsonl or parquet")
        require(self.shard_of == (1, 1) or self.records is not None, "--shard is for --records")
        require(self.ray is None or self.records is not None, "--ray is for --records")
        rows = self.rows_per_part
        require(1 <= rows <= 10**6, f"--rows_per_part is {rows}: it must be 1 to 1000000")
        if self.records is None:
            return
        for flag, is_given, why in (
            ("--save_masks", self.save_masks, "the rows hold the masks"),
            ("--preannotations", self.preannotations is not None, "it is for images that a person corrects"),
            ("--strict", self.strict, "it would read all images, and rows without a verdict have a reason"),
            (
                f"--intensity {self.intensity}",
                self.intensity in ("auto", "percentile"),
                "it would read all images",
            ),
        ):
            require(not is_given, f"{flag} cannot be used with --records: {why}")
