"""Exported models in a comparison: they are evaluated and timed like the others, and not trained."""

from pathlib import Path

from flawmask.comparison.config import CompareConfig
from flawmask.comparison.entry import Entry, SharedData
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import evaluate
from flawmask.inference import exported
from flawmask.settings import stage
from flawmask.stages import own_tiles


def evaluate_export(config: CompareConfig, shared: SharedData, folder: Path, name: str) -> Entry:
    """Evaluate an exported model, and return its entry.

    Raises:
        FlawmaskError: the export is damaged, or its classes are not those of the data set.
    """
    network = exported.file_of(config.export_paths[name])
    tiles = own_tiles(config, exported.read_manifest(network).spec.tile)
    for split in shared.splits:
        changes = {"device": None, "precision": "auto", "output_dir": folder / name / f"inference_{split}"}
        place = {"model": network, "dataset_dir": shared.prepared_dirs[0], "split": split}
        evaluate(stage(EvaluateConfig, config, **place, **changes, **tiles))
    files = [network.with_name(one) for names in exported.FILES.values() for one in names]
    return Entry(
        name,
        results=f"{name}/{shared.results_name}",
        checkpoint=network.resolve().as_posix(),
        checkpoint_bytes=sum(path.stat().st_size for path in files if path.is_file()),
    )
