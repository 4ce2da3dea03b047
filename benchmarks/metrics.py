"""Times Flawmask's metrics against the plain way on the same arrays, and prints a section of docs/benchmarks.md.

    python benchmarks/metrics.py --images 100 --size 1024

Compared measurements take turns. Each runs in a process of its own, so that its peak memory, imports and input
included, is measured separately. Making and reading the input is not timed. anomalib need not be installed together
with Flawmask: `--anomalib` names a Python that has it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from peak import peak_megabytes

Figures = dict[str, float]
Record = dict[str, Any]

COCO_SIZE = 512
DETECTIONS = 20
IMPORT_FAILED = 3


def main() -> None:
    """Print the section, or measure once when called by itself with `--measure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="images with pixel scores")
    parser.add_argument("--size", type=int, default=1024, help="width and height of these images")
    parser.add_argument("--coco_images", type=int, default=500, help="images with detections")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; the median is shown")
    parser.add_argument("--anomalib", default=sys.executable, help="a Python that can import anomalib")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, folder = options.measure
        print(json.dumps(measure(what, Path(folder))))
        return
    print("## Metrics\n")
    for kind, text in (("dense", "a score everywhere, as noise"), ("sparse", "scores inside instances, 0 elsewhere")):
        with tempfile.TemporaryDirectory() as name:
            make_pixels(Path(name), kind, options.images, options.size)
            print(f"### Pixel level, {kind}: {text}; {options.images} images of {options.size}x{options.size}\n")
            print(pixel_table(Path(name), options.rounds, options.anomalib) + "\n")
    with tempfile.TemporaryDirectory() as name:
        make_detections(Path(name), options.coco_images)
        print(
            f"### COCO AP of masks and boxes; {options.coco_images} images of {COCO_SIZE}x{COCO_SIZE}, "
            f"{DETECTIONS} detections each\n"
        )
        print(coco_table(Path(name), options.rounds))
    print(
        "\nFlawmask computes all eight figures and the curves in one pass over the pixels. The other programs compute "
        "one figure each."
    )


def pixel_table(folder: Path, rounds: int, anomalib: str) -> str:
    """Return the Markdown table of pixel-level metrics."""
    names = {
        "flawmask": "Flawmask: AUROC, AP, both AUPRO, F1-max, IoU, Dice",
        "sklearn": "scikit-learn `roc_auc_score`",
        "anomalib": "anomalib `AUPRO`",
    }
    results = compared(list(names), folder, rounds, {"anomalib": anomalib})
    lines = table(names, results, {"auroc": "AUROC", "aupro": "AUPRO 0.3"})
    if "anomalib" not in results:
        lines.append(
            "\nanomalib is left out: it is not installed here. `python -m venv /tmp/anomalib && "
            "/tmp/anomalib/bin/pip install anomalib`, then `--anomalib /tmp/anomalib/bin/python`."
        )
    return "\n".join(lines)


def coco_table(folder: Path, rounds: int) -> str:
    """Return the Markdown table of COCO AP."""
    names = {
        "hotcoco": "hotcoco, the evaluator that Flawmask calls",
        "flawmask-coco": "Flawmask: records to AP and AR by class and area, and matches for intervals",
        "pycocotools": "pycocotools `COCOeval`",
    }
    return "\n".join(
        table(names, compared(list(names), folder, rounds, {}), {"mask_ap": "mask AP", "box_ap": "box AP"})
    )


