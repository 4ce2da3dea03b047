"""`flawmask evaluate`: judge a split with a trained model."""

from flawmask.cli import main

if __name__ == "__main__":
    main("evaluate")
