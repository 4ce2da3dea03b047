"""Drawing on images: outlines, tags, captions, contact sheets. Line and text sizes follow the size of the image.

Images are (height, width, 3) uint8 RGB, masks (height, width) bool. Arguments are never changed.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from flawmask.fonts import plain, runs
from flawmask.masks import Mask, box_of, decode, shrunk_rle

Picture = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

# Okabe and Ito, "Color Universal Design", 2008: people with any kind of colour vision can tell these colours apart.
TRUTH: Colour = (0, 158, 115)
"""Bluish green, for true defects."""
PREDICTION: Colour = (213, 94, 0)
"""Vermillion, for predicted defects."""

INK: Colour = (24, 24, 24)
PAPER: Colour = (255, 255, 255)
SURROUND: Colour = (226, 226, 226)  # beside a letterboxed image, so that its own edge can be seen

FILL = 0.25  # opacity inside a mask: low enough to show the defect itself
CASING = 0.6  # opacity of the dark rim that separates the line from a background of the same colour


def outline(image: Picture, mask: Mask, colour: Colour, thickness: int | None = None) -> Picture:
    """Return the image with the mask lightly filled and a line around it. The line hides no pixel of the mask.

    Args:
        image: (height, width, 3) uint8 RGB.
        mask: (height, width) bool; an empty one draws nothing.
        colour: RGB.
        thickness: the width of the line in pixels; by default 1/250 of the image's shorter side, at least 2.
    """
    drawn = image.copy()
    if not mask.any():
        return drawn
    line = thickness or _line(image)
    rim = _rim(line)
    x, y, width, height = box_of(mask)
    reach = line + rim + 1  # only this window changes, so that a small mask on a large image is drawn quickly
    window = np.s_[max(0, y - reach) : y + height + reach, max(0, x - reach) : x + width + reach]
    inside = mask[window]
    away = cv2.distanceTransform((~inside).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Neighbouring pixels have distance 1, so a line of n pixels ends at n. It fades over one more pixel: a smooth edge.
    cover = np.clip(line + 1 - away, 0, 1) * ~inside
    shade = np.clip(line + rim + 1 - away, 0, 1) * ~inside * CASING
    pixels = _blend(drawn[window].astype(np.float32), (0, 0, 0), shade)
    pixels = _blend(pixels, colour, cover + FILL * inside)
    drawn[window] = np.rint(pixels)
    return drawn


def _line(image: Picture) -> int:
    """Return the width of an outline's line in pixels."""
    return max(2, round(int(min(image.shape[:2])) / 250))


def _rim(line: int) -> int:
    """Return the width of the dark rim around a line."""
    return max(1, line // 3)


def _blend(
    pixels: npt.NDArray[np.float32], colour: Colour, opacity: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    return pixels + opacity[:, :, None] * (np.array(colour, np.float32) - pixels)


def box_labels(image: Picture, labels: Sequence[tuple[str, int, int]], colour: Colour) -> Picture:
    """Return the image with a tag just above each place. Tags leave room for an outline's line, and stay on the image.

    A tag that would cover an earlier one is left out, and so is a tag without text.

    Args:
        image: (height, width, 3) uint8 RGB.
        labels: for each tag, a line of text and a place, usually the upper left corner of a box: column and row. A text
            that is too wide for the image loses its middle. The most important tag comes first.
        colour: RGB of the tags; the text is black or white, whichever is easier to read.
    """
    drawn = image.copy()
    taken = np.zeros(image.shape[:2], dtype=bool)
    for text, x, y in labels:
        if not text:
            continue
        tag = _tag(image, text, colour)
        top, left = _tag_corner(image, tag, x, y)
        window = np.s_[top : top + tag.shape[0], left : left + tag.shape[1]]
        if not taken[window].any():
            drawn[window], taken[window] = tag, True
    return drawn


def _tag(image: Picture, text: str, colour: Colour) -> Picture:
    """Return the tag for an image of this size; it is never larger than the image."""
    size = _text_size(image)
    wanted = round(_length(plain(text), size)) + 2 * _margin(size)
    red, green, blue = colour
    ink = INK if 0.299 * red + 0.587 * green + 0.114 * blue > 90 else PAPER
    return _strip(text, min(wanted, image.shape[1]), size, ink, colour)[: image.shape[0]]


def _tag_corner(image: Picture, tag: Picture, x: int, y: int) -> tuple[int, int]:
    """Return the row and column of a tag's upper left corner: above (x, y), and on the image."""
    line = _line(image)
    top = min(max(0, y - line - _rim(line) - tag.shape[0]), image.shape[0] - tag.shape[0])
    return top, min(max(0, x), image.shape[1] - tag.shape[1])


def title_bar(image: Picture, text: str, colour: Colour = INK) -> Picture:
    """Return the image below a white strip with the text. A text that is too wide loses its middle.

    Args:
        image: (height, width, 3) uint8 RGB.
        text: one line.
        colour: RGB of the text.
    """
    return np.vstack((_strip(text, image.shape[1], _text_size(image), colour, PAPER), image))


def side_by_side(left: Picture, right: Picture) -> Picture:
    """Return both images side by side with a thin white gap. The space below the lower one is white."""
    height = max(left.shape[0], right.shape[0])
    gap = max(2, min(left.shape[:2]) // 100)
    sheet = _blank(height, left.shape[1] + gap + right.shape[1], PAPER)
    sheet[: left.shape[0], : left.shape[1]] = left
    sheet[: right.shape[0], left.shape[1] + gap :] = right
    return sheet


def fit(image: Picture, width: int, height: int) -> Picture:
    """Return the image, with its proportions, at the largest size that fits into `width` x `height` pixels."""
    size = _fitting(image.shape[0], image.shape[1], width, height)
    shrinks = size[0] < image.shape[1]
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR), np.uint8)


def fit_mask(mask: Mask, width: int, height: int) -> Mask:
    """Return the mask at the size that `fit` gives its image. A pixel is set if any of its mask pixels is set, so that
    thin masks stay whole."""
    size = _fitting(mask.shape[0], mask.shape[1], width, height)
    shrinks = size[0] < mask.shape[1] or size[1] < mask.shape[0]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(mask.astype(np.float32), size, interpolation=method) > 0)


