"""From a COCO folder to a checkpoint."""
