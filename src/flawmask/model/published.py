"""Pretrained weights that others have published: where they lie, what they want, what their layers are called."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

Rules = tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...]
"""Patterns that fit the whole of a layer's name, each with what that becomes."""


@dataclass(frozen=True)
class TorchvisionFile:
    """A state dict that torchvision publishes. Its name ends in the first digits of its SHA-256.

    Attributes:
        url: where it is.
        eps: the epsilon of frozen norms with which it was trained, where it is not the architecture's own.
    """

    url: str
    eps: float | None = None


@dataclass(frozen=True)
class OtherFile:
    """A file of COCO weights that others than torchvision publish.

    Attributes:
        url: where it is.
        md5: its checksum, where its publisher says one.
    """

    url: str
    md5: str | None = None


@dataclass(frozen=True)
class PackageFile:
    """A state dict that a Python package brings.

    Attributes:
        package: what pip calls the package.
        module: what Python calls it.
        path: where the file lies in it.
        sha256: of the whole file.
        extra: which extra of Flawmask installs the package.
        licence: the package's.
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
"""Where torchvision's files are."""

RESNET18 = TorchvisionFile(f"{ADDRESS}/resnet18-f37072fd.pth")
RESNET50 = TorchvisionFile(f"{ADDRESS}/resnet50-0676ba61.pth")
MOBILENET_V3_LARGE = TorchvisionFile(f"{ADDRESS}/mobilenet_v3_large-8738ca79.pth")
"""Classifiers of ImageNet that several detectors have as their backbone."""

LAST = ("fc.", "classifier.", "_conv_head.", "_bn1.", "_fc.")
"""What the names of a classifier's last layers begin with."""

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
"""What layers were called before torchvision 0.13, whose COCO files still say so, and what they are called now. Names
that mean something else in another architecture are in its record (`Architecture.old_names`)."""

BODY: Rules = ((re.compile(r"(?:features\.)?(.+)"), r"backbone.body.\1"),)
"""What a classifier's layers are called inside most detectors."""


def renamed(state: dict[str, T], rules: Rules) -> dict[str, T]:
    """Return the state dict with its tensors called as the first rule says that fits the whole of a name."""
    new = {}
    for name, tensor in state.items():
        new[next((rule.sub(to, name) for rule, to in rules if rule.fullmatch(name)), name)] = tensor
    return new


def in_backbone(state: dict[str, T], rules: Rules) -> dict[str, T]:
    """Return a classifier's state dict under the names that its layers have inside a detector, without those that name
    ImageNet's classes.

    Args:
        state: the classifier's.
        rules: the detector's (`Architecture.backbone_names`).
    """
    layers = {name: tensor for name, tensor in state.items() if not name.startswith(LAST)}
    return renamed(layers, rules)
