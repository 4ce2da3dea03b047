"""Make COCO folders from images on disk: scan, split, prepare, augment and check; and a demo category to try it on."""
