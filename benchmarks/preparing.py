"""Times prepare, augment and the annotation file against plain ways, and prints a section of docs/benchmarks.md.

    python benchmarks/preparing.py --images 120 --size 900

Compared measurements take turns. Each runs in a process of its own, so that its peak memory, imports and input
included, is measured separately. Making the input and removing the output is not timed.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from peak import peak_megabytes

Figures = dict[str, float]
Record = dict[str, Any]
Way = Callable[[Path, Path], Callable[[], Figures]]
"""A function of the input and output paths that prepares a measurement. It returns the function to time."""

VARIANTS = 6  # for each training image: all variants, so that both ways make the same ones


def main() -> None:
    """Print the section, or measure once when called by itself with `--measure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120, help="images of the category")
    parser.add_argument("--size", type=int, default=900, help="width and height of these images")
    parser.add_argument("--records", type=int, default=100_000, help="images in the annotation file")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; the median is shown")
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "INPUT", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, *paths = options.measure
        print(json.dumps(measure(what, *map(Path, paths))))
        return
    print("## Preparing and augmenting\n")
    with tempfile.TemporaryDirectory() as name:
        print(image_tables(Path(name), options.images, options.size, options.rounds))
    with tempfile.TemporaryDirectory() as name:
        print(record_table(Path(name), options.records, options.rounds))


def image_tables(folder: Path, images: int, size: int, rounds: int) -> str:
    """Return the Markdown of prepare and augment: seconds on all images, peak memory on a quarter and on all."""
    for name, count in (("all", images), ("quarter", max(images // 4, 8))):
        make_category(folder / name / "mvtec" / "part", count, size)
        measured("prepare", folder / name, folder / name / "set")
    kilobytes = np.mean([path.stat().st_size for path in folder.glob("all/mvtec/part/test/*/*.png")]) / 1000
    text = [f"{images} images of {size}x{size} as PNG, {kilobytes:.0f} kB each; half of them good.\n"]
    loops = {
        "prepare": {
            "prepare": "`flawmask prepare`",
            "plain-prepare": "OpenCV loop: read, find contours, write the image again",
            "plain-prepare-copy": "the same, but the image file is copied",
        },
        "augment": {
            "augment": f"`flawmask augment`, {VARIANTS} variants",
            "plain-augment": "OpenCV loop: read, change, write, find contours again",
        },
    }
    for title, names in loops.items():
        results = compared(list(names), folder / "all", rounds)
        for name in names:
            results[name]["figures"]["peak memory on a quarter of the images, MB"] = compared(
                [name], folder / "quarter", 1
            )[name]["megabytes"]
        text += [f"### {title.capitalize()}\n", *table(names, results), ""]
    text.append(
        "If CPU seconds are above seconds, several cores worked. Augmenting spends most of its time on encoding PNGs. "
        "Both programs do that in the same way, so only more cores make it faster. Preparing spends most of its time "
        "on decoding. The loop that copies files checks nothing and keeps no digests.\n"
    )
    return "\n".join(text)


def record_table(folder: Path, records: int, rounds: int) -> str:
    """Return the Markdown of an annotation file of many images: written and read."""
    make_files(folder, records)
    names = {
        "write": "`write_split`",
        "read": "`read_split`, with its checks against the files",
        "plain-read": "`json.load`, without any check",
        "plain-write": "`json.dump`",
    }
    measured("write", folder, folder / "set")
    results = compared(["write", "read", "plain-write", "plain-read"], folder, rounds)
    size = (folder / "set/train/annotations.json").stat().st_size / 1e6
    both = results["write"]["seconds"] + results["read"]["seconds"]
    return "\n".join(
        [
            f"### An annotation file of {records:,} images, {size:.0f} MB\n",
            "The peak memory of writing includes the records. They are generated before the clock starts.\n",
            *table(names, results),
            f"\nWritten and read: {both:.1f} s.",
        ]
    )


def table(names: dict[str, str], results: dict[str, Record]) -> list[str]:
    """Return the lines of a Markdown table. The others are compared with the first name."""
    ours = results[next(iter(names))]
    figures = list(ours["figures"])
    heads = ["", "seconds", "times the first", "CPU seconds", "peak memory, MB", *figures]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    for what, name in names.items():
        one = results[what]
        cost = [f"{one['seconds']:.2f}", f"{one['times']:.2f}", f"{one['cpu']:.2f}", f"{one['megabytes']:.0f}"]
        shown = [f"{one['figures'][key]:.0f}" for key in figures]
        lines.append(f"| {' | '.join([name, *cost, *shown])} |")
    return lines


def compared(names: list[str], folder: Path, rounds: int) -> dict[str, Record]:
    """Return for each name median seconds, median ratio to the first within a round, highest peak memory and counts."""
    runs: dict[str, list[Record]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            keeps = name == "write"  # `read` reads this file
            output = folder / ("set" if keeps else "output")
            runs[name].append(measured(name, folder, output))
            if not keeps:
                shutil.rmtree(output, ignore_errors=True)
    ours = runs[names[0]]
    return {
        name: {
            "figures": dict(found[0]["figures"]),
            "seconds": statistics.median(run["seconds"] for run in found),
            "cpu": statistics.median(run["cpu"] for run in found),
            "times": statistics.median(run["seconds"] / our["seconds"] for run, our in zip(found, ours, strict=True)),
            "megabytes": max(run["megabytes"] for run in found),
        }
        for name, found in runs.items()
    }


def measured(what: str, folder: Path, output: Path) -> Record:
    """Return the result of `measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, str(folder), str(output)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"measuring {what} ended with {done.returncode}")
    found: Record = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(what: str, folder: Path, output: Path) -> Record:
    """Return seconds, peak memory of this process and counts of one measurement."""
    ways: dict[str, Way] = {
        "prepare": flawmask_prepare,
        "plain-prepare": lambda folder, output: plain_prepare(folder, output, encode_again=True),
        "plain-prepare-copy": lambda folder, output: plain_prepare(folder, output, encode_again=False),
        "augment": flawmask_augment,
        "plain-augment": plain_augment,
        "write": flawmask_write,
        "read": flawmask_read,
        "plain-write": plain_write,
        "plain-read": plain_read,
    }
    way = ways[what](folder, output)
    start, work = time.perf_counter(), time.process_time()
    count = way()
    seconds, work = time.perf_counter() - start, time.process_time() - work
    return {"seconds": seconds, "cpu": work, "megabytes": peak_megabytes(), "figures": count or found_in(output)}


