"""The two locks, one for running Flawmask and one for its tests, have the same versions."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def versions(lock: str) -> dict[str, set[str]]:
    """Return the versions of each package. There are several where they depend on Python's version."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE):
        found.setdefault(canonicalize_name(name), set()).add(version)
    return found


def test_the_lock_has_versions_that_the_project_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(one) for one in [*project["dependencies"], *project["optional-dependencies"]["lite"]]]
    locked = versions("requirements.lock")
    for one in wanted:
        assert all(one.specifier.contains(version) for version in locked[canonicalize_name(one.name)]), one


def test_both_locks_have_the_same_versions() -> None:
    everything = versions("requirements-dev.lock")
    assert all(found <= everything[name] for name, found in versions("requirements.lock").items())
