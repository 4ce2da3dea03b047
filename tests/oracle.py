"""An oracle in the network's place: it returns the exact mask of what lies in a tile, and nothing else.

It sees pixels only. In its images, the ground is black, and the colour of a defect's pixels is the defect's number.
"""

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
import numpy.typing as npt
from random_network import SPEC

from flawmask.inference.backend import Resized
from flawmask.masks import Mask
from flawmask.model.spec import ModelSpec
from flawmask.prediction import RawDetections

Pixels = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int32]


def spec_for(tile: int, overlap: int, shift: int = 0, **changes: object) -> ModelSpec:
    """Return the spec of a network that sees tiles at their own resolution."""
    return replace(SPEC, image_size=tile, tile=tile, overlap=overlap, tile_shift=shift, **changes)  # type: ignore[arg-type]


def image_of(numbers: Numbers) -> Pixels:
    """Return the image for the number of the defect at each pixel, 0 for the ground: (height, width, 3)."""
    return np.stack((numbers & 255, numbers >> 8, np.zeros_like(numbers)), axis=2).astype(np.uint8)


def numbered(mask: Mask) -> Numbers:
    """Return the number of the 8-connected region at each pixel, 0 outside the mask."""
    return np.asarray(cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[1], np.int32)


class Oracle:
    """A `Backend`. The class and the score of a defect follow from its number.

    Attributes:
        in_pieces: whether it returns each connected piece of a defect in a tile by itself.
        seen: the number of tiles that it has seen.
    """

    def __init__(self, spec: ModelSpec, *, in_pieces: bool = False) -> None:
        self.spec, self.batch_size, self.uses_cores, self.resizes = spec, 3, True, False
        self.in_pieces, self.seen = in_pieces, 0

    def infer(self, batch: Sequence[Resized], /) -> list[RawDetections]:
        self.seen += len(batch)
        return [self._detections(one.pixels, one.width / one.pixels.shape[1]) for one in batch]

    def _detections(self, pixels: Pixels, scale: float) -> RawDetections:
        numbers = pixels[:, :, 0] + 256 * pixels[:, :, 1].astype(np.int32)
        found: list[tuple[int, Mask, int, int]] = []
        for number in np.flatnonzero(np.bincount(numbers.ravel())):
            if number:
                mask = numbers == number
                pieces = numbered(mask) if self.in_pieces else mask.astype(np.int32)
                found += [(int(number), *_crop(pieces == one)) for one in range(1, pieces.max() + 1)]
        # Masks have one size and are square. With as many cells as pixels, each cell is exactly one pixel.
        side = max((max(crop.shape) for _, crop, _, _ in found), default=1)
        masks = np.zeros((len(found), side, side), np.float32)
        for mask, (_, crop, _, _) in zip(masks, found, strict=True):
            mask[: crop.shape[0], : crop.shape[1]] = crop
        boxes = [(*_edges(x, side), *_edges(y, side)) for _, _, x, y in found]
        return RawDetections(
            np.array(boxes, np.float32).reshape(-1, 4)[:, [0, 2, 1, 3]] * np.float32(scale),
            np.array([label_of(number) for number, *_ in found], np.int64),
            np.array([score_of(number) for number, *_ in found], np.float32),
            masks,
        )


def label_of(number: int) -> int:
    return 2 + number % 2


def score_of(number: int) -> float:
    return 0.5 + (number % 7) / 16


def _crop(mask: Mask) -> tuple[Mask, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], int(columns[0]), int(rows[0])


def _edges(start: int, cells: int) -> tuple[float, float]:
    """Return the edges of a box whose cells are pasted onto exactly the pixels from `start` on.

    `paste.expand_boxes` adds a cell on each side and rounds towards 0. These edges are far from where it rounds.
    """
    first, last = start - 0.75 - 0.5 * (start == 0), start + cells + 0.5
    centre, half = (first + last) / 2, (last - first) / 2 * cells / (cells + 2)
    return centre - half, centre + half


def assert_exact(found: Sequence[tuple[str, float, Mask]], numbers: Numbers) -> None:
    """Check that each defect is exactly one instance, with its class, its score and its mask to the pixel."""
    expected = {number: np.count_nonzero(numbers == number) for number in range(1, numbers.max() + 1)}
    by_number = {}
    for label, score, mask in found:
        (number, *others) = np.unique(numbers[mask])
        assert not others, "an instance covers more than one defect"
        assert number not in by_number, f"defect {number} is more than one instance"
        by_number[number] = np.count_nonzero(mask)
        assert label == SPEC.classes[label_of(number) - 1]
        assert score == np.float32(score_of(number))
    assert by_number == expected  # masks hold nothing but pixels of their defect, so equal areas are equal masks