def found_in(output: Path) -> Figures:
    """Return the counts of a COCO folder, made by OpenCV from its files, whoever wrote the masks."""
    import cv2
    from pycocotools import mask as rle_tools

    images = instances = pixels = size = 0
    for path in output.glob("*/annotations.json"):
        content = json.loads(path.read_bytes())
        sides = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        images, instances = images + len(sides), instances + len(content["annotations"])
        size += sum(file.stat().st_size for file in (path.parent / "images").iterdir())
        for record in content["annotations"]:
            if "iscrowd" in record:  # Flawmask's: along pixel edges
                pixels += int(rle_tools.area(rle_of(record, *sides[record["image_id"]])))
            else:  # OpenCV's: through the centres of the outermost pixels
                canvas = np.zeros(sides[record["image_id"]], np.uint8)
                points = [np.array(one, np.int32).reshape(-1, 1, 2) for one in record["segmentation"]]
                pixels += int(cv2.countNonZero(cv2.fillPoly(canvas, points, 1)))
    return {"images": images, "instances": instances, "mask pixels": pixels, "images written, MB": size / 1e6}


def rle_of(record: Record, height: int, width: int) -> Any:
    """Return the RLE of an annotation that Flawmask wrote."""
    from pycocotools import mask as rle_tools

    segmentation = record["segmentation"]
    if isinstance(segmentation, dict):
        return segmentation
    return rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))


# Flawmask


def flawmask_prepare(folder: Path, output: Path) -> Callable[[], Figures]:
    """Import Flawmask and return `flawmask prepare` as a library call."""
    from flawmask.data.prepare import PrepareConfig, prepare

    def run() -> Figures:
        prepare(PrepareConfig(mvtec_root=folder / "mvtec", category="part", output_dir=output))
        return {}

    return run


def flawmask_augment(folder: Path, output: Path) -> Callable[[], Figures]:
    """Import Flawmask and return `flawmask augment` as a library call."""
    from flawmask.data.augment import AugmentConfig, augment

    def run() -> Figures:
        augment(AugmentConfig(dataset_dir=folder / "set", output_dir=output, augmentation_factor=VARIANTS))
        return {}

    return run


def flawmask_write(folder: Path, output: Path) -> Callable[[], Figures]:
    """Make up the records, and return a function that writes their annotation file."""
    from flawmask.coco import write_split

    images, annotations, categories = made_up_records(int((folder / "count").read_text()))

    def run() -> Figures:
        write_split(output / "train", images, annotations, categories)
        return {"images": len(images), "instances": len(annotations), "area": sum(one["area"] for one in annotations)}

    return run


def flawmask_read(folder: Path, _: Path) -> Callable[[], Figures]:
    """Import Flawmask and return a function that reads the annotation file."""
    from flawmask.coco import read_split

    def run() -> Figures:
        split = read_split(folder / "set", "train")
        records = [record for of_image in split.annotations.values() for record in of_image]
        return {"images": len(split.images), "instances": len(records), "area": sum(one["area"] for one in records)}

    return run


