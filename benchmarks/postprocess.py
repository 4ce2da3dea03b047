"""Times the post-processing of one large image, and prints a section of docs/benchmarks.md.

    python benchmarks/postprocess.py --size 4000 --detections 100

Flawmask goes from boxes and 28 x 28 probabilities to masks and the record in predictions.json. It is compared with
torchvision's `paste_masks_in_image` and a threshold, as in torchvision's Mask R-CNN. The two take turns. Each
measurement runs in a process of its own, so that its peak memory, imports included, is measured separately.

torchvision makes a float image of every mask: 6.4 GB for 100 masks on 4000 x 4000, and as much again to stack them. So
it gets a few masks at a time here, and only counts their pixels.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from peak import peak_megabytes
from torch import Tensor

AT_ONCE = 5
"""The number of masks that torchvision gets at a time."""

NAMES = {
    "flawmask": "Flawmask: `post_process` and `to_dict`",
    "torchvision": f"torchvision: `paste_masks_in_image`, {AT_ONCE} masks at a time, and their pixels",
}


def main() -> None:
    """Print the section, or measure once when called by itself with `--measure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4000, help="width and height of the image")
    parser.add_argument("--detections", type=int, default=100, help="instances on the image")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; the median is shown")
    parser.add_argument("--measure", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.detections, options.size)))
        return
    runs: dict[str, list[dict[str, Any]]] = {what: [] for what in NAMES}
    for _ in range(options.rounds):
        for what in NAMES:
            command = [sys.executable, __file__, "--measure", what]
            command += ["--size", str(options.size), "--detections", str(options.detections)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[what].append(json.loads(done.stdout.splitlines()[-1]))
    print("## Post-processing\n")
    print(
        f"An image of {options.size}x{options.size} pixels has {options.detections} predictions, from tiny ones to one "
        "that covers the whole image.\n"
    )
    print("\n".join(table(runs)))


def table(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of a Markdown table. The second row is compared with the first."""
    heads = ["", "seconds", "times the first", "peak memory, MB", "mask pixels, all detections"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    first = statistics.median(one["seconds"] for one in runs["flawmask"])
    for what, rounds in runs.items():
        seconds = statistics.median(one["seconds"] for one in rounds)
        peak = max(one["megabytes"] for one in rounds)
        cells = [NAMES[what], f"{seconds:.3f}", f"{seconds / first:.0f}", f"{peak:.0f}", str(rounds[0]["pixels"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measure(what: str, detections: int, size: int) -> dict[str, Any]:
    """Return seconds, peak memory of this process, and the number of pixels of all masks."""
    found = make_detections(detections, size)
    seconds, pixels = (with_flawmask if what == "flawmask" else with_torchvision)(found, size)
    return {"seconds": seconds, "pixels": pixels, "megabytes": peak_megabytes()}


def make_detections(count: int, size: int) -> dict[str, Tensor]:
    """Return raw outputs like a network's: boxes of all sizes, a tenth of them almost image-wide, with ragged blobs."""
    import cv2

    random = np.random.default_rng(0)
    sides = np.exp(random.uniform(np.log(20), np.log(size), (count, 2)))
    sides[: count // 10] = 0.98 * size
    corners = random.random((count, 2)) * (size - sides)
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    ragged = np.stack([cv2.GaussianBlur(random.normal(size=(28, 28)), (0, 0), 2) for _ in range(count)])
    logits = 6 * (0.9 - np.hypot(x, y)) + 8 * ragged
    return {
        "boxes": torch.from_numpy(np.hstack((corners, corners + sides)).astype(np.float32)),
        "labels": torch.full((count,), 2),
        "scores": torch.linspace(0.5, 1, count),
        "masks": torch.from_numpy((1 / (1 + np.exp(-logits)))[:, None].astype(np.float32)),
    }


def with_flawmask(found: dict[str, Tensor], size: int) -> tuple[float, int]:
    """Return the seconds to the image's record, and the number of pixels of its masks."""
    from flawmask.prediction import RawDetections, post_process

    boxes, labels, scores = (found[name].numpy() for name in ("boxes", "labels", "scores"))
    raw = RawDetections(boxes, labels, scores, found["masks"].numpy()[:, 0])
    start = time.perf_counter()
    record = post_process(raw, ("good", "defect"), size, size).to_dict(conf=0.5, min_area=0)
    return time.perf_counter() - start, sum(one["area"] for one in record["instances"])


def with_torchvision(found: dict[str, Tensor], size: int) -> tuple[float, int]:
    """Return the seconds to the masks and their pixels, and the number of pixels."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    pixels = 0
    start = time.perf_counter()
    for at in range(0, len(found["boxes"]), AT_ONCE):
        pasted = paste_masks_in_image(
            found["masks"][at : at + AT_ONCE], found["boxes"][at : at + AT_ONCE], (size, size)
        )
        pixels += int((pasted > 0.5).sum())
    return time.perf_counter() - start, pixels


if __name__ == "__main__":
    main()
