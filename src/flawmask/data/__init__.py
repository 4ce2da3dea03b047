"""From the images on disk to COCO folders: scan, split, prepare, augment, check, and a category to try it on."""
