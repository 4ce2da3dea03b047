"""MVTec AD 2's layout: `test_public/good`, `test_public/bad` with its masks in `test_public/ground_truth/bad`,
`train/good` and `validation/good`.

`000_regular.png`, `000_overexposed.png`, `000_underexposed.png` and `000_shift_1.png` show the same part under
different light conditions, and form a group. `test_private` and `test_private_mixed` have no masks and are not used.

Heckler-Kram et al., "The MVTec AD 2 dataset: advanced scenarios for unsupervised anomaly detection", 2025,
https://arxiv.org/abs/2503.21622; https://www.mvtec.com/company/research/datasets/mvtec-ad-2 describes the archive.
"""

from pathlib import PurePath

from flawmask.data.layouts.type_folders import TypeFolders


def _group(image: PurePath) -> str:
    """Return the name of an image's part: its path without the light condition."""
    return image.with_name(image.stem.split("_")[0]).as_posix()


_LAYOUT = TypeFolders(test="test_public", truth="test_public/ground_truth", group=_group)

recognised, categories = _LAYOUT.recognised, _LAYOUT.categories
samples, problems = _LAYOUT.samples, _LAYOUT.problems