# The plain ways


def plain_prepare(folder: Path, output: Path, *, encode_again: bool) -> Callable[[], Figures]:
    """Import OpenCV and return a loop over the images that reads them, finds contours and writes them."""
    import cv2

    def run() -> Figures:
        category = folder / "mvtec" / "part"
        paths = sorted((category / "test").glob("*/*.png"))
        random.Random(0).shuffle(paths)
        cut = round(0.8 * len(paths))
        for split, chosen in (("train", paths[:cut]), ("val", paths[cut:])):
            (output / split / "images").mkdir(parents=True)
            content: Record = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "good"}]}
            for number, path in enumerate(chosen, start=1):
                image = cv2.imread(str(path))
                assert image is not None
                mask = np.full(image.shape[:2], 255, np.uint8)
                if path.parent.name != "good":
                    name = f"{path.stem}_mask.png"
                    read: Any = cv2.imread(
                        str(category / "ground_truth" / path.parent.name / name), cv2.IMREAD_GRAYSCALE
                    )
                    _, mask = cv2.threshold(read, 127, 255, cv2.THRESH_BINARY)
                add(content, number, f"{path.parent.name}_{path.name}", mask)
                target = output / split / "images" / f"{path.parent.name}_{path.name}"
                if encode_again:
                    cv2.imwrite(str(target), image)
                else:
                    shutil.copyfile(path, target)
            with (output / split / "annotations.json").open("w") as file:
                json.dump(content, file)
        return {}

    return run


def plain_augment(folder: Path, output: Path) -> Callable[[], Figures]:
    """Import OpenCV and return a loop over the images that reads, changes and writes them, and finds contours."""
    import cv2
    from pycocotools import mask as rle_tools

    moves: list[Callable[[Any], Any]] = [
        lambda image: cv2.flip(image, 1),
        lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
        lambda image: cv2.rotate(image, cv2.ROTATE_180),
        lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
    ]
    changes: list[Callable[[Any], Any]] = [
        lambda image: cv2.GaussianBlur(image, (0, 0), 1.1 * max(1.0, min(image.shape[:2]) / 512)),
        lambda image: cv2.convertScaleAbs(image, alpha=1.2),
    ]

    def run() -> Figures:
        shutil.copytree(folder / "set" / "val", output / "val")
        shutil.copytree(folder / "set" / "train" / "images", output / "train" / "images")
        source = json.loads((folder / "set/train/annotations.json").read_bytes())
        outlines: dict[int, list[Record]] = {image["id"]: [] for image in source["images"]}
        for record in source["annotations"]:
            outlines[record["image_id"]].append(record)
        content: Record = {**source, "images": list(source["images"]), "annotations": list(source["annotations"])}
        number = 1_000_000
        for record in source["images"]:
            image = cv2.imread(str(folder / "set/train/images" / record["file_name"]))
            assert image is not None
            rles = [rle_of(one, *image.shape[:2]) for one in outlines[record["id"]]]
            mask = rle_tools.decode(rle_tools.merge(rles)) * np.uint8(255)
            for change in moves + changes:
                number += 1
                name = f"{record['file_name'].removesuffix('.png')}_{number}.png"
                cv2.imwrite(str(output / "train" / "images" / name), change(image))
                add(content, number, name, change(mask) if change in moves else mask)
        with (output / "train" / "annotations.json").open("w") as file:
            json.dump(content, file)
        return {}

    return run


def add(content: Record, number: int, name: str, mask: npt.NDArray[np.uint8]) -> None:
    """Add an image and its polygons to the COCO content."""
    import cv2

    height, width = mask.shape
    content["images"].append({"id": number, "file_name": name, "width": width, "height": height})
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    for contour in contours:
        content["annotations"].append(
            {
                "id": len(content["annotations"]) + 1_000_000,
                "image_id": number,
                "category_id": 2,
                "bbox": list(cv2.boundingRect(contour)),
                "area": cv2.contourArea(contour),
                "segmentation": [contour.ravel().tolist()],
            }
        )


def plain_write(folder: Path, output: Path) -> Callable[[], Figures]:
    """Make up the records, and return a function that writes them by `json.dump`."""
    images, annotations, categories = made_up_records(int((folder / "count").read_text()))

    def run() -> Figures:
        output.mkdir()
        with (output / "annotations.json").open("w") as file:
            json.dump({"images": images, "annotations": annotations, "categories": categories}, file)
        return {"images": len(images), "instances": len(annotations), "area": sum(one["area"] for one in annotations)}

    return run


