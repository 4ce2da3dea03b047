"""Procedural inspection images: a product under a camera, with or without a defect, and the defect's exact mask.

Lengths are in units of half the image's side, so the picture looks alike at any size. A "field" is one float64 per
pixel. The random numbers of the product are drawn before those of the defect. So the same seed gives the same
photograph with and without its defect, identical to the byte outside the mask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from flawmask.masks import Mask, components

Product = Literal["washer", "plate", "cap", "slab"]
Defect = Literal["broken_edge", "contamination", "scratch", "hole", "pits", "stain", "crack"]

Field = npt.NDArray[np.float64]
Rng = np.random.Generator

LIGHT = np.array([-0.6, -0.8])  # direction of the light: from the upper left
SUPERSAMPLING = 4  # each pixel's coverage by a defect is counted on 4x4 points
MIN_COVERAGE = 0.35  # a pixel of which a defect covers less is not changed, and is not in the mask
MIN_PRODUCT = 0.12  # the same for a pixel that hardly shows the product; low, or a bite would leave traces of the edge
MIN_AREA = 20 / 256**2  # smaller specks are left out; as a share of the image: 20 pixels at 256x256
MIN_CONTRAST = 0.3  # between a defect's colour and the product's colour, on a scale from 0 to 1

# Each list holds dark and bright colours, so that one of them stands out from any product.
# Oil, rust, grease, yellow paint; below, bare metal and a dark groove.
FOREIGN_MATTER = np.array([(0.07, 0.06, 0.05), (0.32, 0.15, 0.05), (0.93, 0.9, 0.8), (0.9, 0.7, 0.1)])
SCRATCHES = np.array([(0.93, 0.92, 0.9), (0.1, 0.09, 0.09)])


@dataclass(frozen=True)
class Part:
    """A product's shape and paint, before it is lit.

    Attributes:
        outline: field, signed distance to the outer edge, negative inside.
        openings: field, signed distance to the designed openings, negative inside them.
        paint: (size, size, 3), RGB from 0 to 1.
        background: RGB of the surface that the product lies on.
    """

    outline: Field
    openings: Field
    paint: Field
    background: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """A lit product as the lens sees it, and the geometry that a defect needs.

    Attributes:
        picture: (size, size, 3), RGB from 0 to 1, without sensor noise.
        background: the same picture without the product.
        coverage: field, the share of each pixel that the product covers.
        outline: field, signed distance to the outer edge, negative inside.
        openings: field, signed distance to the designed openings, negative inside them.
    """

    picture: Field
    background: Field
    coverage: Field
    outline: Field
    openings: Field

    @property
    def depth(self) -> Field:
        """Field: distance to the nearest edge, outer or of an opening; negative outside the product."""
        return np.minimum(-self.outline, self.openings)


def draw(rng: Rng, product: Product, defect: Defect | None, size: int) -> tuple[npt.NDArray[np.uint8], Mask]:
    """Return one photograph, (size, size, 3) uint8 RGB, and the (size, size) mask of the pixels changed by the defect.

    Args:
        rng: the source of all random numbers.
        product: the product under the camera.
        defect: the defect type, drawn in one to three places; None for a good product, whose mask is empty.
        size: side of the image in pixels.
    """
    scene = _light(rng, (PRODUCTS | HARDER_PRODUCTS)[product], size)
    noise = rng.normal(0, 0.012, (size, size, 1)) + rng.normal(0, 0.006, (size, size, 3))
    picture, mask = scene.picture, np.zeros((size, size), dtype=bool)
    places = 0 if defect is None else int(rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
    while defect is not None and (places > 0 or not mask.any()):
        alpha, colour = (DEFECTS | HARDER_DEFECTS)[defect](rng, scene, mask)
        region = _without_specks((alpha >= MIN_COVERAGE) & (scene.coverage >= MIN_PRODUCT))
        blend = picture + alpha[..., None] * (colour - picture)
        picture, mask, places = np.where(region[..., None], blend, picture), mask | region, places - 1
    exposed = picture + noise * np.sqrt(0.3 + np.clip(picture, 0, 1))  # shot noise grows with the light
    return (np.clip(exposed, 0, 1) * 255 + 0.5).astype(np.uint8), mask


def _light(rng: Rng, make: Callable[[Rng, Field, Field], Part], size: int) -> Scene:
    """Return the product slightly off centre, rotated and scaled, and lit from the upper left."""
    column, row = np.meshgrid(*[(np.arange(size) + 0.5) * 2 / size - 1] * 2)
    angle, scale, (right, down) = rng.uniform(-0.3, 0.3), rng.uniform(0.94, 1.06), rng.uniform(-0.05, 0.05, 2)
    x = (np.cos(angle) * (column - right) + np.sin(angle) * (row - down)) / scale
    y = (np.cos(angle) * (row - down) - np.sin(angle) * (column - right)) / scale
    part = make(rng, x, y)

    edge = np.maximum(part.outline, -part.openings) * scale
    coverage = np.clip(0.5 - edge * size / 2, 0, 1)
    slope_y, slope_x = np.gradient(edge, 2 / size)
    facing = slope_x * LIGHT[0] + slope_y * LIGHT[1]
    bevel = np.exp(np.minimum(edge, 0) / 0.018)
    paint = part.paint * (1 + 0.4 * bevel * facing)[..., None] * (1 - 0.25 * np.exp(-np.abs(edge) / 0.012))[..., None]

    slant, vignette = 1 + 0.09 * (column * LIGHT[0] + row * LIGHT[1]), 1 - 0.09 * (row**2 + column**2)
    lamp = rng.uniform(0.93, 1.05) * slant * vignette
    cloth = np.array(part.background) * (1 + 0.015 * _clouds(rng, size, 5))[..., None] * lamp[..., None]
    ground = cloth * _shade(coverage)
    picture = ground + coverage[..., None] * (paint * lamp[..., None] - ground)
    return Scene(picture, cloth, coverage, part.outline * scale, part.openings * scale)


def _shade(coverage: Field) -> Field:
    """Return how much light reaches the ground in the shadow of the product: (size, size, 1), from 0 to 1."""
    size = len(coverage)
    shift = np.array([[1, 0, 0.02 * size], [0, 1, 0.027 * size]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(coverage, shift, (size, size)), (0, 0), 0.022 * size)
    return np.asarray(1 - 0.45 * shadow[..., None], dtype=np.float64)


def _clouds(rng: Rng, size: int, cells: int) -> Field:
    """Return a smooth random field of about -2 to 2 with `cells` lumps to a side."""
    lumps = rng.normal(0, 1, (cells, cells))
    return np.asarray(cv2.resize(lumps, (size, size), interpolation=cv2.INTER_CUBIC), dtype=np.float64)


def _grain(rng: Rng, along: Field, across: Field, length: int) -> Field:
    """Return brush strokes of standard deviation 1 at the given coordinates, `length` times longer than wide."""
    from scipy.ndimage import uniform_filter1d

    strokes = rng.normal(0, 1, (256, 256))
    for _ in range(2):
        strokes = uniform_filter1d(strokes, length, axis=1, mode="wrap")
    strokes /= strokes.std()
    # 128 strokes per unit are about one per pixel at 256x256. The table repeats itself every two units.
    where = [np.mod(128 * axis, 256).astype(np.float32) for axis in (along, across)]
    return np.asarray(cv2.remap(strokes, where[0], where[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP))


def _washer(rng: Rng, x: Field, y: Field) -> Part:
    """A turned steel ring on a dark mat."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    grain = _grain(rng, angle / np.pi, radius, 60)
    # Turned grooves mirror the lamp as two opposite soft fans.
    fans = np.cos(angle - rng.uniform(0.6, 1.2)) ** 4
    tone = 0.5 + 0.2 * fans + 0.022 * grain + 0.008 * _clouds(rng, len(x), 8)
    return Part(radius - 0.74, radius - 0.31, tone[..., None] * [1.0, 0.99, 0.96], (0.10, 0.115, 0.14))


