"""The package itself: what importing it takes."""

import subprocess
import sys
from pathlib import Path

import flawmask


def test_a_source_tree_that_nobody_installed_can_be_imported() -> None:
    source = Path(flawmask.__file__).parents[1]
    code = f"import sys; sys.path.append({str(source)!r}); import flawmask; print(flawmask.__version__)"
    # Without site-packages, and so without what an installation left there.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("0+source", 0), done.stderr
