"""`python -m flawmask` is the command `flawmask`."""

from flawmask.cli import main

if __name__ == "__main__":
    main()
