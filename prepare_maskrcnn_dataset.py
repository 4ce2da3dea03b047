"""`flawmask prepare`: MVTec layout to COCO folder."""

from flawmask.cli import main

if __name__ == "__main__":
    main("prepare")
