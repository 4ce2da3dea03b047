"""Reads the `predictions.json` of `flawmask predict` with pycocotools, and draws it with supervision:
`python show_predictions.py predictions shown` (`pip install supervision`)."""

import json
import sys
from pathlib import Path

import numpy as np
import supervision
from PIL import Image
from pycocotools import mask as rle_tools


def main(predictions: str, output: str) -> None:
    """Write a picture of each image that has predicted instances."""
    Path(output).mkdir(parents=True, exist_ok=True)
    for image in json.loads(Path(predictions, "predictions.json").read_text(encoding="utf-8"))["images"]:
        instances = image.get("instances", [])  # an image that could not be read has an `error` instead
        if not instances:
            continue
        x, y, width, height = np.array([instance["box"] for instance in instances], dtype=np.float32).T
        detections = supervision.Detections(
            xyxy=np.stack([x, y, x + width, y + height], axis=1),
            mask=np.stack([rle_tools.decode(instance["segmentation"]).astype(bool) for instance in instances]),
            confidence=np.array([instance["score"] for instance in instances]),
            class_id=np.zeros(len(instances), dtype=int),
        )
        pixels = np.asarray(Image.open(image["file"]).convert("RGB")).copy()
        picture = supervision.MaskAnnotator().annotate(pixels, detections)
        labels = [f"{instance['class']} {instance['score']:.2f}" for instance in instances]
        picture = supervision.LabelAnnotator().annotate(picture, detections, labels=labels)
        target = Path(output, f"{Path(image['file']).stem}.png")
        Image.fromarray(picture).save(target)
        print(target)


if __name__ == "__main__":
    main(*sys.argv[1:3])
