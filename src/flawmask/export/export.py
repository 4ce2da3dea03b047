"""`export`: write a network for another runtime, and prove that it predicts the same there."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flawmask.coco import CocoSplit, read_split
from flawmask.coco_files import split_names
from flawmask.errors import FlawmaskError
from flawmask.evaluation import leak
from flawmask.export.config import ExportConfig
from flawmask.files import atomic_folder, check_output_folder, read_json, sha256, write_json
from flawmask.inference import calibration, threshold
from flawmask.inference.backend import check_classes
from flawmask.inference.config import SCORE_FLOOR
from flawmask.inference.exported import FILES, MANIFEST, Manifest, file_of, is_export
from flawmask.inference.exported_backend import ExportedBackend
from flawmask.settings import require

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

PARITY, PAGE = "parity.json", "parity.html"
ENTRIES = (
    *(MANIFEST, PARITY, PAGE, leak.NAME, "model.threshold.json", "model.calibration.json"),
    *(name for names in FILES.values() for name in names),
)
"""What `export` writes, and what `evaluate` stores beside a network. An export replaces it."""

PROVED_ON = ("val", "test")
"""The splits that the proof evaluates, those of them that the data set has."""

NEEDS = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
NEEDS_FOR_INT8 = {"onnx": (), "openvino": ("nncf",)}
"""The packages that each format needs."""


@dataclass(frozen=True)
class Exported:
    """The result of `export`.

    Attributes:
        folder: the exported model.
        parity: the content of `parity.json`; None for an unproven export.
    """

    folder: Path
    parity: dict[str, Any] | None


def export(config: ExportConfig) -> Exported:
    """Export a checkpoint, prove the export, and write it.

    Raises:
        FlawmaskError: the checkpoint or the data set cannot be used; a package is missing; the export does not predict
            the same as the checkpoint; settings do not fit the chosen threshold; or the output folder holds something
            else. Nothing is written then.
    """
    missing = [name for name in _needed(config) if find_spec(name) is None]
    require(not missing, f'{", ".join(missing)} is not installed: pip install "flawmask[export]"')
    results = [path.parent.name for path in config.folder.glob("inference_*/metrics.json")]  # of evaluate
    entries = (*ENTRIES, *results)
    check_output_folder(config.folder, MANIFEST, overwrite=True, what="exported model", entries=entries)
    require(not is_export(config.model), f"{config.model} is no checkpoint: export needs best.pt of a run")

    from flawmask.inference.torch_backend import TorchBackend
    from flawmask.model import checkpoint
    from flawmask.model.build import for_export

    chosen = threshold.load(config.model)
    config = _checked(config, chosen)
    network, spec = checkpoint.load(config.model, config.max_proposals)
    manifest = Manifest(
        format=config.format,
        precision=config.precision,
        spec=spec,
        threshold=chosen,
        calibration=calibration.load(config.model, config.min_area or 0, spec.tiles_as_json),
        checkpoint_sha256=sha256(config.model.read_bytes()),
        score_floor=config.score_floor,
        max_proposals=config.max_proposals,
        is_proven=not config.unproven,
    )
    splits = {} if config.unproven else _splits(config, PROVED_ON)
    training = _splits(config, ("train",))["train"] if config.precision == "int8" else None
    for split in [*splits.values(), *([] if training is None else [training])]:
        check_classes(spec, split.class_names, split.folder)
    with atomic_folder(config.folder) as folder:
        log.info("exporting %s as %s, %s", config.model, config.format, config.precision)
        _write_network(folder, for_export(network, spec, config.score_floor), manifest, training, splits, config)
        _write_manifest(folder, manifest)
        images_of_training = config.model.with_name(leak.NAME)
        if images_of_training.is_file():  # evaluate then notices, also elsewhere, which images it has been trained on
            shutil.copyfile(images_of_training, folder / leak.NAME)
        parity = None
        if splits:
            from flawmask.export.parity import prove
            from flawmask.export.parity_page import write_page

            original = TorchBackend.load(
                config.model,
                "cpu",
                precision="fp32",
                score_floor=config.score_floor,
                max_proposals=config.max_proposals,
            )
            parity = prove(original, ExportedBackend.load(file_of(folder)), splits, manifest, config)
            write_json(folder / PARITY, parity)
            write_page(folder / PAGE, parity, config.model.as_posix())
            if parity["failures"]:
                raise FlawmaskError(f"the export does not predict the same: {'; '.join(parity['failures'])}")
        else:
            ExportedBackend.load(file_of(folder))  # it can be opened
            log.warning("the export is unproven, and says so in its metadata and in every report")
    log.info("wrote %s", config.folder)
    return Exported(config.folder, parity)


def _checked(config: ExportConfig, chosen: threshold.Threshold | None) -> ExportConfig:
    """Return the settings with the `min_area` of the chosen threshold, which fit that threshold.

    Raises:
        FlawmaskError: they ask for another `min_area`, or for a score floor above the threshold.
    """
    conf = threshold.DEFAULT if chosen is None else chosen.value
    require(
        config.score_floor <= max(conf, SCORE_FLOOR),
        f"--score_floor is {config.score_floor}, above the threshold {conf:.4g} of {config.model}: defects that count "
        "would be dropped",
    )
    if chosen is None:
        return config
    require(
        config.min_area in (None, chosen.min_area),
        f"--min_area is {config.min_area}, but the threshold of {config.model} was chosen for {chosen.min_area}: leave "
        "it out, or choose a threshold for it with evaluate --conf auto",
    )
    return replace(config, min_area=chosen.min_area)


def _write_network(
    folder: Path,
    graph: "nn.Module",
    manifest: Manifest,
    training: CocoSplit | None,
    splits: Mapping[str, CocoSplit],
    config: ExportConfig,
) -> None:
    """Write the network's files. With training images, it is quantised."""
    from flawmask.export import int8, onnx_file, openvino_file

    path = folder / FILES["onnx"][0]
    onnx_file.write_onnx(graph, path, manifest.spec)
    if manifest.format == "onnx":
        if training is not None:
            int8.quantise_onnx(path, manifest, training)
        onnx_file.put_manifest(path, manifest)
        return
    network = openvino_file.convert(path)
    path.unlink()
    if training is not None:
        network = int8.quantise_openvino(network, manifest, training, splits.get("val"), config)
    openvino_file.write(network, folder / FILES["openvino"][0], manifest)


