"""`flawmask train`: train a Mask R-CNN on a COCO folder."""

from flawmask.cli import main

if __name__ == "__main__":
    main("train", arch="maskrcnn_resnet50_fpn", weights="coco", train_augment="off")
