"""BTAD's layout: like MVTec AD's, but the folders are called `ok` (good images) and `ko` (defective images).

Images are BMP or PNG. A mask has the name of its image; its suffix may differ.

Mishra et al., "VT-ADL: a vision transformer network for image anomaly detection and localization", ISIE 2021;
http://avires.dimi.uniud.it/papers/btad/btad.zip. The documentation of anomalib's reader describes the folders:
https://anomalib.readthedocs.io/en/latest/markdown/guides/reference/data/datamodules/image/btech.html.
"""

from pathlib import Path

from flawmask.data.layouts.layout import folders_in
from flawmask.data.layouts.type_folders import TypeFolders

_LAYOUT = TypeFolders(good="ok")


def recognised(root: Path) -> bool:
    """Return whether a folder under `root` holds `test/ko`."""
    return any((folder / "test" / "ko").is_dir() for folder in folders_in(root))


categories, samples, problems = _LAYOUT.categories, _LAYOUT.samples, _LAYOUT.problems
