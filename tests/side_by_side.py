"""A layout that Flawmask does not know: `<category>/train|test/<part>-<name>.png`, and beside an image one mask for
each defect type on it, `<part>-<name>_GT_<type>.png`, in which all that is not black is the defect."""

from pathlib import Path
from typing import Literal

import numpy as np

from flawmask.data.layouts import MaskFile, Problem, Sample
from flawmask.images import Pixels
from flawmask.masks import Mask

MARK = "_GT_"


def recognised(root: Path) -> bool:
    return any(root.glob(f"*/test/*{MARK}*.png"))


def categories(root: Path) -> list[str]:
    return sorted({path.parents[1].name for path in root.glob(f"*/*/*{MARK}*.png")})


def samples(root: Path, category: str) -> list[Sample]:
    return [*_of(root, category, "train"), *_of(root, category, "test")]


def problems(root: Path, category: str) -> list[Problem]:
    used = {mask.path for sample in samples(root, category) for mask in sample.masks}
    unused = sorted(set((root / category).glob(f"*/*{MARK}*.png")) - used)
    return [Problem("warning", "no image", path.relative_to(root).as_posix(), "has no image") for path in unused]


def not_black(pixels: Pixels) -> Mask:
    return np.asarray(pixels > 0)


def _of(root: Path, category: str, origin: Literal["train", "test"]) -> list[Sample]:
    found = []
    for image in sorted((root / category / origin).glob("*.png")):
        if MARK in image.stem:
            continue
        files = sorted(image.parent.glob(f"{image.stem}{MARK}*.png"))
        masks = tuple(MaskFile(path, not_black, path.stem.split(MARK)[1]) for path in files)
        found.append(
            Sample(
                image=image,
                masks=masks,
                defect_type=masks[0].defect_type if masks else "good",
                group=image.stem.split("-")[0],
                origin=origin,
                original_file=image.relative_to(root).as_posix(),
                mask_wanted=f"{origin}/{image.stem}{MARK}defect.png",
                good_folder=origin,
            )
        )
    return found
