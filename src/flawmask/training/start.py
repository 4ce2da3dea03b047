"""The network as a training starts with it: its spec, its weights, what of it learns."""

from typing import Any

import torch

from flawmask.coco import CocoSplit
from flawmask.joining import DEFAULT
from flawmask.model.arch import architecture
from flawmask.model.build import build, detector_of, freeze
from flawmask.model.layers import to_device
from flawmask.model.spec import ModelSpec, Norm, anchors_for, proposals_for
from flawmask.model.weights import Pretrained, draw_for_frozen_norms, load_matching
from flawmask.training.config import TrainSettings

SMALLEST_NORM_BATCH = 4
"""Below this many images, BatchNorm's statistics are too noisy to learn with."""


def spec_for(config: TrainSettings, training: CocoSplit, given: Pretrained, image_size: int, at_once: int) -> ModelSpec:
    """Return what network the settings ask for.

    Args:
        config: the settings.
        training: names the classes.
        given: the weights that it starts from.
        image_size: the shorter side of the images as the network sees them, in pixels.
        at_once: how many images pass through it together.
    """
    image_size = architecture(config.network).image_size(image_size)
    return ModelSpec(
        arch=config.network,
        classes=training.class_names,
        image_size=image_size,
        norm=_norm(config, given, at_once),
        norm_eps=given.norm_eps,
        anchor_sizes=config.anchor_sizes or anchors_for(image_size),
        max_detections=config.max_detections,
        proposals=config.proposals or proposals_for(image_size),
        join=config.join or DEFAULT,
    )


def _norm(config: TrainSettings, given: Pretrained, at_once: int) -> Norm:
    """Return what normalises: pretrained statistics stay as they are, and a network that starts from nothing makes its
    own where a batch is large enough for them (docs/results.md has the comparison with GroupNorm)."""
    if config.norm != "auto":
        return config.norm
    if given.state:
        return given.norm
    return "batch" if at_once >= SMALLEST_NORM_BATCH and architecture(config.network).may_learn_norms else "group"


def start(
    config: TrainSettings,
    spec: ModelSpec,
    given: Pretrained,
    device: torch.device,
    dtype: torch.dtype,
    *,
    is_pretrained: bool,
) -> Any:
    """Return the network in training mode, its weights loaded, its first stages frozen, on the device.

    A training that goes on is given no weights here, and may be pretrained all the same.
    """
    model = build(spec)
    if given.state:
        load_matching(model, given)
        if spec.architecture.is_drawn_for_norms:
            draw_for_frozen_norms(model, given)
    return ready(config, model, spec, device, dtype, is_pretrained=is_pretrained)


def ready(
    config: TrainSettings,
    model: Any,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    is_pretrained: bool,
) -> Any:
    """Return the network in training mode on the device, frozen where it does not learn, computing in `dtype`."""
    by_default = spec.architecture.trainable_layers if is_pretrained else 5
    freeze(model, spec, by_default if config.trainable_layers is None else config.trainable_layers)
    detector_of(spec).train_in(to_device(model, device).train(), device, dtype)
    return model