def plain_read(folder: Path, _: Path) -> Callable[[], Figures]:
    """Return a function that reads by `json.load`."""

    def run() -> Figures:
        with (folder / "set/train/annotations.json").open() as file:
            content = json.load(file)
        records = content["annotations"]
        return {
            "images": len(content["images"]),
            "instances": len(records),
            "area": sum(one["area"] for one in records),
        }

    return run


# The input


def make_category(folder: Path, images: int, size: int) -> None:
    """Write a category in MVTec AD's layout, half of it good; the same on every call."""
    import cv2

    for at in range(images):
        draw = np.random.default_rng([at, size])
        kind = ("good", "crack", "good", "dent")[at % 4]
        path = folder / "test" / kind / f"{at:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image, mask = photograph(draw, size), regions(draw, size, kind)
        image[mask > 0] = image[mask > 0] // 2
        cv2.imwrite(str(path), image)
        if kind != "good":
            truth = folder / "ground_truth" / kind / f"{path.stem}_mask.png"
            truth.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(truth), mask)


def photograph(draw: np.random.Generator, size: int) -> npt.NDArray[np.uint8]:
    """Return a part under a lamp with a fine texture and a sensor's noise, (size, size, 3).

    It takes about the bytes of a photograph as PNG.
    """
    import cv2

    light = cv2.resize(draw.uniform(60, 200, (4, 4, 3)), (size, size), interpolation=cv2.INTER_CUBIC)
    texture = cv2.GaussianBlur(draw.normal(0, 60, (size, size, 1)), (0, 0), 3.0)[..., None]
    noise = draw.normal(0, 0.8, (size, size, 3))
    return np.clip(light + texture + noise, 0, 255).astype(np.uint8)


def regions(draw: np.random.Generator, size: int, kind: str) -> npt.NDArray[np.uint8]:
    """Return the mask of one to three defects without holes, 0 and 255: thin cracks or dents. A good one is empty."""
    import cv2

    mask = np.zeros((size, size), np.uint8)
    for _ in range(0 if kind == "good" else int(draw.integers(1, 4))):
        if kind == "crack":
            steps = np.cumsum(draw.normal(0, size / 25, (8, 2)), axis=0) + draw.uniform(0.2, 0.8, 2) * size
            cv2.polylines(mask, [np.rint(steps).astype(np.int32)], False, 255, 3)
        else:
            centre, axes = draw.integers(size // 8, size * 7 // 8, 2), draw.integers(size // 60 + 2, size // 10, 2)
            angle = float(draw.uniform(0, 180))
            cv2.ellipse(mask, [int(at) for at in centre], [int(axis) for axis in axes], angle, 0, 360, 255, -1)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(mask, contours, -1, 255, -1)
    return mask


def made_up_records(count: int) -> tuple[list[Record], list[Record], list[Record]]:
    """Return image, annotation and category records as Flawmask writes them: half of the images are good.

    The outlines are cut from a hundred drawn defects, each moved to a place of its own. No list is shared.
    """
    from flawmask.coco import annotation

    size = 1024
    shapes = []
    for at in range(100):
        draw = np.random.default_rng(at)
        mask = regions(draw, 200, "dent" if at % 2 else "crack") > 0
        shapes.append(json.dumps(annotation(mask, id=0, image_id=0, category_id=2)))
    everywhere = json.dumps(annotation(np.ones((size, size), dtype=bool), id=0, image_id=0, category_id=1))
    images: list[Record] = []
    annotations: list[Record] = []
    for number in range(1, count + 1):
        kind = "good" if number % 2 else "crack"
        original = f"part/test/{kind}/{number:06d}.png"
        image = {"id": number, "file_name": file_name(number), "width": size, "height": size}
        images.append({**image, "original_file": original, "defect_type": kind})
        for at in range(1 if number % 2 else 1 + number // 2 % 2):
            record = json.loads(everywhere if number % 2 else shapes[(number // 2 + 37 * at) % 100])
            record |= {"id": len(annotations) + 1, "image_id": number}
            if not number % 2 and isinstance(record["segmentation"], list):
                shift = number % 800
                record["bbox"][0] += shift
                for polygon in record["segmentation"]:
                    polygon[0::2] = [x + shift for x in polygon[0::2]]
            annotations.append(record)
    return images, annotations, [{"id": 1, "name": "good"}, {"id": 2, "name": "defect"}]


def file_name(number: int) -> str:
    """Return the file name of an image that exists only as a name."""
    return f"{number:06d}.png"


def make_files(folder: Path, count: int) -> None:
    """Make empty image files with the names in the annotation file."""
    (folder / "count").write_text(str(count))
    (folder / "set" / "train" / "images").mkdir(parents=True)
    for number in range(1, count + 1):
        (folder / "set" / "train" / "images" / file_name(number)).touch()


if __name__ == "__main__":
    main()
