"""Whether a split has what a network can learn from, before anything is written."""

from flawmask.coco import CocoSplit
from flawmask.model.arch import ArchChoice, architecture, is_chosen
from flawmask.settings import require


def check_lessons(training: CocoSplit, arch: ArchChoice) -> None:
    """Refuse a split with nothing to learn from, and boxes alone for a network that outlines what it finds.

    Args:
        training: the split.
        arch: the network, or `auto` where none is chosen yet.

    Raises:
        FlawmaskError: there is no defect, all defects are crowds, or some are boxes alone and the network has masks.
    """
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
