"""Writes a proven export of a small random network: write_export.py onnx|openvino DATA FOLDER."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from random_network import SPEC, random_network  # noqa: E402
from small_network import in_place  # noqa: E402

from flawmask.export.config import ExportConfig  # noqa: E402
from flawmask.export.export import export  # noqa: E402
from flawmask.inference import threshold  # noqa: E402
from flawmask.inference.threshold import Threshold  # noqa: E402
from flawmask.model import checkpoint  # noqa: E402

runtime, data, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
with in_place():
    spec = replace(SPEC, norm="frozen")
    checkpoint.save(folder / "best.pt", random_network(spec), spec)
    threshold.save(Threshold(0.4, "aim", aim="f1", chosen_on="val", images=8), folder / "best.pt")
    config = ExportConfig(model=folder / "best.pt", dataset_dir=data, output_dir=folder / "exported", resamples=0)
    export(replace(config, format=runtime))  # type: ignore[arg-type]
