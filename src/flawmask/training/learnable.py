"""Checks that a network can learn from a split. They run before anything is written."""

from flawmask.coco import CocoSplit
from flawmask.good_names import GOOD, looks_good
from flawmask.model.arch import ArchChoice, architecture, is_chosen
from flawmask.settings import require


def check_learnable(training: CocoSplit, arch: ArchChoice, good_name: str | None = None) -> None:
    """Refuse a split from which the network cannot learn.

    Without `--good_name`, a defect category whose name looks like a good one is refused too.

    Args:
        training: the split.
        arch: the network, or `auto` where none is chosen yet.
        good_name: the value of `--good_name`.

    Raises:
        FlawmaskError: there is no defect; all defects are crowds; some defects have only boxes, and the network
            predicts masks; or a category may be good by another name.
    """
    if good_name is None:
        check_names(training)
    path, crowds = training.annotation_file, training.crowds
    defects = sum(len(training.defects(image)) for image in training.images)
    require(
        not crowds or defects > len(crowds),
        f"{path} has no defect to learn from: all {len(crowds)} are crowds (iscrowd: 1), as brushes of labelling tools "
        "write them: use them as instances with --crowds instances, or export polygons",
    )
    require(defects > 0, f"{path} has no defect annotated: there is nothing to learn")
    if is_chosen(arch) and architecture(arch).has_masks:
        training.require_masks(f"{arch} learns masks", "train a network that predicts boxes")


def check_names(training: CocoSplit) -> None:
    """Refuse a defect category whose name looks like that of good images.

    Raises:
        FlawmaskError: there is such a category, and it has annotations.
    """
    in_use = {record["category_id"] for image in training.images for record in training.defects(image)}
    for category in training.categories:
        name = category["name"]
        require(
            category["id"] not in in_use or not looks_good(name),
            f"{training.annotation_file}: the category {name} counts as a defect, but its name looks like that of good "
            f"images: give --good_name {name} if it is good, or --good_name {GOOD} if it is a defect",
        )