def _needed(config: ExportConfig) -> Sequence[str]:
    return NEEDS[config.format] + (NEEDS_FOR_INT8[config.format] if config.precision == "int8" else ())


def _splits(config: ExportConfig, wanted: Sequence[str]) -> dict[str, CocoSplit]:
    """Return the splits of the data set with these names, those that it has.

    Raises:
        FlawmaskError: the data set is gone or unknown, or has none of these splits.
    """
    folder = config.dataset_dir
    if folder is None:
        path = config.model.parent / "config.json"
        settings = read_json(path).get("settings", {}) if path.is_file() else {}
        require("dataset_dir" in settings, f"{config.model} does not say which data it was trained on: --dataset_dir")
        folder = Path(settings["dataset_dir"])
    advice = "name it with --dataset_dir, or export with --unproven"
    require(folder.is_dir(), f"the data set {folder} is not there: {advice}")
    there = [name for name in wanted if name in split_names(folder)]
    require(bool(there), f"{folder} has no split {' or '.join(wanted)}: {advice}")
    return {name: read_split(folder, name, config) for name in there}


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    digests = {name: sha256((folder / name).read_bytes()) for name in FILES[manifest.format]}
    content = json.loads(json.dumps(asdict(manifest)))
    write_json(folder / MANIFEST, {"manifest": content, "files": digests})
