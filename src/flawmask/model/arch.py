"""The names of the architectures, apart from the networks, so that `--help` need not import torch."""

from typing import Literal

Arch = Literal[
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet18_fpn",
    "maskrcnn_mobilenet_v3_large_fpn",
]
