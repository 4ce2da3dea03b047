"""`python quick_flawmask.py train ...` is `flawmask train ...` with the small network, without pictures, quickly timed.

For tests of processes: who gets a signal, who goes on. A spawned process imports this module again, so what is replaced
here is replaced there, too.
"""

import multiprocessing
import os
import sys
from unittest.mock import patch

import cv2
from small_network import put_in_place
from undrawn import STUBS, patched

drawing = patched(STUBS)
drawing.__enter__()
put_in_place()
if os.environ.get("FORKED"):  # a spawned process takes seconds to import PyTorch
    cv2.setNumThreads(0)  # its threads would be missing in the fork
    forks = multiprocessing.get_context("fork")
    patch("multiprocessing.get_context", lambda _: forks).start()
if "compare" in sys.argv:
    from flawmask.comparison import speed

    speed.MAX_ROUNDS = speed.MIN_ROUNDS

if __name__ == "__main__":
    from flawmask.cli import main

    main()
