"""`python quick_flawmask.py train ...` is `flawmask train ...` with the small network, nothing drawn, and little timed.

For tests of what becomes of processes: whom a signal reaches, who goes on. A process that is spawned imports this module
again, so that what is replaced here is replaced there, too.
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
