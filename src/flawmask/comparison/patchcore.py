"""PatchCore, through anomalib: an extra, `pip install "flawmask[anomalib]"`. It sees good parts alone.

Roth et al., "Towards total recall in industrial anomaly detection", CVPR 2022: patches of a part are compared with
those of good parts by the features of a network that was trained on something else, and that does not learn.
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
from torchvision.models import Wide_ResNet50_2_Weights

from flawmask import images
from flawmask.coco import CocoSplit
from flawmask.comparison.classifier import normalised, published_state
from flawmask.comparison.config import PATCHCORE, PUBLISHED, CompareConfig
from flawmask.comparison.entry import Learned, NotThereError, Scored
from flawmask.data import dataset_info, groups, layouts
from flawmask.errors import FlawmaskError
from flawmask.evaluation.leak import content_digests
from flawmask.images import UPPER_BITS, Levels, content_digest
from flawmask.inference.stream import THREADS, in_order
from flawmask.model.weights import load_file, save_file
from flawmask.progress import track
from flawmask.runtime import choose_device, seed_everything

log = logging.getLogger(__name__)

BACKBONE, LAYERS = "wide_resnet50_2", ("layer2", "layer3")
"""As the authors have it."""

SIZE = 256
"""Pixels of the square that it sees; the authors cut 224 out of the middle of it, and a line wants the whole part."""

KEPT = 0.01
"""The share of the patches that is kept: the authors' PatchCore-1 %, in their table within 0.1 points of 10 %."""

Image = npt.NDArray[np.uint8]


