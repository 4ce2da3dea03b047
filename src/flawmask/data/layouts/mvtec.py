"""MVTec AD's layout: `<category>/test/<type>`, `<category>/ground_truth/<type>` and `<category>/train/good`.

Bergmann et al., "MVTec AD: a comprehensive real-world dataset for unsupervised anomaly detection", CVPR 2019;
https://www.mvtec.com/company/research/datasets/mvtec-ad describes the archive.

The masks of defects in `train/<type>` are in `ground_truth/train/<type>`. The script of VisA's authors makes such
folders (prepare_data.py at https://github.com/amazon-science/spot-diff).
"""

from flawmask.data.layouts.type_folders import TypeFolders

_LAYOUT = TypeFolders()

recognised, categories = _LAYOUT.recognised, _LAYOUT.categories
samples, problems = _LAYOUT.samples, _LAYOUT.problems
