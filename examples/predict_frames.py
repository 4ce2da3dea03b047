"""Looks at frames as they come, as from a camera: `python predict_frames.py run/best.pt frames`.

Frames are read ahead by threads while the network looks at others. A real camera takes the place of `frames`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy.typing as npt

import flawmask


def frames(folder: Path) -> Iterator[npt.NDArray[Any]]:
    """Yield arrays, (height, width, 3) uint8, with the colours in OpenCV's order, as a camera gives them."""
    for path in sorted(folder.iterdir()):
        frame = cv2.imread(str(path))
        if frame is not None:
            yield frame


def main(model: str, folder: str) -> None:
    """Print the verdict of each frame, and write a picture of each that is rejected."""
    predictor = flawmask.Predictor(model, threshold=0.5, min_area=10)
    for number, prediction in enumerate(predictor.predict(frames(Path(folder)), colour="bgr")):
        if prediction.is_defect:
            found = prediction.defects(predictor.conf, predictor.min_area)  # of all instances, some are of class good
            print(f"frame {number}: {', '.join(one.label for one in found)}, score {found[0].score:.2f}")
            prediction.overlay().save(f"frame_{number}.png")
        else:
            print(f"frame {number}: good")


if __name__ == "__main__":
    main(*sys.argv[1:3])
