"""VisA's layout: `<category>/Data/Images/Normal`, `Data/Images/Anomaly` and `Data/Masks/Anomaly`; `split_csv/*.csv`.

Each grey level of a mask is a defect type; a mask may have several. For the authors' own categories, the types' names
are those in their id2class.py. For other categories, they are read from `<category>/image_anno.csv`, from images with
one type whose mask has one level. CSV files in `split_csv` divide the images into training and test images
(`object,split,label,image,mask`). The file with two classes and many training images, `2cls_highshot.csv`, is
preferred, because it has defects in both splits.

Zou et al., "SPot-the-Difference self-supervised pre-training for anomaly detection and segmentation", ECCV 2022;
https://github.com/amazon-science/spot-diff.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from flawmask.data.layouts.layout import (
    MaskFile,
    Origin,
    Problem,
    Sample,
    folders_in,
    images_below,
    listed,
)
from flawmask.data.layouts.mask_values import counts_of, not_black, of_values
from flawmask.errors import FlawmaskError
from flawmask.good_names import GOOD

IMAGES, NORMAL, ANOMALY, MASKS = "Data/Images", "Data/Images/Normal", "Data/Images/Anomaly", "Data/Masks/Anomaly"

SPLITS = ("2cls_highshot.csv", "2cls_fewshot.csv", "1cls.csv")
"""The files that divide the images, in order of preference."""

UNNAMED = "anomaly"
"""The type of a defect without a name."""

_PCB = ("Bent", "Melt", "Scratch", "Missing")
TYPES: dict[str, tuple[str, ...]] = {
    "candle": (
        "Chunk Of Wax Missing",
        "Damaged Corner of Packaging",
        "weird candle wick",
        "Different Colour Spot",
        "Extra Wax in Candle",
        "Foreign Particals on Candle",
        "Wax Melded out of the candle",
        "Other",
    ),
    "capsules": ("Bubble", "Discolor", "Scratch", "Leak", "Misshape"),
    "cashew": (
        "Burnt",
        "Corner or Edge Breakage",
        "Different Colour Spot",
        "Middle Breakage",
        "Small Holes",
        "Small Scratches",
        "Stuck Together",
        "Same Colour Spot",
        "Other",
    ),
    "chewinggum": (
        "Chunk of gum missing",
        "Corner Missing",
        "Scratches",
        "Similar Colour Spot",
        "Small Cracks",
        "Other",
    ),
    "fryum": (
        "Burnt",
        "Corner or Edge Breakage",
        "Different Colour Spot",
        "Fryum Stuck Together",
        "Middle Breakage",
        "Similar Colour Spot",
        "Small Scratches",
        "Other",
    ),
    "macaroni1": (
        "Chip Around Edge And Corner",
        "Different Colour Spot",
        "Middle Breakage",
        "Similar Colour Spot",
        "Small Cracks",
        "Small Scratches",
        "Other",
    ),
    "macaroni2": (
        "Breakage down the middle",
        "Color spot similar to the Object",
        "Different Color spot",
        "Small chip around edge",
        "Small Cracks",
        "Small Scratches",
        "Other",
    ),
    "pcb1": _PCB,
    "pcb2": _PCB,
    "pcb3": _PCB,
    "pcb4": ("Burnt", "Scratch", "Missing", "Damage", "Extra", "Wrong Place", "Dirt"),
    "pipe_fryum": (
        "Burnt",
        "Corner And Edge Breakage",
        "Different Colour Spot",
        "Middle Breakage",
        "Similar Colour Spot",
        "Small Scratches",
        "Stuck Together",
        "Small Cracks",
        "Other",
    ),
}
"""The names of the mask levels 1, 2, ... of each category, from id2class.py."""


def recognised(root: Path) -> bool:
    """Return whether a folder under `root` contains `Data/Images`."""
    return any((folder / IMAGES).is_dir() for folder in folders_in(root))


def categories(root: Path) -> list[str]:
    """Return the names of the folders under `root` that contain `Data/Images`, sorted.

    Raises:
        FlawmaskError: there is none.
    """
    found = [folder.name for folder in folders_in(root) if (folder / IMAGES).is_dir()]
    if not found:
        raise FlawmaskError(f"{root} holds no category, which is a folder with {IMAGES}: it holds {listed(root)}")
    return found


def samples(root: Path, category: str) -> list[Sample]:
    """Return the images below `Normal` and `Anomaly`, sorted by path.

    A mask with several levels becomes several masks. The type of an image is the type with the largest area.

    Raises:
        FlawmaskError: there is no image.
    """
    folder = root / category
    normal, anomalous = images_below(folder / NORMAL), images_below(folder / ANOMALY)
    if not normal and not anomalous:
        raise FlawmaskError(f"{folder / IMAGES} holds no image in Normal or Anomaly")
    origins = _origins(root, category)
    masks = _masks(folder)
    files = [masks.get(image.relative_to(folder / ANOMALY).with_suffix("")) for image in anomalous]
    existing = [path for path in files if path is not None]
    levels = {
        path: {level: count for level, count in counts.items() if level}
        for path, counts in zip(existing, counts_of(existing), strict=True)
    }
    names = _names(folder, levels)
    found = [_sample(root, category, image, None, {}, names, origins) for image in normal]
    found += [
        _sample(root, category, image, mask, levels[mask] if mask else {}, names, origins)
        for image, mask in zip(anomalous, files, strict=True)
    ]
    return sorted(found, key=lambda sample: sample.image)


def problems(root: Path, category: str) -> list[Problem]:
    """Return masks without an image, images that are missing in the CSV file, and images that exist only there.

    Raises:
        FlawmaskError: there is no image.
    """
    found = samples(root, category)
    existing = {sample.original_file for sample in found}
    used = {mask.path for sample in found for mask in sample.masks}
    divided = _origins(root, category)
    message = "belongs to no image of Anomaly: add the image, or name the mask after it"
    orphans = [("orphan masks", path, message) for path in images_below(root / category / MASKS) if path not in used]
    lost = [("no image", root / name, f"is only in {_split_file(root)}") for name in sorted(divided.keys() - existing)]
    new = [
        ("not divided", root / name, f"is not in {_split_file(root)}: it counts as one to train with")
        for name in sorted(existing - divided.keys() if divided else ())
    ]
    return [
        Problem("warning", kind, path.relative_to(root).as_posix(), message)
        for kind, path, message in [*orphans, *lost, *new]
    ]


def _sample(
    root: Path,
    category: str,
    image: Path,
    mask: Path | None,
    levels: Mapping[int, int],
    names: Mapping[int, str],
    origins: Mapping[str, Origin],
) -> Sample:
    """Return an image's sample. `levels` holds the number of the mask's pixels for each level except 0."""
    is_good = image.is_relative_to(root / category / NORMAL)
    original = image.relative_to(root).as_posix()
    files = [MaskFile(mask, partial(of_values, values=(level,)), names[level]) for level in levels] if mask else []
    if mask and not files:  # the mask is black or unreadable; this is reported when it is used
        files = [MaskFile(mask, not_black, UNNAMED)]
    largest = max(levels, key=lambda level: levels[level], default=None)
    wanted = image.relative_to(root / category / (NORMAL if is_good else ANOMALY)).with_suffix(".png")
    return Sample(
        image=image,
        masks=tuple(files),
        defect_type=GOOD if is_good else UNNAMED if largest is None else names[largest],
        origin=origins.get(original, "train" if origins else "test"),
        original_file=original,
        mask_wanted="" if is_good else f"{MASKS}/{wanted.as_posix()}",
        good_folder=NORMAL,
    )


def _masks(folder: Path) -> dict[Path, Path]:
    """Return the masks by their path inside the folder of masks, without the suffix."""
    place = folder / MASKS
    return {path.relative_to(place).with_suffix(""): path for path in images_below(place)}


def _names(folder: Path, levels: Mapping[Path, Mapping[int, int]]) -> dict[int, str]:
    """Return the defect type of each mask level."""
    known = dict(enumerate(TYPES.get(folder.name, ()), start=1))
    labels = {} if known else _labels(folder)
    votes = Counter(
        (level, labels[path])
        for path, of_mask in levels.items()
        if len(of_mask) == 1 and path in labels
        for level in of_mask
    )
    # The most frequent name comes last and overwrites the others.
    for (level, name), _ in reversed(votes.most_common()):
        known[level] = name
    every = {level for of_mask in levels.values() for level in of_mask}
    return {level: known.get(level, UNNAMED if len(every) == 1 else f"{UNNAMED}_{level}") for level in every}


def _labels(folder: Path) -> dict[Path, str]:
    """Return the type of each mask for which `image_anno.csv` gives exactly one."""
    rows = _rows(folder / "image_anno.csv")
    return {
        folder.parent / row["mask"]: row["label"]
        for row in rows
        if row.get("mask") and row.get("label") and "," not in row["label"]
    }


def _split_file(root: Path) -> str:
    """Return the name of the CSV file that divides the images, or "" if there is none."""
    return next((f"split_csv/{name}" for name in SPLITS if (root / "split_csv" / name).is_file()), "")


def _origins(root: Path, category: str) -> dict[str, Origin]:
    """Return the split of each image of the category by its path relative to the root, if a CSV file gives it."""
    name = _split_file(root)
    rows: Sequence[Mapping[str, str]] = _rows(root / name) if name else ()
    of_category = (row for row in rows if row.get("object") == category)
    return {row["image"]: "train" if row.get("split") == "train" else "test" for row in of_category if row.get("image")}


def _rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file by column name; none if the file does not exist.

    Raises:
        FlawmaskError: the file is not a CSV file in UTF-8.
    """
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise FlawmaskError(f"{path} cannot be read as a CSV file in UTF-8 ({error}): export it again") from None
