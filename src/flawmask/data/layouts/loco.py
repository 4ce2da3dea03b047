"""MVTec LOCO AD's layout: like MVTec AD's, but each image has a folder of masks, `ground_truth/<type>/<image>/000.png`.

There are also good images in `validation/good`. A mask's grey level, which may be below half, is the key of a defect
kind in `defects_config.json`; this file also says from which area on the defect counts as detected. Every pixel that is
not black is the defect. The type of a defect is its folder, `logical_anomalies` or `structural_anomalies`.

Bergmann et al., "Beyond dents and scratches: logical constraints in unsupervised anomaly detection and localization",
IJCV 130, 2022; https://www.mvtec.com/company/research/datasets/mvtec-loco describes the archive.
"""

from pathlib import Path

from flawmask.data.layouts.layout import folders_in, images_below
from flawmask.data.layouts.mask_values import not_black
from flawmask.data.layouts.type_folders import TypeFolders

_LAYOUT = TypeFolders(has_several=True, rule=not_black)


def recognised(root: Path) -> bool:
    """Return whether a folder under `root` has an image under `test` and a folder of that name under `ground_truth`."""
    return any(
        (folder / "ground_truth" / image.relative_to(folder / "test")).with_suffix("").is_dir()
        for folder in folders_in(root)
        if (folder / "ground_truth").is_dir()
        for image in images_below(folder / "test")
    )


categories, samples, problems = _LAYOUT.categories, _LAYOUT.samples, _LAYOUT.problems
