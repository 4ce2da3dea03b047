"""What `--arch auto` means: the network that suits the device, the weights at hand, the images and the time."""

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
"""The best of the networks that start from nothing on a CPU in the time that people have."""

BOX_NETWORKS: tuple[Arch, Arch, Arch] = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_efficientnet_lite0_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
)
"""The same three where there are boxes and no outlines to learn from."""

PASSES = 20
"""A large network is worth its time where every image can be shown so many times."""

ALSO_COMPARED: tuple[Arch, ...] = ("ssd300_vgg16", "yolo11n-seg")
"""Networks of other kinds that `compare` trains beside the chosen one, where they have weights to start from."""

SECONDS = {"cuda": 0.05, "mps": 0.6, "cpu": 3.0}
"""About what an image takes `LARGE` in training at `SIZE` pixels, by the kind of device (docs/benchmarks.md)."""
SIZE = 800
SMALLEST = 256
"""A time budget does not let images become smaller than this before they are shown less often."""


def choose_network(config: T, images: int, *, has_outlines: bool = True) -> T:
    """Return the settings with the name of a network in the place of `auto`, and say in a line which and why.

    A GPU gets `LARGE` with COCO's weights, unless the time budget is too short for it. A CPU gets `SMALL` with the
    weights that pip brings, unless COCO's lie there already and the time budget is long enough for `LARGE`. What is not
    at hand gives way to what is. Where defects are boxes alone, it is a network that finds boxes.

    Args:
        config: the settings.
        images: how many there are to learn from.
        has_outlines: whether their defects are outlined.

    Raises:
        FlawmaskError: there are weights for neither network, or the device is not there.
    """
    if is_chosen(config.arch):
        return config
    from flawmask.runtime import choose_device

    device = choose_device(config.device).type
    where = {"cuda": "on a GPU", "mps": "on Apple's GPU"}.get(device, "on a CPU")
    large, small, bare = (LARGE, SMALL, FROM_SCRATCH) if has_outlines else BOX_NETWORKS
    if config.weights == "none":
        return _said(config, bare if device == "cpu" else large, f"nothing, {where}")
    seconds = _seconds_for_large(config, images, device)
    has_time = seconds <= seconds_in(config.time_budget) if config.time_budget else device != "cpu"
    # For what is better where there is time, a CPU takes weights that lie there, and fetches none.
    first = [(large, config.offline or device == "cpu")] if has_time else []
    wishes = dict.fromkeys([*first, (small, config.offline), (large, config.offline)])
    time = f" in {config.time_budget}" if config.time_budget else ""
    best = next(iter(wishes))[0]
    problems: dict[Arch, OutOfReachError] = {}
    for name, offline in wishes:
        try:
            source = _source(name, config, offline=offline)
        except OutOfReachError as error:
            problems[name] = error
            continue
        lacking = "" if name == best else f", as none are at hand for {best}"
        return _said(config, name, f"{source}, {where}{time}{lacking}")
    raise problems[large]  # it names both ways out


def _seconds_for_large(config: TrainSettings, images: int, device: str) -> float:
    """Return about how long `PASSES` passes of `LARGE` take: with a time budget, at the smallest size that it leads
    to."""
    size = min(config.image_size, SMALLEST)
    return PASSES * images * SECONDS[device] * (size / SIZE) ** 2


def _source(arch: Arch, config: TrainSettings, *, offline: bool) -> str:
    from flawmask.model.weights import pretrained

    return pretrained(arch, config.weights, offline=offline).source


def _said(config: T, arch: Arch, why: str) -> T:
    log.info("network: %s from %s (--arch names another)", arch, why)
    return replace(config, arch=arch)


def choose_networks(config: T, images: int, *, has_outlines: bool = True) -> list[Arch]:
    """Return the networks that `--archs auto` of `compare` stands for: the one that suits, and those of `ALSO_COMPARED` whose
    weights are at hand. Who is left out is said in a line.

    Args:
        config: the settings of the first, see `choose_network`.
        images: how many there are to learn from.
        has_outlines: whether their defects are outlined; else networks that outline what they find take no part.

    Raises:
        FlawmaskError: see `choose_network`.
    """
    chosen = [choose_network(config, images, has_outlines=has_outlines).network]
    for arch in ALSO_COMPARED:
        if architecture(arch).has_masks and not has_outlines:
            log.info("%s takes no part: it learns outlines, and defects are boxes alone", arch)
            continue
        try:
            _source(arch, config, offline=config.offline)
        except FlawmaskError as error:
            log.info("%s takes no part: %s", arch, error)
            continue
        chosen.append(arch)
    return chosen
