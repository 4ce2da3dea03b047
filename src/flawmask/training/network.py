"""Builds the network for a training: its spec, its initial weights, and which of its layers are trained."""

from typing import Any

import torch

from flawmask.coco import CocoSplit
from flawmask.joining import DEFAULT
from flawmask.model.arch import architecture
from flawmask.model.architecture import Start
from flawmask.model.build import build, detector_of, freeze
from flawmask.model.layers import to_device
from flawmask.model.spec import ModelSpec, Norm, anchors_for, proposals_for
from flawmask.model.weights import Pretrained, draw_for_frozen_norms, load_matching
from flawmask.training.config import TrainSettings

MIN_NORM_BATCH = 4
"""With fewer images than this, BatchNorm's statistics are too noisy to train with."""


def spec_for(
    config: TrainSettings, training: CocoSplit, initial_weights: Pretrained, image_size: int, micro_batch_size: int
) -> ModelSpec:
    """Return the spec of the network that the settings describe.

    Args:
        config: the settings.
        training: the training split, which names the classes.
        initial_weights: the weights that the network starts from.
        image_size: the shorter side of the resized images, in pixels; for tiles that are smaller, their side.
        micro_batch_size: images per forward pass.
    """
    tile = config.tile if isinstance(config.tile, int) else None
    image_size = _image_size(config, image_size, tile)
    return ModelSpec(
        arch=config.network,
        classes=training.class_names,
        image_size=image_size,
        norm=_norm(config, initial_weights, micro_batch_size),
        norm_eps=initial_weights.norm_eps,
        anchor_sizes=config.anchor_sizes or anchors_for(image_size),
        max_detections=config.max_detections,
        proposals=config.proposals or proposals_for(image_size),
        join=config.join or DEFAULT,
        semantic_head=config.semantic_head == "auto" and architecture(config.network).has_semantic_head,
        tile=tile,
        overlap=config.overlap if tile and isinstance(config.overlap, int) else 0,
    )


def _image_size(config: TrainSettings, image_size: int, tile: int | None) -> int:
    return architecture(config.network).image_size(min(image_size, tile or image_size))


def seen_size(config: TrainSettings, image_size: int, tile: int) -> int:
    """Return the side, in pixels, at which the network sees a tile. If its input has a fixed size, that may be larger.

    Args:
        config: the settings.
        image_size: the shorter side of the resized images, in pixels.
        tile: the side of the tiles, in pixels.
    """
    spec = ModelSpec(config.network, ("defect",), _image_size(config, image_size, tile))
    return spec.resized(tile, tile)[0]


def _norm(config: TrainSettings, initial_weights: Pretrained, micro_batch_size: int) -> Norm:
    """Return the kind of normalisation layers.

    Pretrained statistics stay frozen. Without pretrained weights, BatchNorm is used if the micro-batch is large enough,
    and GroupNorm otherwise (docs/results.md compares them).
    """
    if config.norm != "auto":
        return config.norm
    if initial_weights.state:
        return initial_weights.norm
    return "batch" if micro_batch_size >= MIN_NORM_BATCH and architecture(config.network).allows_batch_norm else "group"


def build_for_training(
    config: TrainSettings,
    spec: ModelSpec,
    initial_weights: Pretrained,
    device: torch.device,
    dtype: torch.dtype,
    *,
    start: Start,
) -> Any:
    """Return the network on the device, in training mode, with its initial weights and its first stages frozen.

    A resumed training passes no weights here, since its state has them. So `start` says what it began with.
    """
    model = build(spec)
    if initial_weights.state:
        load_matching(model, initial_weights)
        if spec.architecture.init_assumes_norms:
            draw_for_frozen_norms(model, initial_weights)
    return prepare_for_training(config, model, spec, device, dtype, start=start)


def prepare_for_training(
    config: TrainSettings,
    model: Any,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    start: Start,
) -> Any:
    """Return the network on the device, in training mode, with its first stages frozen and its precision set."""
    default = spec.architecture.recipe(start).trainable_layers
    freeze(model, spec, default if config.trainable_layers is None else config.trainable_layers)
    detector_of(spec).train_in(to_device(model, device).train(), device, dtype)
    return model
