"""The two locks: what Flawmask runs with, and what its tests need, in the same versions."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def versions(lock: str) -> dict[str, set[str]]:
    """Return the versions of each package; several where they depend on Python's."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE):
        found.setdefault(canonicalize_name(name), set()).add(version)
    return found


def test_what_flawmask_runs_with_is_locked_in_versions_that_it_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(one) for one in [*project["dependencies"], *project["optional-dependencies"]["lite"]]]
    locked = versions("requirements.lock")
    for one in wanted:
        assert all(one.specifier.contains(version) for version in locked[canonicalize_name(one.name)]), one


def test_both_locks_have_the_same_versions() -> None:
    everything = versions("requirements-dev.lock")
    assert all(found <= everything[name] for name, found in versions("requirements.lock").items())
