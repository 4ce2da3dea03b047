"""Exported models in a comparison: they are evaluated and timed like the others, and not trained."""

import shutil
from pathlib import Path
from typing import Any

from flawmask.coco import read_split
from flawmask.comparison.config import CompareConfig
from flawmask.comparison.entry import Entry, SharedData
from flawmask.evaluation import leak
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import evaluate
from flawmask.inference import exported
from flawmask.inference.backend import check_classes
from flawmask.settings import stage
from flawmask.stages import own_tiles

ON_CPU: dict[str, Any] = {"device": None, "precision": "auto"}
"""Settings of the comparison that exports do not share: they run on the CPU, in the precision of their export."""


def check_exports(config: CompareConfig, shared: SharedData) -> None:
    """Refuse an export that cannot be evaluated on the data set.

    Raises:
        FlawmaskError: the export is damaged, or its classes are not those of the data set.
    """
    for path in config.export_paths.values():
        spec = exported.read_manifest(exported.file_of(path)).spec
        split = read_split(shared.prepared_dirs[0], shared.splits[-1], shared.reading)
        check_classes(spec, split.class_names, split.folder)


def evaluate_export(config: CompareConfig, shared: SharedData, folder: Path, name: str) -> Entry:
    """Evaluate a copy of an exported model, and return its entry. Results, threshold and calibration lie by the copy.

    Raises:
        FlawmaskError: the export is damaged, or its classes are not those of the data set.
    """
    original = exported.file_of(config.export_paths[name])
    (folder / name).mkdir(exist_ok=True)
    files = exported.FILES[exported.read_manifest(original).format]
    for one in (*files, exported.MANIFEST, leak.NAME):
        if original.with_name(one).is_file():  # not every run has the list of its training images
            shutil.copyfile(original.with_name(one), folder / name / one)
    network = folder / name / original.name
    tiles = own_tiles(config, exported.read_manifest(network).spec.tile)
    for split in shared.splits:
        changes = {**ON_CPU, "output_dir": folder / name / f"inference_{split}"}
        place = {"model": network, "dataset_dir": shared.prepared_dirs[0], "split": split}
        evaluate(stage(EvaluateConfig, config, **place, **changes, **tiles))
    return Entry(
        name,
        results=f"{name}/{shared.results_name}",
        checkpoint=f"{name}/{original.name}",
        checkpoint_bytes=sum((folder / name / one).stat().st_size for one in files),
    )
