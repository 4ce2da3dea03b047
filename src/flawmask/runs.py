"""Run folders: their names, new ones, and how to find earlier ones.

A run folder holds `config.json` (the settings), `state.pt` (to resume the training), `best.pt` and `last.pt` (the
checkpoints), `history.json` (the metrics of each epoch) and, for each evaluation, a results folder
`inference_<split>`. The folder of a cross-validation holds `folds.json` and a run folder for each fold. The folder of a
comparison holds `comparison.json` and a run folder for each model.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from flawmask.errors import FlawmaskError
from flawmask.files import check_output_folder, folder_lock, read_json, real_path, write_json
from flawmask.settings import LEGACY_VALUES, has_origin, require

log = logging.getLogger(__name__)

RUNS = Path("model_maskrcnn")
"""Where `run` and `compare` make new folders by default."""

FOLDS = "folds.json"
"""The file of a cross-validation with its settings and the folds that are done."""

COMPARISON = "comparison.json"
"""The file of a comparison with its settings and, in the end, its results."""

MADE_BY = {FOLDS: "flawmask run --folds", COMPARISON: "flawmask compare"}
"""The command that writes each of these files."""

NAMES = {FOLDS: "cross-validation", COMPARISON: "comparison"}
"""What a folder with each of these files is called in messages."""

POOLED = "pooled"
"""The name of the split with the images of all folds. Its results are in `inference_pooled`."""


@contextmanager
def new_run_dir(suffix: str = "", output_dir: Path | None = None) -> Iterator[Path]:
    """Yield the folder for a new run: `output_dir` as it is, or else a new folder under `RUNS`.

    The new folder is named after this second, or after the next second that is free. If it is empty in the end, it is
    removed.
    """
    if output_dir is not None:
        yield output_dir
        return
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


def find_earlier(pattern: str, origin: Mapping[str, Any]) -> Path | None:
    """Return the newest folder under `RUNS` whose JSON file has this origin; None where there is none.

    Args:
        pattern: finds the JSON files.
        origin: the keys and values that the file must have. It may have others.
    """
    for path in sorted(RUNS.glob(pattern), reverse=True):
        content = read_json(path)
        if has_origin(content, origin):
            log.info("continuing %s", path.parent)
            return path.parent
    return None


def check_folder(folder: Path, marker: str, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse a folder that the user named for a cross-validation or a comparison, unless it may be written to.

    Args:
        folder: where the results go.
        marker: the file that tells what a folder holds, `FOLDS` or `COMPARISON`.
        settings: those that are known already. An earlier one goes on only with the same settings.
        overwrite: whether an earlier one may be replaced.

    Raises:
        FlawmaskError: the folder holds something else, or one with other settings and `overwrite` is off.
    """
    check_output_folder(folder, marker, overwrite=True, what=NAMES[marker])
    path = folder / marker
    if not path.is_file():
        return
    content = read_json(path)
    require(
        isinstance(content, dict) and content.get("made_by") == MADE_BY[marker],
        f"{folder} holds something else ({path} was not written by {MADE_BY[marker]}): name a new folder",
    )
    earlier_settings = {**LEGACY_VALUES, **content.get("settings", {})}
    changed = [name for name, value in settings.items() if earlier_settings.get(name) != value]
    require(
        overwrite or not changed,
        f"{folder} holds a {NAMES[marker]} with another --{', --'.join(changed)}: name another folder, or replace it "
        "with --overwrite",
    )


def begin_or_continue(
    marker: str, origin: Mapping[str, Any], output_dir: Path | None, *, overwrite: bool, **more: Any
) -> Path:
    """Return the folder of a cross-validation or a comparison: an earlier one with the same origin, or a new one.

    Args:
        marker: the file that tells what a folder holds, `FOLDS` or `COMPARISON`.
        origin: command, version, settings and images. An earlier one goes on where all of these are the same.
        output_dir: the folder that the user named; None for one under `RUNS`.
        overwrite: whether a new one begins in any case. In `output_dir`, it replaces an earlier one.
        **more: what the marker file of a new one holds beside the origin.

    Raises:
        FlawmaskError: `output_dir` holds something else, or one with another origin and `overwrite` is off.
    """
    if output_dir is None:
        suffix = f"_{Path(marker).stem}"
        folder = None if overwrite else find_earlier(f"*{suffix}/{marker}", origin)
        if folder is None:
            with new_run_dir(suffix) as folder:
                write_json(folder / marker, {**origin, **more})
        return folder
    path = output_dir / marker
    if not overwrite and path.is_file() and has_origin(read_json(path), origin):
        log.info("continuing %s", output_dir)
        return output_dir
    with folder_lock(output_dir / Path(marker).stem):
        check_folder(output_dir, marker, origin["settings"], overwrite=overwrite)
        require(
            overwrite or not path.is_file(),
            f"{output_dir} holds a {NAMES[marker]} of other images, or of another version of Flawmask: name another "
            "folder, or replace it with --overwrite",
        )
        if output_dir.exists():
            shutil.rmtree(real_path(output_dir))
        write_json(path, {**origin, **more})
    return output_dir


def newest_run(prepared_dir: Path) -> Path:
    """Return the newest run under `RUNS` that was trained on this data set, augmented or not."""
    dataset_dirs = {prepared_dir.resolve(), prepared_dir.with_name(f"{prepared_dir.name}_augmented").resolve()}
    for path in sorted(RUNS.glob("maskrcnn_mvtec_*/best.pt"), reverse=True):
        config = path.with_name("config.json")
        if config.is_file() and Path(read_json(config)["settings"]["dataset_dir"]).resolve() in dataset_dirs:
            log.info("evaluating %s, the newest run on %s", path.parent, prepared_dir)
            return path.parent
    raise FlawmaskError(f"{RUNS} holds no run on {prepared_dir}: train one, or name one with --model_dir")
