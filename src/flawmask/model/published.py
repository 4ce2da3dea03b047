"""Pretrained weights that others have published: where they lie, what they want, what their layers are called."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

Rules = tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...]
"""Renaming rules: patterns that must match a layer's whole name, each with its replacement."""


@dataclass(frozen=True)
class TorchvisionFile:
    """A state dict that torchvision publishes. The file's name ends in the first digits of its SHA-256.

    Attributes:
        url: the address of the file.
        eps: the epsilon of the frozen norms that it was trained with; None for the architecture's own.
    """

    url: str
    eps: float | None = None


@dataclass(frozen=True)
class OtherFile:
    """A file of COCO weights that somebody other than torchvision publishes.

    Attributes:
        url: the address of the file.
        md5: its checksum; None if its publisher states none.
    """

    url: str
    md5: str | None = None


@dataclass(frozen=True)
class PackageFile:
    """A state dict that is part of a Python package.

    Attributes:
        package: the name of the package for pip.
        module: the name of its module.
        path: the path of the file in the package.
        sha256: of the whole file.
        extra: the extra of Flawmask that installs the package.
        licence: of the package.
        origin: where the weights come from.
    """

    package: str
    module: str
    path: str
    sha256: str
    extra: str
    licence: str
    origin: str


ADDRESS = "https://download.pytorch.org/models"
"""The address of torchvision's files."""

RESNET18 = TorchvisionFile(f"{ADDRESS}/resnet18-f37072fd.pth")
RESNET50 = TorchvisionFile(f"{ADDRESS}/resnet50-0676ba61.pth")
MOBILENET_V3_LARGE = TorchvisionFile(f"{ADDRESS}/mobilenet_v3_large-8738ca79.pth")
"""ImageNet classifiers that are the backbones of several detectors."""

LAST = ("fc.", "classifier.", "_conv_head.", "_bn1.", "_fc.")
"""The names of a classifier's last layers begin with one of these."""

OLD_NAMES: Rules = (
    (re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"rpn\.head\.conv\.(weight|bias)"), r"rpn.head.conv.0.0.\1"),
    *(
        (
            re.compile(rf"roi_heads\.mask_head\.mask_fcn{number}\.(weight|bias)"),
            rf"roi_heads.mask_head.{number - 1}.0.\1",
        )
        for number in range(1, 5)
    ),
)
"""From the names of layers before torchvision 0.13 to today's. torchvision's COCO files still use the old names. Rules
that hold for one architecture only are in its record (`Architecture.old_names`)."""

BODY: Rules = ((re.compile(r"(?:features\.)?(.+)"), r"backbone.body.\1"),)
"""From the names of a classifier's layers to their names in most detectors."""


def renamed(state: dict[str, T], rules: Rules) -> dict[str, T]:
    """Return the state dict with renamed tensors. The first rule that matches a whole name applies."""
    new = {}
    for name, tensor in state.items():
        new[next((rule.sub(to, name) for rule, to in rules if rule.fullmatch(name)), name)] = tensor
    return new


def in_backbone(state: dict[str, T], rules: Rules) -> dict[str, T]:
    """Return a classifier's state dict with the names that its layers have in a detector, without its last layers.

    Args:
        state: of the classifier.
        rules: of the detector (`Architecture.backbone_names`).
    """
    layers = {name: tensor for name, tensor in state.items() if not name.startswith(LAST)}
    return renamed(layers, rules)
