"""`flawmask prepare`: make a COCO folder from a category in MVTec AD's layout."""

from flawmask.cli import main

if __name__ == "__main__":
    main("prepare")