def _plate(rng: Rng, x: Field, y: Field) -> Part:
    """A brushed aluminium plate with rounded corners and a bevelled edge, on a light table."""
    corner = 0.1
    over_x, over_y = np.abs(x) - (0.8 - corner), np.abs(y) - (0.56 - corner)
    rounded = np.hypot(np.maximum(over_x, 0), np.maximum(over_y, 0)) + np.minimum(np.maximum(over_x, over_y), 0)
    bevel = np.exp(-(((rounded - corner + 0.035) / 0.012) ** 2)) * (x * LIGHT[0] + y * LIGHT[1])
    sheen = np.exp(-(((y - rng.uniform(-0.3, 0.3)) / 0.4) ** 2))
    tone = 0.42 + 0.07 * sheen + 0.028 * _grain(rng, x, y, 50) + 0.006 * _clouds(rng, len(x), 6)
    tone = tone + 0.15 * bevel
    return Part(rounded - corner, np.full_like(x, np.inf), tone[..., None] * [0.97, 1.0, 1.04], (0.90, 0.90, 0.88))


def _cap(rng: Rng, x: Field, y: Field) -> Part:
    """A painted crown cap from above on a light table: a glossy top inside 21 flutes."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    facing = (x * LIGHT[0] + y * LIGHT[1]) / np.maximum(radius, 1e-6)
    flutes = np.cos(21 * angle)
    skirt = np.clip((radius - 0.56) / 0.05, 0, 1)
    step = np.exp(-(((radius - 0.555) / 0.022) ** 2))
    gloss = np.exp(-((x + 0.16) ** 2 + (y + 0.22) ** 2) / 0.09)
    colours = np.array([(0.70, 0.10, 0.10), (0.10, 0.28, 0.62), (0.10, 0.42, 0.26), (0.78, 0.50, 0.10)])
    shade = 1 + skirt * (0.22 * flutes - 0.12 + 0.25 * facing) + 0.3 * step * facing
    shade += 0.015 * _clouds(rng, len(x), 7) + 0.012 * _grain(rng, x, y, 1)
    paint = rng.choice(colours) * shade[..., None] + (0.13 * gloss * (1 - skirt))[..., None]
    return Part(radius - 0.73 - 0.016 * flutes, np.full_like(x, np.inf), paint, (0.87, 0.86, 0.84))


def _slab(rng: Rng, x: Field, y: Field) -> Part:
    """A cast, rough surface that fills the picture."""
    size = len(x)
    tone = 0.5 + 0.035 * _clouds(rng, size, 6) + 0.04 * _clouds(rng, size, 24) + 0.05 * _clouds(rng, size, 64)
    everywhere = np.full_like(x, -2.0)
    return Part(everywhere, -everywhere, tone[..., None] * [1.0, 0.98, 0.94], (0.5, 0.49, 0.47))


PRODUCTS: dict[Product, Callable[[Rng, Field, Field], Part]] = {"washer": _washer, "plate": _plate, "cap": _cap}
"""The products of the demo category."""

HARDER_PRODUCTS: dict[Product, Callable[[Rng, Field, Field], Part]] = {"slab": _slab}
"""Further products, which are drawn where they are asked for: a textured one without an edge."""


def _broken_edge(rng: Rng, scene: Scene, taken: Mask) -> tuple[Field, Field]:
    """A jagged bite out of the outer edge: the background shows, behind a rough fracture."""
    size = len(taken)
    centre = _spot(rng, (np.abs(scene.outline) < 2 / size) & (scene.openings > 0.2), taken)
    bite = _fill(size, _blob(rng, centre, rng.uniform(0.2, 0.32) * size / 2, roughness=0.4, corners=17))
    standing = ((scene.coverage > 0.5) & (bite < 0.5)).astype(np.uint8)
    into_bite = cv2.distanceTransform(1 - standing, cv2.DIST_L2, 5) * 2 / size
    rough = 0.5 + 0.1 * _clouds(rng, size, size // 4)
    fracture = np.exp(-((np.asarray(into_bite, dtype=np.float64) / 0.022) ** 2))[..., None]
    ground = scene.background * _shade(scene.coverage * (1 - bite))
    return bite, ground + fracture * (scene.picture * rough[..., None] - ground)


def _contamination(rng: Rng, scene: Scene, taken: Mask) -> tuple[Field, Field]:
    """A lump of foreign matter, or the ring that a dried drop leaves."""
    size = len(taken)
    radius = rng.uniform(0.1, 0.19) * size / 2
    centre = _spot(rng, scene.depth > 0.1, taken)
    edge = _blob(rng, centre, radius, roughness=0.15)
    if rng.random() < 0.35:
        matter = _fill(size, edge, centre + (edge - centre) * rng.uniform(0.5, 0.65))
    else:
        lumps = [_blob(rng, centre + rng.uniform(-0.8, 0.8, 2) * radius, radius * 0.6, 0.3) for _ in range(3)]
        matter = np.max([_fill(size, lump) for lump in [edge, *lumps]], axis=0)
    # Oil, rust, grease, yellow paint.
    colour = _contrasting(rng, scene, matter, FOREIGN_MATTER)
    height = np.asarray(cv2.GaussianBlur(matter, (0, 0), 0.012 * size), dtype=np.float64)
    slope_y, slope_x = np.gradient(height, 2 / size)
    relief = -0.012 * (slope_x * LIGHT[0] + slope_y * LIGHT[1]) + 0.025 * _clouds(rng, size, size // 6)
    return 0.93 * matter * scene.coverage, colour + relief[..., None]


def _scratch(rng: Rng, scene: Scene, taken: Mask) -> tuple[Field, Field]:
    """A thin line, straight or curved, bright or dark; one in three is crossed by another."""
    size = len(taken)
    centre = _spot(rng, scene.depth > 0.08, taken)
    canvas = np.zeros((size * SUPERSAMPLING,) * 2, dtype=np.uint8)
    direction = rng.uniform(0, np.pi)
    for turn in (0.0, rng.uniform(0.5, 1.6))[: 1 + int(rng.random() < 0.35)]:
        heading = np.array([np.cos(direction + turn), np.sin(direction + turn)])
        length, bow = rng.uniform(0.4, 0.9) * size / 2, rng.choice([0.0, 1.0]) * rng.uniform(-0.3, 0.3)
        t = np.linspace(-0.5, 0.5, 40)[:, None]
        path = centre + length * (t * heading + bow * (4 * t**2) * heading[::-1] * [-1, 1])
        width = max(1.0, rng.uniform(1.8, 3.4) * size / 256)
        taper = np.sqrt(1 - 1.6 * t[1:, 0] ** 2)
        corners = np.rint(path * SUPERSAMPLING).astype(int).tolist()
        for start, end, thickness in zip(corners, corners[1:], width * SUPERSAMPLING * taper, strict=False):
            cv2.line(canvas, start, end, 255, round(thickness))
    line = _downsample(canvas)
    colour = _contrasting(rng, scene, line, SCRATCHES)
    return line * scene.coverage, colour + 0.03 * _clouds(rng, size, size // 8)[..., None]


def _hole(rng: Rng, scene: Scene, taken: Mask) -> tuple[Field, Field]:
    """A punched hole, black except for its lit wall. Every second hole has a bright burr around it."""
    size = len(taken)
    radius = rng.uniform(0.1, 0.15) * size / 2
    centre = _spot(rng, scene.depth > 0.16, taken)
    edge = _blob(rng, centre, radius, roughness=0.04)
    hole = _fill(size, edge)
    row, column = np.mgrid[:size, :size] + 0.5
    away = -((column - centre[0]) * LIGHT[0] + (row - centre[1]) * LIGHT[1]) / radius
    wall = 0.03 + 0.16 * np.clip((away - 0.35) / 0.6, 0, 1)
    if rng.random() < 0.5:
        return hole * scene.coverage, np.repeat(wall[..., None], 3, axis=2)
    burr = np.clip(0.88 - 0.07 * away, 0, 1)
    around = _fill(size, centre + (edge - centre) * rng.uniform(1.3, 1.5))
    return around * scene.coverage, np.repeat((burr + hole * (wall - burr))[..., None], 3, axis=2)


def _pits(rng: Rng, scene: Scene, taken: Mask) -> tuple[Field, Field]:
    """Three to eight small, shallow pits near each other: many instances, each of a few pixels."""
    size = len(taken)
    centre = _spot(rng, scene.depth > 0.12, taken)
    spots = centre + rng.uniform(-0.22, 0.22, (int(rng.integers(3, 9)), 2)) * size
    pits = np.max([_fill(size, _blob(rng, spot, rng.uniform(0.022, 0.04) * size / 2, 0.2)) for spot in spots], axis=0)
    inside = pits * (scene.depth > 0.03)
    return inside, scene.picture * rng.uniform(0.45, 0.65)


def _stain(rng: Rng, scene: Scene, taken: Mask) -> tuple[Field, Field]:
    """A patch that is hardly darker or brighter than the product."""
    size = len(taken)
    centre = _spot(rng, scene.depth > 0.12, taken)
    patch = _fill(size, _blob(rng, centre, rng.uniform(0.14, 0.26) * size / 2, roughness=0.25))
    return patch * scene.coverage, scene.picture * (1 + rng.choice([-1, 1]) * rng.uniform(0.1, 0.16))


def _crack(rng: Rng, scene: Scene, taken: Mask) -> tuple[Field, Field]:
    """A dark line of one to two pixels that runs jaggedly across."""
    size = len(taken)
    start = _spot(rng, scene.depth > 0.08, taken)
    direction, canvas = rng.uniform(0, 2 * np.pi), np.zeros((size * SUPERSAMPLING,) * 2, dtype=np.uint8)
    turns = direction + np.cumsum(rng.normal(0, 0.35, int(rng.integers(8, 16))))
    steps = rng.uniform(0.03, 0.06, (len(turns), 1)) * size * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    path = np.rint((start + np.cumsum(steps, axis=0)) * SUPERSAMPLING).astype(np.int32)
    width = max(1.0, rng.uniform(1.3, 2.2) * size / 256)
    cv2.polylines(canvas, [path], False, 255, round(width * SUPERSAMPLING))
    return _downsample(canvas) * scene.coverage, scene.picture * 0.35


DEFECTS: dict[Defect, Callable[[Rng, Scene, Mask], tuple[Field, Field]]] = {
    "broken_edge": _broken_edge,
    "contamination": _contamination,
    "scratch": _scratch,
    "hole": _hole,
}
"""The defect types of the demo category."""

HARDER_DEFECTS: dict[Defect, Callable[[Rng, Scene, Mask], tuple[Field, Field]]] = {
    "pits": _pits,
    "stain": _stain,
    "crack": _crack,
}
"""Further types, which are drawn where they are asked for: small and many, of low contrast, and thin."""


def _spot(rng: Rng, allowed: Mask, taken: Mask) -> Field:
    """Return the centre (x, y) of a random allowed pixel, away from `taken` if possible."""
    apart = cv2.distanceTransform((~taken).astype(np.uint8), cv2.DIST_L2, 5) > 0.22 * len(taken)
    rows, columns = np.nonzero(allowed & apart if (allowed & apart).any() else allowed)
    pick = rng.integers(len(rows))
    return np.array([columns[pick] + 0.5, rows[pick] + 0.5])


def _blob(rng: Rng, centre: Field, radius: float, roughness: float, corners: int = 90) -> Field:
    """Return the (corners, 2) outline of an irregular disc; few corners make it jagged. Lengths are in pixels."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)[:, None]
    waves = np.arange(2, 7)
    reach = 1 + roughness * np.sum(np.cos(waves * angle + rng.uniform(0, 2 * np.pi, 5)) / waves, axis=1)
    return np.asarray(centre + radius * reach[:, None] * np.hstack([np.cos(angle), np.sin(angle)]))


