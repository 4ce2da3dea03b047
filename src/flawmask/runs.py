"""Run folders: what a training leaves, where new ones go, and how earlier ones are found again.

A run folder holds `config.json` (the settings), `state.pt` (what it takes to go on), `best.pt` and `last.pt` (the
checkpoints), `history.json` (what each epoch came to) and, for each evaluation, a folder of results,
`inference_<split>`. That of a cross-validation holds `folds.json` and a run folder for each fold. That of a comparison
holds `comparison.json` and a run folder for each model.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from flawmask.errors import FlawmaskError
from flawmask.files import read_json
from flawmask.settings import has_origin

log = logging.getLogger(__name__)

RUNS = Path("model_maskrcnn")
"""Where `run` and `compare` put their results."""

FOLDS = "folds.json"
"""Of a cross-validation: its settings, and which folds are done."""

COMPARISON = "comparison.json"
"""Of a comparison: its settings and, in the end, what it came to."""

POOLED = "pooled"
"""The split of all folds' images together; its results are in `inference_pooled`."""


@contextmanager
def new_run_dir(suffix: str = "") -> Iterator[Path]:
    """Make and give a run folder named for this second, or for the next one that is free; an empty one goes again."""
    moment = datetime.now()
    while True:
        path = RUNS / f"maskrcnn_mvtec_{moment:%Y%m%d_%H%M%S}{suffix}"
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            moment += timedelta(seconds=1)
    try:
        yield path
    finally:
        if not any(path.iterdir()):
            path.rmdir()


def earlier(pattern: str, origin: Mapping[str, Any]) -> Path | None:
    """Return the newest folder under `RUNS` whose JSON file, found by its pattern, says this very origin; None where
    there is none. What else it says, of how far that came, is left aside."""
    for path in sorted(RUNS.glob(pattern), reverse=True):
        content = read_json(path)
        if has_origin(content, origin):
            log.info("going on with %s", path.parent)
            return path.parent
    return None


def newest_run(prepared_dir: Path) -> Path:
    """Return the newest run under `RUNS` that was trained on this data set or its augmented variant."""
    wanted = {prepared_dir.resolve(), prepared_dir.with_name(f"{prepared_dir.name}_augmented").resolve()}
    for path in sorted(RUNS.glob("maskrcnn_mvtec_*/best.pt"), reverse=True):
        config = path.with_name("config.json")
        if config.is_file() and Path(read_json(config)["settings"]["dataset_dir"]).resolve() in wanted:
            log.info("judging %s, the newest run on %s", path.parent, prepared_dir)
            return path.parent
    raise FlawmaskError(f"{RUNS} holds no run on {prepared_dir}: train one, or name one with --model_dir")
