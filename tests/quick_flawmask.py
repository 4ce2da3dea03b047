"""`python quick_flawmask.py train ...` is `flawmask train ...` with the small network, without pictures, timing little.

For tests of processes: who gets a signal, who goes on. A spawned process imports this module again, so what is replaced
here is replaced there, too.
"""

import sys

from small_network import put_in_place
from undrawn import STUBS, patched

drawing = patched(STUBS)
drawing.__enter__()
put_in_place()
if "compare" in sys.argv:
    from flawmask.comparison import speed

    speed.ROUNDS = speed.FEWEST_ROUNDS

if __name__ == "__main__":
    from flawmask.cli import main

    main()
