"""Importing the package."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import flawmask


def test_a_source_tree_that_nobody_installed_can_be_imported() -> None:
    source = Path(flawmask.__file__).parents[1]
    code = f"import sys; sys.path.append({str(source)!r}); import flawmask; print(flawmask.__version__)"
    # Without site-packages, and so without what an installation left there.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("0+source", 0), done.stderr


def test_no_module_imports_itself_by_way_of_others() -> None:
    """This holds for imports of modules. A function may import a module that takes seconds to load."""
    source = Path(flawmask.__file__).parent
    modules = {
        ".".join(("flawmask", *path.relative_to(source).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in source.rglob("*.py")
    }
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    graph = {name: (imported(tree) & modules.keys()) - {name} for name, tree in trees.items()}
    assert "flawmask.stages" in graph["flawmask.pipeline"]
    TopologicalSorter(graph).prepare()  # a CycleError names the circle


def imported(tree: ast.Module) -> set[str]:
    """Return the names that a module imports when it is imported itself; some of them may be modules."""
    statements = [one for one in tree.body if isinstance(one, ast.ImportFrom)]
    names = {f"{one.module}.{name.name}" for one in statements for name in one.names}
    return names | {str(one.module) for one in statements if one.module != "flawmask"}
