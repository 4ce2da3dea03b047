"""`flawmask run`: prepare, augment, train and evaluate a category."""

from flawmask.cli import main

if __name__ == "__main__":
    main("run", arch="maskrcnn_resnet50_fpn", weights="coco", augmentation_factor=3, train_augment="off")