def _fill(size: int, *outlines: Field) -> Field:
    """Return the share of each pixel that is inside the outlines. An outline inside another one cuts a hole."""
    canvas = np.zeros((size * SUPERSAMPLING,) * 2, dtype=np.uint8)
    cv2.fillPoly(canvas, [np.rint(outline * SUPERSAMPLING).astype(np.int32) for outline in outlines], color=255)
    return _downsample(canvas)


def _downsample(canvas: npt.NDArray[np.uint8]) -> Field:
    """Return the share of each pixel that is set on the supersampled canvas."""
    side = len(canvas) // SUPERSAMPLING
    return np.asarray(cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA) / 255.0)


def _contrasting(rng: Rng, scene: Scene, where: Field, colours: Field) -> Field:
    """Return one of the (n, 3) colours that stand out from the product's mean colour at this place."""
    mean = np.average(scene.picture.reshape(-1, 3), axis=0, weights=(where * scene.coverage).ravel())
    contrasting = colours[np.abs(colours - mean).mean(axis=1) > MIN_CONTRAST]
    return np.asarray(rng.choice(contrasting))


def _without_specks(mask: Mask) -> Mask:
    """Return the mask without regions that are too small."""
    large = [region for region in components(mask) if region.sum() >= MIN_AREA * mask.size]
    return np.logical_or.reduce(large) if large else np.zeros_like(mask)
