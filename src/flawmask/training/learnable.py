"""Whether a split has what a network can learn from, before anything is written."""

from flawmask.coco import CocoSplit
from flawmask.good_names import GOOD, looks_good
from flawmask.model.arch import ArchChoice, architecture, is_chosen
from flawmask.settings import require


def check_learnable(training: CocoSplit, arch: ArchChoice, good_name: str | None = None) -> None:
    """Refuse a split with nothing to learn from, boxes alone for a network that outlines what it finds, and a category
    of defects that is called as good images are, unless somebody says what good images are called.

    Args:
        training: the split.
        arch: the network, or `auto` where none is chosen yet.
        good_name: what `--good_name` says.

    Raises:
        FlawmaskError: there is no defect, all defects are crowds, or some are boxes alone and the network has masks,
            or a category may be good by another name.
    """
    if good_name is None:
        check_names(training)
    path, crowds = training.annotation_file, training.crowds
    defects = sum(len(training.defects(image)) for image in training.images)
    require(
        not crowds or defects > len(crowds),
        f"{path} has no defect to learn from: all {len(crowds)} are crowds (iscrowd: 1), as brushes of labelling tools "
        "write them: take them as instances with --crowds instances, or export polygons",
    )
    require(defects > 0, f"{path} has no defect annotated: there is nothing to learn")
    if is_chosen(arch) and architecture(arch).has_masks:
        training.refuse_boxes_alone(f"{arch} learns outlines", "train a network that finds boxes")


def check_names(training: CocoSplit) -> None:
    """Refuse a category of defects that is called as good images are.

    Raises:
        FlawmaskError: there is one, and something is annotated as it.
    """
    in_use = {record["category_id"] for image in training.images for record in training.defects(image)}
    for category in training.categories:
        name = category["name"]
        require(
            category["id"] not in in_use or not looks_good(name),
            f"{training.annotation_file}: the category {name} counts as a defect and looks as if it were good: say so "
            f"with --good_name {name}, or --good_name {GOOD} if it is a defect",
        )
