"""The settings of `report`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from flawmask.settings import Settings, require


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """Write the report of one run again, or a page with several runs side by side."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or results folders in them (inference_val). For one: its report; for several: a page with all."""
    output: Path = Path("comparison.html")
    """The page with several runs side by side; an earlier one is replaced."""
    gallery: int | None = None
    """Most images in the gallery of a report, the worst first; by default all, or 500 of more than 10,000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.runs), "give at least one run folder, as in: flawmask report model_maskrcnn/<run>")
        require((self.gallery or 0) >= 0, f"--gallery is {self.gallery}: it must be 0 or more")
