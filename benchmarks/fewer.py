"""Makes a data set with fewer training parts, to see what more parts would bring: docs/results.md.

    python benchmarks/fewer.py --dataset_dir data --share 0.5 --output_dir half

A part is a group of `prepare --group_by`, for instance a tile that was photographed several times. The validation split
is copied as it is. A smaller share is always a part of a larger one.
"""

import math
import random
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from flawmask.data import dataset_info
from flawmask.files import read_json, write_json
from flawmask.good_names import GOOD


@dataclass(frozen=True, kw_only=True)
class Config:
    """The data set."""

    dataset_dir: Path
    """What `flawmask prepare --group_by` made."""
    output_dir: Path
    """The folder to make."""
    share: float = 0.5
    """How many of the training parts are kept, of each type of defect: above 0, at most 1."""
    seed: int = 1
    """Which ones."""


def kept_groups(images: list[dict[str, Any]], share: float, seed: int) -> set[str]:
    """Return the groups to keep: this share of those of each type, rounded up. A group's type is its commonest type of
    defect, or `good` if it has none."""
    types: dict[str, Counter[str]] = defaultdict(Counter)
    for image in images:
        types[image["group"]][image["defect_type"]] += 1
    of_type = defaultdict(list)
    for group in sorted(types):
        counts = types[group]
        of_type[max(counts, key=lambda name: (name != GOOD, counts[name], name))].append(group)
    kept: set[str] = set()
    for name, groups in of_type.items():
        random.Random(f"{seed} {name}").shuffle(groups)
        kept.update(groups[: math.ceil(share * len(groups))])
    return kept


def main(config: Config) -> None:
    """Make the data set. Nothing is written if it cannot be made."""
    source = config.dataset_dir / "train"
    content = read_json(source / "annotations.json")
    if not 0 < config.share <= 1:
        raise SystemExit(f"--share {config.share}: give a number above 0 and at most 1")
    if not all("group" in image for image in content["images"]):
        raise SystemExit(f"{source}: it has images of no known part; make it with flawmask prepare --group_by")
    groups = kept_groups(content["images"], config.share, config.seed)
    kept = [image for image in content["images"] if image["group"] in groups]
    ids = {image["id"] for image in kept}
    left_out = {image["file_name"] for image in content["images"] if image["id"] not in ids}
    shutil.copytree(
        config.dataset_dir,
        config.output_dir,
        ignore=lambda folder, _: left_out if Path(folder) == source / "images" else set(),
    )
    instances = [one for one in content["annotations"] if one["image_id"] in ids]
    write_json(config.output_dir / "train" / "annotations.json", {**content, "images": kept, "annotations": instances})
    place = config.output_dir / dataset_info.NAME
    counts = dataset_info.counts(kept)
    write_json(place, {**read_json(place), "made_by": "benchmarks/fewer.py", "share": config.share, "train": counts})
    print(f"{config.output_dir}: {counts['images']} images of {counts['groups']} parts; {counts['by_type']}")


if __name__ == "__main__":
    main(tyro.cli(Config))