def table(names: dict[str, str], results: dict[str, Record], figures: dict[str, str]) -> list[str]:
    """Return the lines of a Markdown table. The others are compared with the first name."""
    ours = results[next(iter(names))]
    heads = ["", "version", "seconds", "times the first", "peak memory, MB", *figures.values(), "largest difference"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    for what, name in names.items():
        if what not in results:
            continue
        one = results[what]
        apart = max(abs(one["figures"][key] - ours["figures"][key]) for key in one["figures"])
        shown = [f"{one['figures'][key]:.6f}" if key in one["figures"] else "" for key in figures]
        cost = [f"{one['seconds']:.2f}", f"{one['seconds'] / ours['seconds']:.1f}", f"{one['megabytes']:.0f}"]
        lines.append(f"| {' | '.join([name, one['version'], *cost, *shown, '' if one is ours else f'{apart:.0e}'])} |")
    return lines


def compared(names: list[str], folder: Path, rounds: int, pythons: dict[str, str]) -> dict[str, Record]:
    """Return for each name its median seconds, highest peak memory and metrics. Missing libraries are left out."""
    found: dict[str, list[Record]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in list(found):
            command = [pythons.get(name, sys.executable), __file__, "--measure", name, str(folder)]
            done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
            if done.returncode == IMPORT_FAILED:
                del found[name]
            elif done.returncode:
                raise SystemExit(f"measuring {name} ended with {done.returncode}")
            else:
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {
            **runs[0],
            "seconds": statistics.median(run["seconds"] for run in runs),
            "megabytes": max(run["megabytes"] for run in runs),
        }
        for name, runs in found.items()
    }


def measure(what: str, folder: Path) -> Record:
    """Return seconds, peak memory of this process, version and metrics of one measurement."""
    ways: dict[str, Callable[[], tuple[str, Callable[[Path], tuple[float, Figures]]]]] = {
        "flawmask": prepare_flawmask,
        "sklearn": prepare_sklearn,
        "anomalib": prepare_anomalib,
        "flawmask-coco": prepare_flawmask_coco,
        "hotcoco": prepare_hotcoco,
        "pycocotools": prepare_pycocotools,
    }
    try:
        version, way = ways[what]()
    except ImportError:
        raise SystemExit(IMPORT_FAILED) from None
    seconds, figures = way(folder)
    return {"seconds": seconds, "megabytes": peak_megabytes(), "version": version, "figures": figures}


def prepare_flawmask() -> tuple[str, Callable[[Path], tuple[float, Figures]]]:
    """Import the library and return its version and a function to time. It reads images one by one, like `evaluate`."""
    from importlib.metadata import version

    from flawmask.evaluation.pixels import PixelTally

    def way(folder: Path) -> tuple[float, Figures]:
        tally, seconds = PixelTally(), 0.0
        for scores, truth in read_pixels(folder):
            predicted = scores >= 0.5
            start = time.perf_counter()
            tally.add("", scores, truth, predicted)
            seconds += time.perf_counter() - start
        start = time.perf_counter()
        figures = tally.figures()
        seconds += time.perf_counter() - start
        return seconds, {key: figures[f"pixel_{key}"] or 0.0 for key in ("auroc", "aupro")}

    return version("flawmask"), way


def prepare_sklearn() -> tuple[str, Callable[[Path], tuple[float, Figures]]]:
    """Import the library and return its version and a function to time. It needs all pixels at once."""
    import sklearn
    from sklearn.metrics import roc_auc_score

    def way(folder: Path) -> tuple[float, Figures]:
        scores, truth = all_pixels(folder)
        scores, truth = scores.ravel(), truth.ravel()
        start = time.perf_counter()
        auroc = roc_auc_score(truth, scores)
        return time.perf_counter() - start, {"auroc": float(auroc)}

    return sklearn.__version__, way


def prepare_anomalib() -> tuple[str, Callable[[Path], tuple[float, Figures]]]:
    """Import the library and return its version and a function to time. It needs all pixels at once."""
    import anomalib
    import torch
    from anomalib.metrics.aupro import _AUPRO

    def way(folder: Path) -> tuple[float, Figures]:
        scores, truth = (torch.from_numpy(array) for array in all_pixels(folder))
        metric = _AUPRO(fpr_limit=0.3)
        start = time.perf_counter()
        metric.update(scores, truth)
        aupro = metric.compute()
        return time.perf_counter() - start, {"aupro": float(aupro)}

    return anomalib.__version__, way


def prepare_flawmask_coco() -> tuple[str, Callable[[Path], tuple[float, Figures]]]:
    """Import the library and return its version and a function to time: `evaluate`, from predictions to metrics."""
    from importlib.metadata import version

    from flawmask.coco import CocoSplit
    from flawmask.evaluation.against import read_predictions
    from flawmask.evaluation.average_precision import average_precision, evaluate_instances

    def way(folder: Path) -> tuple[float, Figures]:
        truth, _ = read_detections(folder)
        annotations: dict[int, list[Record]] = {image["id"]: [] for image in truth["images"]}
        for record in truth["annotations"]:
            annotations[record["image_id"]].append(record)
        by_image = {number: tuple(records) for number, records in annotations.items()}
        split = CocoSplit(folder, tuple(truth["images"]), by_image, tuple(truth["categories"]))
        predictions = read_predictions(folder / "results.json", split)
        start = time.perf_counter()
        figures = average_precision(split, evaluate_instances(split, predictions))
        return time.perf_counter() - start, {
            key: figures[key] for key in ("mask_ap", "mask_ap50", "box_ap", "box_ap50")
        }

    return version("flawmask"), way


def prepare_hotcoco() -> tuple[str, Callable[[Path], tuple[float, Figures]]]:
    """Import the library and return its version and a function to time: only the evaluator, called as in Flawmask."""
    from importlib.metadata import version

    import hotcoco

    def way(folder: Path) -> tuple[float, Figures]:
        truth, results = read_detections(folder)
        figures = {}
        start = time.perf_counter()
        for name, kind in (("mask", "segm"), ("box", "bbox")):
            coco = hotcoco.COCO(truth)
            evaluator = hotcoco.COCOeval(coco, coco.loadRes(results), kind)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluation: Any = evaluator.eval
            precision = np.asarray(evaluation["precision"])[..., 0, -1]
            figures[f"{name}_ap"], figures[f"{name}_ap50"] = float(precision.mean()), float(precision[0].mean())
        return time.perf_counter() - start, figures

    return version("hotcoco"), way


def prepare_pycocotools() -> tuple[str, Callable[[Path], tuple[float, Figures]]]:
    """Import the library and return its version and a function to time."""
    import contextlib
    import io
    from importlib.metadata import version

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def way(folder: Path) -> tuple[float, Figures]:
        truth, results = read_detections(folder)
        figures = {}
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = truth
            coco.createIndex()
            found = coco.loadRes(results)
            for name, kind in (("mask", "segm"), ("box", "bbox")):
                evaluator = COCOeval(coco, found, kind)
                evaluator.evaluate()
                evaluator.accumulate()
                evaluator.summarize()
                figures[f"{name}_ap"] = float(evaluator.stats[0])
                figures[f"{name}_ap50"] = float(evaluator.stats[1])
        return time.perf_counter() - start, figures

    return version("pycocotools"), way


def make_pixels(folder: Path, kind: str, images: int, size: int) -> None:
    """Write scores and truth of images with a few defects each, the same on every call."""
    for at in range(images):
        random = np.random.default_rng([at, size])
        truth = ellipses(random, size, int(random.integers(0, 6)))
        scores = dense_scores(random, truth) if kind == "dense" else sparse_scores(random, truth)
        np.save(folder / f"{at:05d}_scores.npy", scores)
        np.save(folder / f"{at:05d}_truth.npy", truth)


def ellipses(random: np.random.Generator, size: int, count: int) -> npt.NDArray[np.bool_]:
    """Return a mask of ellipses, up to a twelfth of the image's width."""
    import cv2

    canvas = np.zeros((size, size), dtype=np.uint8)
    for _ in range(count):
        x, y = (int(at) for at in random.integers(0, size, 2))
        axes = tuple(int(axis) for axis in random.integers(2, max(size // 24, 3), 2))
        cv2.ellipse(canvas, (x, y), axes, float(random.uniform(0, 180)), 0, 360, 1, -1)
    return canvas.astype(bool)


def dense_scores(random: np.random.Generator, truth: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Return noise that is somewhat higher on defects. All pixels have different values."""
    return np.asarray(0.75 * random.random(truth.shape, dtype=np.float32) + np.float32(0.25) * truth, dtype=np.float32)


def sparse_scores(random: np.random.Generator, truth: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Return scores like a detector's: soft-edged instances on most defects and a few elsewhere, 0 outside them."""
    import cv2

    count, labels = cv2.connectedComponents(truth.astype(np.uint8), connectivity=8)
    masks = [labels == label for label in range(1, count) if random.random() < 0.85]
    masks += [ellipses(random, len(truth), 1) for _ in range(int(random.integers(0, 3)))]
    scores = np.zeros(truth.shape, dtype=np.float32)
    for mask in masks:
        soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), float(random.uniform(1, 5)))
        soft[soft < 1e-3] = 0  # outside the instance's box
        np.maximum(scores, np.float32(random.uniform(0.05, 1)) * soft, out=scores)
    return np.minimum(scores, np.float32(1))


def read_pixels(folder: Path) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]]:
    """Yield scores and truth, image by image."""
    for path in sorted(folder.glob("*_scores.npy")):
        yield np.load(path), np.load(path.with_name(path.name.replace("scores", "truth")))


def all_pixels(folder: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Return scores and truth of all images, (N, height, width) each."""
    count = len(list(folder.glob("*_scores.npy")))
    size = len(np.load(next(folder.glob("*_scores.npy"))))
    scores, truth = np.empty((count, size, size), np.float32), np.empty((count, size, size), np.uint8)
    for at, (one, mask) in enumerate(read_pixels(folder)):
        scores[at], truth[at] = one, mask
    return scores, truth


def make_detections(folder: Path, images: int) -> None:
    """Write a COCO data set and results: each defect is predicted a few times, shifted, with many false positives."""
    truth: Record = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "crack"}, {"id": 2, "name": "dent"}],
    }
    results: list[Record] = []
    for number in range(1, images + 1):
        random = np.random.default_rng([number, COCO_SIZE])
        truth["images"].append({"id": number, "file_name": f"{number}.png", "width": COCO_SIZE, "height": COCO_SIZE})
        masks = [ellipses(random, COCO_SIZE, 1) for _ in range(5)]
        for mask in masks:
            record = outlined(mask, number, int(random.integers(1, 3)))
            truth["annotations"].append({**record, "id": len(truth["annotations"]) + 1, "iscrowd": 0})
        for at in range(DETECTIONS):
            shift = tuple(int(side) for side in random.integers(-4, 5, 2))
            mask = np.roll(masks[at % 5], shift, axis=(0, 1)) if at < 12 else ellipses(random, COCO_SIZE, 1)
            category = truth["annotations"][-5 + at % 5]["category_id"]
            record = outlined(mask, number, category)
            results.append({**record, "score": float(random.random())})
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))


def outlined(mask: npt.NDArray[np.bool_], image: int, category: int) -> Record:
    """Return the fields of a COCO record that truth and results have in common."""
    from flawmask.masks import box_of, to_rle

    return {
        "image_id": image,
        "category_id": category,
        "bbox": [float(side) for side in box_of(mask)],
        "area": int(mask.sum()),
        "segmentation": to_rle(mask),
    }


def read_detections(folder: Path) -> tuple[Record, list[Record]]:
    """Return the COCO data set and the results."""
    return json.loads((folder / "truth.json").read_text()), json.loads((folder / "results.json").read_text())


if __name__ == "__main__":
    main()
