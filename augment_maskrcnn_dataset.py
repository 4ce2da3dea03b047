"""`flawmask augment`: add variants of the training images."""

from flawmask.cli import main

if __name__ == "__main__":
    main("augment")
