"""Draw a small category in MVTec AD's layout, to try every command on without a download."""

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flawmask import __version__
from flawmask.data.demo_drawing import DEFECTS, HARDER_DEFECTS, HARDER_PRODUCTS, PRODUCTS, Defect, Product, draw
from flawmask.errors import FlawmaskError
from flawmask.files import atomic_folder, check_output_folder, read_json, write_json
from flawmask.good_names import GOOD
from flawmask.images import encode_png
from flawmask.progress import track

MARKER = "demo_info.json"
SMALLEST = 64  # pixels; below it a scratch is no longer thin


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Draw a small category of products with and without defects, to try the commands on."""

    mvtec_root: Path = Path("datasets/demo")
    """The folder in which the category is made."""
    category: str = "demo"
    """The name of the category's folder."""
    image_size: int = 256
    """Side of the square images in pixels, at least 64."""
    good: int = 60
    """Good images in test/good."""
    defective: int = 40
    """Defective images of each defect type."""
    train_good: int = 20
    """Good images in train/good."""
    products: tuple[Product, ...] = tuple(PRODUCTS)
    """The products to draw, in turn. slab, a rough surface without an edge, is drawn only if named."""
    defects: tuple[Defect, ...] = tuple(DEFECTS)
    """Defect types; each becomes a folder in test. pits (small), stain (faint), crack (thin): drawn only if named."""
    seed: int = 42
    """Seed of everything random: the same seed gives the same files, byte for byte."""
    overwrite: bool = False
    """Replace a demo category that was made with other settings."""


@dataclass(frozen=True)
class Demo:
    """The demo category that `generate` made or found.

    Attributes:
        folder: the category's folder.
        images: the number of images, test and train together.
        defective: the number of images with a defect.
    """

    folder: Path
    images: int
    defective: int


@dataclass(frozen=True)
class _Job:
    """One image to draw: its folder, its number, and its defect or None."""

    folder: str
    index: int
    defect: Defect | None


def generate(config: DemoConfig) -> Demo:
    """Draw the demo category, unless it exists already with the same settings.

    An image depends only on the seed, its folder, its number and the products. So a larger count adds images and does
    not change the others.

    Raises:
        FlawmaskError: a setting is not possible, or the folder holds something else.
    """
    _check(config)
    folder = config.mvtec_root / config.category
    jobs = list(_jobs(config))
    demo = Demo(folder, images=len(jobs), defective=sum(job.defect is not None for job in jobs))
    info = _info(config, demo)
    if not config.overwrite and (folder / MARKER).is_file() and read_json(folder / MARKER) == info:
        return demo
    check_output_folder(folder, MARKER, overwrite=config.overwrite, what="demo category")
    with atomic_folder(folder) as target, ThreadPoolExecutor(max_workers=2) as pool:
        for name in sorted({job.folder for job in jobs}):
            (target / name).mkdir(parents=True)
            if not name.endswith(GOOD):
                (target / name.replace("test", "ground_truth", 1)).mkdir(parents=True)
        for _ in track(pool.map(lambda job: _write(target, job, config), jobs), "Drawing", total=len(jobs)):
            pass
        write_json(target / MARKER, info)
    return demo


def _check(config: DemoConfig) -> None:
    """Raise an error for settings that are not possible."""
    if config.category in ("", ".", "..") or any(mark in config.category for mark in "/\\\0"):
        raise FlawmaskError(f"--category {config.category!r} is not the name of a folder")
    limits = {"image_size": (SMALLEST, 10_000), "seed": (0, 2**63 - 1)}
    for name in ("image_size", "good", "defective", "train_good", "seed"):
        lowest, highest = limits.get(name, (0, 100_000))
        if not lowest <= getattr(config, name) <= highest:
            raise FlawmaskError(f"--{name} is {getattr(config, name)}: it must be {lowest} to {highest}")
    for name, known in (("products", PRODUCTS | HARDER_PRODUCTS), ("defects", DEFECTS | HARDER_DEFECTS)):
        chosen = getattr(config, name)
        if len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
            raise FlawmaskError(f"--{name} {' '.join(chosen)}: each at most once, of {', '.join(known)}")
    if not config.products:
        raise FlawmaskError(f"--products is empty: name at least one of {', '.join(PRODUCTS)}")
    if "slab" in config.products and "broken_edge" in config.defects:
        raise FlawmaskError("a slab has no edge to break: leave slab out of --products or broken_edge out of --defects")
    if config.good + config.defective * len(config.defects) == 0:
        raise FlawmaskError("no image to draw in test/: raise --good, or --defective with at least one of --defects")
    if config.mvtec_root.exists() and not config.mvtec_root.is_dir():
        raise FlawmaskError(f"{config.mvtec_root} is a file: name a folder with --mvtec_root")


def _jobs(config: DemoConfig) -> Iterator[_Job]:
    """Yield every image to draw."""
    yield from (_Job(f"train/{GOOD}", index, None) for index in range(config.train_good))
    yield from (_Job(f"test/{GOOD}", index, None) for index in range(config.good))
    for defect in config.defects:
        yield from (_Job(f"test/{defect}", index, defect) for index in range(config.defective))


def _write(target: Path, job: _Job, config: DemoConfig) -> None:
    """Draw one image and write it, with its mask if it has a defect. `target` is temporary, so no flush is needed."""
    rng = np.random.default_rng([config.seed, zlib.crc32(job.folder.encode()), job.index])
    product = config.products[job.index % len(config.products)]
    image, mask = draw(rng, product, job.defect, config.image_size)
    (target / job.folder / f"{job.index:03d}.png").write_bytes(encode_png(image))
    if job.defect is not None:
        path = target / "ground_truth" / job.defect / f"{job.index:03d}_mask.png"
        path.write_bytes(encode_png(mask.astype(np.uint8) * 255))


def _info(config: DemoConfig, demo: Demo) -> dict[str, Any]:
    """Return the content of the marker file, without the path, so that equal categories are equal byte for byte."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("mvtec_root", "overwrite")}
    return {
        "made_by": "flawmask demo",
        "version": __version__,
        "settings": settings | {"products": list(config.products), "defects": list(config.defects)},
        "images": demo.images,
        "defective": demo.defective,
    }
