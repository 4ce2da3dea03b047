"""An exported model: a folder with a network for another runtime, and what it needs to give the same verdicts there.

It imports no PyTorch and no runtime. `export.json` describes the model, and the network's own file holds the same text.
"""

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import flawmask
from flawmask.errors import FlawmaskError
from flawmask.files import read_json, sha256_of
from flawmask.inference.calibration import Calibration
from flawmask.inference.threshold import Threshold
from flawmask.model.spec import ModelSpec

Format = Literal["onnx", "openvino"]
ExportPrecision = Literal["fp32", "fp16", "bf16", "int8"]

LAYOUT = 1
"""The version of what is in an export. It rises when older exports can no longer be used."""

MANIFEST = "export.json"
FILES: dict[Format, tuple[str, ...]] = {"onnx": ("model.onnx",), "openvino": ("model.xml", "model.bin")}
"""The files of a network. The first one is opened."""

KEY = "flawmask"
"""The name of the manifest in ONNX's `metadata_props` and in OpenVINO's `rt_info`."""

INPUT, BOXES, LABELS, SCORES, IMAGE = "images", "boxes", "labels", "scores", "image"
MASKS, MAPS = "masks", "maps"
OUTPUTS = (BOXES, LABELS, SCORES, IMAGE, MASKS, MAPS)
"""The names of the input and the outputs of exported networks, in the order of `build.Detector.graph`."""


def outputs_of(spec: ModelSpec) -> tuple[str, ...]:
    """Return the names of the outputs that a network has."""
    missing = {MASKS: not spec.has_masks, MAPS: not spec.semantic_head}
    return tuple(name for name in OUTPUTS if not missing.get(name))


@dataclass(frozen=True)
class Manifest:
    """What is known of an exported model.

    Attributes:
        format: the runtime that runs it.
        precision: what its layers compute in.
        spec: of the network.
        threshold: the threshold that was chosen for the checkpoint; None where none was.
        calibration: of the images' scores; None where there was none.
        checkpoint_sha256: the digest of the checkpoint that it was made from.
        score_floor: detections with a score up to this are dropped in the network.
        max_proposals: region proposals kept per image.
        is_proven: whether the export ended with the proof that it predicts the same as the checkpoint.
        version: of Flawmask.
        layout: see `LAYOUT`.
    """

    format: Format
    precision: ExportPrecision
    spec: ModelSpec
    threshold: Threshold | None
    calibration: Calibration | None
    checkpoint_sha256: str
    score_floor: float
    max_proposals: int
    is_proven: bool
    version: str = flawmask.__version__
    layout: int = LAYOUT

    def to_json(self) -> str:
        """Return the text that the network's file holds."""
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False)

    @property
    def unproven_note(self) -> list[str]:
        """A note for every report, as a sentence, where the export is unproven."""
        return [] if self.is_proven else ["This export is unproven: nobody compared it with its checkpoint."]


def is_export(model: Path) -> bool:
    """Return whether the path is that of an exported model: its folder, or the network in it."""
    return model.is_dir() or model.suffix in {Path(names[0]).suffix for names in FILES.values()}


def file_of(model: Path) -> Path:
    """Return the file of a model: the network of an exported model's folder, or the path itself."""
    if not model.is_dir():
        return model
    found = [model / names[0] for names in FILES.values() if (model / names[0]).is_file()]
    if len(found) != 1:
        raise FlawmaskError(
            f"{model} is a folder, but no exported model: name a checkpoint, or a folder that flawmask export wrote"
        )
    return found[0]


def digest_of(model: Path) -> str:
    """Return the SHA-256 of a model's file; of an exported model, of `export.json`, which has those of all its files.

    Args:
        model: the file, see `file_of`.

    Raises:
        OSError: it cannot be read.
    """
    return sha256_of(model.with_name(MANIFEST) if is_export(model) else model)


def manifest_of(model: Path) -> Manifest:
    """Return the manifest of an exported model, as `export.json` has it. Only `read_manifest` checks the other files.

    Args:
        model: the network's file, see `file_of`.

    Raises:
        FlawmaskError: `export.json` is missing, damaged, or of another version.
    """
    return _read(model)[0]


def read_manifest(model: Path) -> Manifest:
    """Return the manifest of an exported model, and check that the files are those that were exported.

    It reads the whole network, so it is called once where a model is loaded.

    Args:
        model: the network's file, see `file_of`.

    Raises:
        FlawmaskError: a file is missing, was changed after the export, or is of another version.
    """
    manifest, digests = _read(model)
    for name in FILES[manifest.format]:
        try:
            is_intact = sha256_of(model.parent / name) == digests[name]
        except OSError as error:
            raise FlawmaskError(f"{error.filename} cannot be opened: {error.strerror}") from None
        if not is_intact:
            raise FlawmaskError(f"{model.parent / name} is damaged or was changed after the export: export it again")
    return manifest


def _read(model: Path) -> tuple[Manifest, dict[str, str]]:
    """Return the content of `export.json`: the manifest, and the SHA-256 of each of the network's files."""
    path = model.parent / MANIFEST
    content = read_json(path)
    try:
        manifest = content["manifest"]
        layout, version = manifest["layout"], manifest["version"]
        if layout != LAYOUT:
            raise FlawmaskError(f"{model.parent} was exported by Flawmask {version}: export it again with this version")
        digests = {name: content["files"][name] for name in FILES[manifest["format"]]}
        return _manifest(manifest), digests
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise FlawmaskError(f"{path} is damaged or was changed after the export: export the model again") from None


def _manifest(content: dict[str, Any]) -> Manifest:
    spec, threshold, calibration = content["spec"], content["threshold"], content["calibration"]
    known = {field.name for field in fields(ModelSpec)}
    if set(spec) != known or content["precision"] not in get_args(ExportPrecision):
        raise ValueError
    for name in ("classes", "anchor_sizes", "intensity"):
        spec[name] = tuple(spec[name])
    if threshold is not None:
        interval = threshold["interval"]
        threshold |= {
            "chosen_by": tuple(threshold["chosen_by"]),
            "interval": None if interval is None else tuple(interval),
        }
    if calibration is not None:
        calibration |= {"fitted_by": tuple(calibration["fitted_by"])}
    return Manifest(
        **content
        | {
            "spec": ModelSpec(**spec),
            "threshold": None if threshold is None else Threshold(**threshold),
            "calibration": None if calibration is None else Calibration(**calibration),
        }
    )


def check_inside(inside: str | None, manifest: Manifest, model: Path) -> None:
    """Refuse a network whose own manifest is not the one beside it.

    Args:
        inside: the text in the network's file; None if there is none.
        manifest: what `read_manifest` returned.
        model: the network's file.

    Raises:
        FlawmaskError: they differ.
    """
    if inside != manifest.to_json():
        raise FlawmaskError(f"{model} and {MANIFEST} beside it do not belong together: export the model again")


def without_telemetry() -> None:
    """Switch off the usage reports of OpenVINO and NNCF. Call it before either is imported.

    Both report through the package openvino_telemetry, and work without it. So its import fails from now on.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # Python's way to forbid an import
