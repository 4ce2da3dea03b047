"""`flawmask evaluate`: evaluate a trained model on a split."""

from flawmask.cli import main

if __name__ == "__main__":
    main("evaluate")
