"""Reads `predictions.json`, which `flawmask predict` wrote, with pycocotools, and shows it with supervision:
`python show_predictions.py predictions shown` (`pip install supervision`)."""

import json
import sys
from pathlib import Path

import numpy as np
import supervision
from PIL import Image
from pycocotools import mask as rle_tools


def main(predictions: str, output: str) -> None:
    """Write a picture of each image in which something was found."""
    Path(output).mkdir(parents=True, exist_ok=True)
    for image in json.loads(Path(predictions, "predictions.json").read_text(encoding="utf-8"))["images"]:
        found = image.get("instances", [])  # an image that could not be read has an `error` instead
        if not found:
            continue
        x, y, width, height = np.array([one["box"] for one in found], dtype=np.float32).T
        detections = supervision.Detections(
            xyxy=np.stack([x, y, x + width, y + height], axis=1),
            mask=np.stack([rle_tools.decode(one["segmentation"]).astype(bool) for one in found]),
            confidence=np.array([one["score"] for one in found]),
            class_id=np.zeros(len(found), dtype=int),
        )
        pixels = np.asarray(Image.open(image["file"]).convert("RGB")).copy()
        picture = supervision.MaskAnnotator().annotate(pixels, detections)
        labels = [f"{one['class']} {one['score']:.2f}" for one in found]
        picture = supervision.LabelAnnotator().annotate(picture, detections, labels=labels)
        target = Path(output, f"{Path(image['file']).stem}.png")
        Image.fromarray(picture).save(target)
        print(target)


if __name__ == "__main__":
    main(*sys.argv[1:3])
