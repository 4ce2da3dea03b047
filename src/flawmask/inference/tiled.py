"""Predictions of the tiles of an image become one prediction. Nothing here knows which runtime runs the network."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from flawmask import joining, masks
from flawmask.inference import maps
from flawmask.model.spec import ModelSpec
from flawmask.prediction import (
    Instance,
    Prediction,
    RawDetections,
    post_process,
    union_of,
    with_second_opinion,
)
from flawmask.tiles import Window

MARGIN = 0.5
"""With `--tile_from coarse`, the network sees the tiles around each box that it predicts on the small image. The box
grows by this part of its sides, and by at least one pixel of the small image, on each side."""


@dataclass(frozen=True)
class TiledDetections:
    """The output of a network for the tiles of one image.

    Attributes:
        tiles: each tile with its detections. Their boxes are in pixels of the tile.
        coarse: the maps of the whole image, made small, if the tiles were chosen on it; see `RawDetections`.
    """

    tiles: tuple[tuple[Window, RawDetections], ...]
    coarse: npt.NDArray[np.float32] | None = None


def prediction_of(detections: RawDetections | TiledDetections, spec: ModelSpec, height: int, width: int) -> Prediction:
    """Return the prediction for an image that the network saw whole or in tiles, its instances joined as the spec says.

    What several tiles show of one defect becomes one instance, whatever the rule for joining: see
    `joining.across_tiles`. Its mask is that of the tile that shows all of it or, where none does, the union of the
    parts. Its score is the highest of them, never more. If the network scores pixels, the maps of the tiles become one
    map, and the opinion of that is asked.

    Args:
        detections: the network's output.
        spec: of the network.
        height: of the image.
        width: of the image.
    """
    if isinstance(detections, RawDetections):
        return post_process(detections, spec.classes, height, width, join=spec.join)
    seen = [
        (tile, post_process(replace(one, maps=None), spec.classes, tile.height, tile.width))
        for tile, one in detections.tiles
    ]
    pairs = [
        (_in_image(instance, tile, height, width), tile)
        for tile, one in seen
        for instance in one.instances
        if instance.area
    ]
    instances = sorted(_whole(pairs, has_masks=spec.has_masks), key=lambda one: -one.score)
    prediction = Prediction(height, width, tuple(instances), has_masks=spec.has_masks, classes=spec.classes)
    prediction = prediction.joined(spec.join)
    of_tiles = [(tile, one.maps) for tile, one in detections.tiles if one.maps is not None]
    whole = maps.of_tiles(of_tiles, spec.tile or 1, height, width, detections.coarse) if of_tiles else detections.coarse
    return prediction if whole is None else with_second_opinion(prediction, whole)


def _in_image(instance: Instance, tile: Window, height: int, width: int) -> Instance:
    """Return an instance of a tile in the coordinates of its image."""
    x1, y1, x2, y2 = instance.box
    moved = replace(
        instance,
        box=(x1 + tile.x, y1 + tile.y, x2 + tile.x, y2 + tile.y),
        rle=masks.moved(instance.rle, tile.x, tile.y, height, width),
    )
    if x2 <= tile.width and y2 <= tile.height:
        return moved
    # The box reaches into the padding of a tile of a small image. Its probabilities belong to the whole box.
    box = (moved.box[0], moved.box[1], min(moved.box[2], width), min(moved.box[3], height))
    return replace(moved, box=box, probabilities=None, parts=(moved,))


def _whole(pairs: Sequence[tuple[Instance, Window]], *, has_masks: bool) -> list[Instance]:
    """Return one instance for what several tiles show of one defect.

    Args:
        pairs: the instances of all tiles, in the coordinates of the image, each with its tile.
        has_masks: whether the network predicts masks. If not, the union of boxes is the box around them.
    """
    rles, scores = [one.rle for one, _ in pairs], [one.score for one, _ in pairs]
    labels = [one.label for one, _ in pairs]
    agreements = joining.across_tiles(rles, labels, scores, [tile for _, tile in pairs])
    repeats = joining.repeats(scores, agreements)
    instances = []
    for places in joining.same_defect(rles, labels, scores, agreements):
        kept = [pairs[place][0] for place in places if place not in repeats]
        whole = union_of(kept)
        if not has_masks and len(kept) > 1:
            rle = masks.rle_of_box(whole.box, *whole.rle["size"])
            whole = replace(whole, rle=rle, area=masks.area(rle))
        instances.append(replace(whole, score=max(scores[place] for place in places)))
    return instances


def windows_near(boxes: npt.NDArray[np.float32], windows: Sequence[Window], pixel: float) -> list[Window]:
    """Return the tiles that share a pixel with a box or with its surroundings, in their order.

    Args:
        boxes: (N, 4) float32, x1 y1 x2 y2 in pixels of the image: what the network predicts on the small image.
        windows: all tiles of the image.
        pixel: the side of a pixel of the small image, in pixels of the image.
    """
    margin = np.maximum(MARGIN * (boxes[:, 2:] - boxes[:, :2]), pixel)
    first, last = boxes[:, :2] - margin, boxes[:, 2:] + margin
    near = [((first < [x + wide, y + high]) & (last > [x, y])).all(axis=1).any() for x, y, wide, high in windows]
    return [one for one, is_near in zip(windows, near, strict=True) if is_near]
