"""The settings of `export`."""

from dataclasses import dataclass
from pathlib import Path

from flawmask.inference.config import MAX_PROPOSALS, SCORE_FLOOR
from flawmask.inference.exported import ExportPrecision, Format
from flawmask.settings import Reading, Seed, require

PRECISIONS: dict[Format, tuple[ExportPrecision, ...]] = {
    "onnx": ("fp32", "int8"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
}
"""The precisions of each format."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Seed, Reading):
    """Write a trained network for another runtime, and prove on val and test that it predicts the same there."""

    model: Path
    """The checkpoint: best.pt of a run."""
    format: Format = "onnx"
    """The runtime: onnx (ONNX Runtime, and others) or openvino (Intel's, fastest on their processors)."""
    precision: ExportPrecision = "fp32"
    """Number format of the layers: onnx has fp32 and int8; openvino has fp32, fp16 (weights only), bf16 and int8."""
    dataset_dir: Path | None = None
    """The COCO folder for the proof and for int8; by default the one that the run was trained on."""
    output_dir: Path | None = None
    """The folder; an earlier export and results in it go. By default exported_<format>_<precision> beside the model."""
    max_drop: float = 0.02
    """How much mask AP int8 may cost on val, 0 to 1. OpenVINO keeps layers in higher precision until it fits."""
    min_area: int | None = None
    """Ignore smaller defects in the proof's verdicts, in pixels. By default as when the threshold was chosen, or 0."""
    score_floor: float = SCORE_FLOOR
    """Drop instances with a score up to this, 0 to 1; fixed in the export."""
    max_proposals: int = MAX_PROPOSALS
    """RPN proposals kept per image, highest objectness first; fixed in the export."""
    resamples: int = 1000
    """Number of bootstrap samples for the intervals of the proof's differences; 0 leaves them out."""
    unproven: bool = False
    """Write the export without proof, if the data are gone. Its metadata and every report say so."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = PRECISIONS[self.format]
        require(
            self.precision in known,
            f"--precision {self.precision} is not possible with --format {self.format}: there are {', '.join(known)}",
        )
        require(0 <= self.max_drop <= 1, f"--max_drop is {self.max_drop}: it must lie between 0 and 1")
        require(0 <= self.score_floor <= 1, f"--score_floor is {self.score_floor}: it must lie between 0 and 1")
        require(self.max_proposals >= 1, f"--max_proposals is {self.max_proposals}: it must be 1 or more")
        require(self.min_area is None or self.min_area >= 0, f"--min_area is {self.min_area}: it must be 0 or more")
        require(0 <= self.resamples <= 10**6, f"--resamples is {self.resamples}: it must be 0 to 1000000")

    @property
    def folder(self) -> Path:
        """The folder for the export."""
        return self.output_dir or self.model.parent / f"exported_{self.format}_{self.precision}"