def learn(
    config: CompareConfig,
    training: CocoSplit,
    judged: Sequence[CocoSplit],
    path: Path,
    levels: Levels = UPPER_BITS,
) -> Learned:
    """Keep the patches of the good images and write them, and the network that they are seen with, to `path`.

    Args:
        config: the settings.
        training: what the others learn from. PatchCore takes the good ones of the category's training images; of a data
            set that has none, the good images of `training`.
        judged: whose images it must not see, nor others of the parts that they show.
        path: the file, `.pt`.
        levels: what becomes black and white, of values of more than 8 bits.

    Raises:
        NotThereError: anomalib, weights or good images are not there.
    """
    weights = config.weights_of(PATCHCORE)
    if weights == "none":
        raise NotThereError(
            "without pretrained features PatchCore means nothing: give --weights patchcore=FILE (a state dict of "
            f"torchvision's {BACKBONE}), or coco or imagenet, which fetch it"
        )
    model = _network(config)
    where, files = good_images(config, training)
    seen = unjudged(config, training, judged, files, levels)
    left = len(files) - len(seen)
    if not seen:
        of_parts = f" of parts that are not judged: {left} are" if left else ""
        raise NotThereError(f"PatchCore needs good images to compare with, and {where} has none{of_parts}")
    seed_everything(config.seed)
    extractor = model.feature_extractor.feature_extractor
    try:
        published = Wide_ResNet50_2_Weights.IMAGENET1K_V1
        state = published_state(weights, published, extractor.state_dict(), offline=config.offline)
    except FlawmaskError as error:
        if weights in PUBLISHED:  # out of reach
            raise NotThereError(f"{error} (or --weights patchcore=FILE)") from None
        raise
    extractor.load_state_dict(state, strict=False)
    began = time.perf_counter()
    read = partial(images.read_image, levels=levels)
    with closing(in_order(read, seen, THREADS)) as pictures, torch.inference_mode():
        for pixels in track(pictures, "patches", total=len(seen)):
            model(_batch([pixels], model))
        log.info("choosing %.0f %% of the patches of %d images", 100 * KEPT, len(seen))
        with _quiet():
            model.subsample_embedding(KEPT)
        model.eval()
        known = [float(model(_batch([read(file)], model)).pred_score) for file in seen[:: -(-len(seen) // 20)]]
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    save_file(path, {"patchcore": BACKBONE, "usual": max(float(np.mean(known)), 1e-6), "model_state_dict": state})
    parameters = sum(tensor.numel() for tensor in state.values())
    protocol = f"learns from {len(seen)} good images of {where} and no defect"
    if left:
        protocol += f"; {left} others are judged, or show parts that are"
    return Learned(time.perf_counter() - began, 1, SIZE, parameters, protocol)


def _network(config: CompareConfig) -> Any:
    """Return anomalib's network in training mode on the device, its weights drawn at random.

    Raises:
        NotThereError: anomalib is not installed.
    """
    try:
        with _quiet():
            from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    except ImportError:
        raise NotThereError(
            'PatchCore needs anomalib, which is not installed: pip install "flawmask[anomalib]"'
        ) from None
    model = PatchcoreModel(layers=LAYERS, backbone=BACKBONE, pre_trained=False)
    model.train().feature_extractor.eval()
    return model.to(choose_device(config.device))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the bars and the warnings of anomalib and of what it imports."""
    with Path(os.devnull).open("w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


def good_images(config: CompareConfig, training: CocoSplit) -> tuple[str, list[Path]]:
    """Return where the good images that it learns from come from, and the files.

    With `--good_images all`, the category's own training images are divided among the splits.
    """
    own = _own_training_images(config)
    if own:
        where = posixpath.commonpath([posixpath.dirname(sample.original_file) for sample in own])
        return where.removeprefix(f"{config.category}/"), [sample.image for sample in own]
    found = [image for image in training.images if not training.is_defective(image) and "augmentation" not in image]
    return "the training split", [training.image_path(image) for image in found]


def _own_training_images(config: CompareConfig) -> list[layouts.Sample]:
    if not config.category or config.good_images == "all" or config.keep_split:
        return []
    try:
        samples = layouts.samples(config.mvtec_root, config.category, config)
    except FlawmaskError:  # with --skip_prepare, the category need not be there any more
        return []
    return [sample for sample in samples if sample.is_good and sample.origin == "train"]


def unjudged(
    config: CompareConfig,
    training: CocoSplit,
    judged: Sequence[CocoSplit],
    files: Sequence[Path],
    levels: Levels = UPPER_BITS,
) -> list[Path]:
    """Return those of the files whose pictures are not judged, and whose parts are on no image that is.

    Args:
        config: the settings.
        training: tells the groups of its images, and how those of the category's own training images are found.
        judged: the images that are judged.
        files: as `good_images` gives them.
        levels: what becomes black and white, of values of more than 8 bits.
    """
    pattern = dataset_info.origin_of(training.folder.parent)["group_by"]
    parts = {sample.image: groups.parts_of(sample, pattern) for sample in _own_training_images(config)}
    for split in (training, *judged):
        for image in split.images:
            group = image.get("group")
            parts[split.image_path(image)] = [] if group is None else str(group).split(groups.SAME_PART)
    if pattern and (unnamed := sum(not parts[file] for file in files)):
        log.warning("%r finds no part in the names of %d good images: each counts as one of its own", pattern, unnamed)
    shown = [
        groups.keys(digest, parts[split.image_folder / name])
        for split in judged
        for name, digest in content_digests(split, levels).items()
    ]
    with closing(in_order(lambda file: content_digest(images.read_image(file, levels)), files, THREADS)) as digests:
        own = [groups.keys(digest, parts[file]) for file, digest in zip(files, digests, strict=True)]
    group_of = groups.merge([*shown, *own])
    forbidden = set(group_of[: len(shown)])
    return [file for file, group in zip(files, group_of[len(shown) :], strict=True) if group not in forbidden]


def _batch(pixels: Sequence[Image], model: Any) -> Tensor:
    """Return images as the network sees them, (B, 3, S, S) float32."""
    squeezed = [cv2.resize(one, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for one in pixels]
    batch = torch.from_numpy(np.stack(squeezed)).permute(0, 3, 1, 2)
    return normalised(batch.to(next(model.feature_extractor.parameters()).device))


def load(config: CompareConfig, path: Path) -> Callable[[Sequence[Image]], list[Scored]]:
    """Return a function that scores images, each (height, width, 3) uint8 RGB.

    A distance d becomes the score d / (d + what is usual on good images), between 0 and 1: only their order means
    something.

    Raises:
        FlawmaskError: the file is damaged, or anomalib is not installed.
    """
    content = load_file(path)
    model = _network(config)
    model.load_state_dict(content["model_state_dict"])
    model.eval()
    usual = content["usual"]

    @torch.inference_mode()
    def score(batch: Sequence[Image]) -> list[Scored]:
        found = model(_batch(batch, model))
        scores, maps = ((one / (one + usual)).float().cpu().numpy() for one in (found.pred_score, found.anomaly_map))
        return [Scored(float(one), where[0]) for one, where in zip(scores.reshape(-1), maps, strict=True)]

    return score
