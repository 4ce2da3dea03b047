"""Find the images that show the same part: by their file names, by the layout of the folders, and by equal pixels."""

import re
from collections import defaultdict
from collections.abc import Sequence

from flawmask.data.layouts import Sample

SAME_PART = " = "
"""Joins the names of a part if the same picture was found under several names."""


def part_named(pattern: str, file_name: str) -> str | None:
    """Return the part that a file name contains, or None.

    The part is what the groups of the regular expression match, joined by `_`; without groups, it is the whole match.
    """
    match = re.search(pattern, file_name)
    if match is None:
        return None
    return "_".join(filter(None, match.groups())) or match.group() or None


def parts_of(sample: Sample, pattern: str | None) -> list[str]:
    """Return the names of the sample's part: from the layout and from the file name, as far as they are known."""
    in_name = part_named(pattern, sample.image.name) if pattern else None
    return [part for part in (sample.group, in_name) if part]


def keys(content: str, parts: Sequence[str]) -> list[str]:
    """Return the grouping keys of an image. Two images with a key in common belong together.

    Args:
        content: the digest of the image's pixels (`images.content_digest`).
        parts: the names of its part.
    """
    return [f"pixels {content}", *(f"part {part}" for part in parts)]


def merge(keys: Sequence[Sequence[str]]) -> list[str]:
    """Return a key for each image that is equal for all images of a group.

    Images belong together if they have a key in common, or if a chain of other images connects them.

    Args:
        keys: the grouping keys of each image, at least one.
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
    """Return the name of each image's group: the name of its part or, without one, of its first file.

    Args:
        groups: the key of each image's group, as `merge` returns it.
        parts: the names of each image's part.
        files: the file of each image.
    """
    part_names: dict[str, set[str]] = defaultdict(set)
    first: dict[str, str] = {}
    for group, of_image, file in zip(groups, parts, files, strict=True):
        part_names[group].update(of_image)
        first.setdefault(group, file)
    return [SAME_PART.join(sorted(part_names[group])) or first[group] for group in groups]