def fit_rle(rle: dict[str, Any], width: int, height: int) -> Mask:
    """Return the result of `fit_mask` for a compressed RLE. If it shrinks, no mask of the image's size is made."""
    rows, columns = rle["size"]
    size = _fitting(rows, columns, width, height)
    shrinks = size[0] < columns or size[1] < rows
    return shrunk_rle(rle, size[1], size[0]) if shrinks else fit_mask(decode(rle, rows, columns), *size)


def contact_sheet(
    images: Sequence[Picture], columns: int, cell: tuple[int, int], captions: Sequence[str] = ()
) -> Picture:
    """Return all images on one sheet, row by row, each fitted into a cell of the same size.

    Small images are enlarged before they get their captions, so that all captions are sharp.

    Args:
        images: each (height, width, 3) uint8 RGB, of any size; at least one.
        columns: the number of images in a row.
        cell: width and height of a cell in pixels, without its caption.
        captions: a line above each image, in the order of `images`; none by default.
    """
    width, height = cell
    cells = [_letterbox(image, width, height) for image in images]
    if captions:
        size = max(11, min(cell) // 16)
        cells = [
            np.vstack((_strip(text, width, size, INK, PAPER), each)) for text, each in zip(captions, cells, strict=True)
        ]
    gap = max(2, min(cell) // 24)
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    down, across = cells[0].shape[0] + gap, width + gap
    sheet = _blank(rows * down + gap, columns * across + gap, PAPER)
    for number, each in enumerate(cells):
        top, left = gap + number // columns * down, gap + number % columns * across
        sheet[top : top + each.shape[0], left : left + width] = each
    return sheet


def _letterbox(image: Picture, width: int, height: int) -> Picture:
    fitted = fit(image, width, height)
    box = _blank(height, width, SURROUND)
    top, left = (height - fitted.shape[0]) // 2, (width - fitted.shape[1]) // 2
    box[top : top + fitted.shape[0], left : left + fitted.shape[1]] = fitted
    return box


def _fitting(height: int, width: int, max_width: int, max_height: int) -> tuple[int, int]:
    """Return the width and height to which a picture is scaled, each at least 1."""
    scale = min(max_width / width, max_height / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _blank(height: int, width: int, colour: Colour) -> Picture:
    return np.full((height, width, 3), colour, np.uint8)


def _text_size(image: Picture) -> int:
    """Return the text size in pixels: 1/40 of the shorter side, at least 11, which is still readable."""
    return max(11, int(min(image.shape[:2])) // 40)


def _margin(size: int) -> int:
    return max(2, size // 3)


def _length(text: str, size: int) -> float:
    """Return the width of a text in pixels."""
    return sum(font.getlength(part) for part, font in runs(text, size))


def _strip(text: str, width: int, size: int, ink: Colour, paper: Colour) -> Picture:
    """Return a strip with one line of text, `width` pixels wide and about 1.5 times as high as the text."""
    margin = _margin(size)
    strip = Image.new("RGB", (width, size + 2 * margin - 1), paper)
    pen, x = ImageDraw.Draw(strip), float(margin)
    for part, font in runs(_shortened(plain(text), size, width - 2 * margin), size):
        pen.text((x, strip.height // 2), part, fill=ink, font=font, anchor="lm")
        x += font.getlength(part)
    return np.asarray(strip, dtype=np.uint8)


def _shortened(text: str, size: int, width: int) -> str:
    """Return the text. If it is wider than `width` pixels, an ellipsis replaces its middle."""
    if _length(text, size) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):  # the end gets the odd letter, because file names differ there
        shorter = f"{text[: kept // 2]}…{text[len(text) - (kept + 1) // 2 :]}"
        if _length(shorter, size) <= width:
            return shorter
    return ""
