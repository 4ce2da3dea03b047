"""Predicts frames one after the other, as from a camera: `python predict_frames.py run/best.pt frames`.

Threads read the next frames while the network predicts. With a real camera, replace the function `frames`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy.typing as npt

import flawmask


def frames(folder: Path) -> Iterator[npt.NDArray[Any]]:
    """Yield frames, (height, width, 3) uint8, with the colours in OpenCV's order, as from a camera."""
    for path in sorted(folder.iterdir()):
        frame = cv2.imread(str(path))
        if frame is not None:
            yield frame


def main(model: str, folder: str) -> None:
    """Print the verdict for each frame, and write an overlay of each rejected frame."""
    predictor = flawmask.Predictor(model, threshold=0.5, min_area=10)
    for number, prediction in enumerate(predictor.predict(frames(Path(folder)), colour="bgr")):
        if prediction.is_defect:
            defects = prediction.defects(predictor.conf, predictor.min_area)  # without instances of class good
            print(f"frame {number}: {', '.join(defect.label for defect in defects)}, score {defects[0].score:.2f}")
            prediction.overlay().save(f"frame_{number}.png")
        else:
            print(f"frame {number}: good")


if __name__ == "__main__":
    main(*sys.argv[1:3])
