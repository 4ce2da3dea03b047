"""Which images show the same part: those whose names say so, those that the layout puts together, and copies."""

import re
from collections import defaultdict
from collections.abc import Sequence

from flawmask.data.layouts import Sample

SAME = " = "
"""Between the names of one part, where the same picture was found under several."""


def part_named(pattern: str, file_name: str) -> str | None:
    """Return the part that a file's name speaks of: what the groups of the regular expression match, joined by `_`, or
    all that it matches; None where that is nothing."""
    match = re.search(pattern, file_name)
    if match is None:
        return None
    return "_".join(filter(None, match.groups())) or match.group() or None


def parts_of(sample: Sample, pattern: str | None) -> list[str]:
    """Return what the sample's part is called: by the layout, and by the file's name; nothing where neither says it."""
    named = part_named(pattern, sample.image.name) if pattern else None
    return [part for part in (sample.group, named) if part]


def keys(content: str, parts: Sequence[str]) -> list[str]:
    """Return what tells an image's part: two images with one of these in common belong together.

    Args:
        content: the digest of its pixels (`images.content_digest`).
        parts: what its part is called.
    """
    return [f"pixels {content}", *(f"part {part}" for part in parts)]


def together(keys: Sequence[Sequence[str]]) -> list[str]:
    """Return a key for each image, the same for all that belong together, be it by way of others.

    Args:
        keys: each image's, at least one.
    """
    parent = {key: key for of_image in keys for key in of_image}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    for first, *others in keys:
        for other in others:
            parent[root(first)] = root(other)
    return [root(of_image[0]) for of_image in keys]


def names(groups: Sequence[str], parts: Sequence[Sequence[str]], files: Sequence[str]) -> list[str]:
    """Return the name of each image's group: of its part, or of its first file where no part is named.

    Args:
        groups: each image's, as `together` gives them.
        parts: what each image's part is called.
        files: each image's file.
    """
    called: dict[str, set[str]] = defaultdict(set)
    first: dict[str, str] = {}
    for group, of_image, file in zip(groups, parts, files, strict=True):
        called[group].update(of_image)
        first.setdefault(group, file)
    return [SAME.join(sorted(called[group])) or first[group] for group in groups]
