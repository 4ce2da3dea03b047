"""Guess from file names whether a data set without groups has several photographs of each part.

The pixels do not tell it. With `duplicates.descriptor_of`, two photographs of one magnetic tile at different exposures
correlate at 0.37 in the median, and two different parts of the demo category at up to 0.97. Subtracting what all images
of a category have in common (their mean, or their first 4 or 8 principal components) does not help: different demo
parts still correlate at up to 0.92. So the descriptors are used only to find near-identical images.
"""

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flawmask.data.groups import part_named

MIN_MATCHING = 0.9
"""The smallest share of images whose names must match the pattern."""

MIN_SHARED = 0.6
"""The smallest share of the matching images that must share their part with another image."""

MIN_PARTS = 4
"""The smallest number of parts. Fewer may match by chance."""

MAX_MEAN_IMAGES = 30
"""The largest mean number of images of a part. A larger group shares a camera, an exposure or a day instead."""

MAX_PART_SHARE = 0.25
"""The largest share of all images that one part may have."""

SPECIAL = re.compile(r"([.^$*+?{}\[\]\\|()])")  # `re.escape` would escape hyphens too
DATE = re.compile(r"(?<![0-9])(19|20)[0-9]{2}([-_.]?)[01][0-9]\2[0-3][0-9](?![0-9])")


@dataclass(frozen=True)
class FoundGroups:
    """Groups that the file names seem to form.

    Attributes:
        pattern: the regular expression that finds the groups, for `--group_by`.
        parts: the part of each image; None if its name does not match.
        examples: the names of two images of the same part.
    """

    pattern: str
    parts: tuple[str | None, ...]
    examples: tuple[str, str]

    def __str__(self) -> str:
        """Return the result in words. They continue after the name of the category or folder."""
        images = sum(part is not None for part in self.parts)
        return (
            f"has file names that suggest {len({*self.parts} - {None})} parts on {images} of its {len(self.parts)} "
            f"images: {' and '.join(self.examples)} would show the same part"
        )

    @property
    def flag(self) -> str:
        """The flag of `prepare` that keeps these groups together."""
        return f"--group_by {shlex.quote(self.pattern)}"


def find_groups(names: Sequence[str]) -> FoundGroups | None:
    """Return the groups that the file names seem to form, or None.

    Names that begin with `part0012_` or `lot3-part0012` name a part under these conditions: nearly all names have this
    form, most parts have several images whose names continue differently, and no part has a large share of the images.
    A plain counter, as in `IMG_0001`, does not name a part, and neither does a date. If several patterns match, the one
    with the fewest groups is returned, because it also keeps the groups of the others together.

    Args:
        names: the names of the image files, without folders.
    """
    candidates = [found for found in (_groups(names, pattern) for pattern in _patterns(names)) if found is not None]
    return min(candidates, key=lambda found: (not found.pattern.startswith("^"), len({*found.parts})), default=None)


def _patterns(names: Sequence[str]) -> Iterator[str]:
    """Yield the regular expressions that enough names match.

    Each one matches the beginning of a name up to a number, or only the word before the number and the number. The name
    must continue after the number.
    """
    forms: Counter[str] = Counter()
    for name in names:
        pieces = re.findall(r"[0-9]+|[^0-9]+", Path(name).stem)
        form = ""
        of_name: set[str] = set()
        for before, piece in zip(["", *pieces], pieces[:-1], strict=False):
            is_number = piece[0] in "0123456789"
            form += "[0-9]+" if is_number else SPECIAL.sub(r"\\\1", piece)
            if is_number:
                word = re.search(r"[^\W_]*$", before)
                of_name |= {f"^({form})"} | ({f"({word.group()}[0-9]+)"} if word and word.group() else set())
        forms.update(of_name)
    for form, count in forms.most_common():
        if count >= MIN_MATCHING * len(names):
            yield form


def _groups(names: Sequence[str], pattern: str) -> FoundGroups | None:
    """Return the groups that a regular expression finds in the names; None if they are not likely to be parts."""
    parts = [part_named(pattern, name) for name in names]
    by_part: dict[str, list[str]] = defaultdict(list)
    for name, part in zip(names, parts, strict=True):
        if part is not None:
            by_part[part].append(name)
    matching = sum(map(len, by_part.values()))
    # If numbers start again in each folder, different parts have files of the same name.
    shared = {part: of_part for part, of_part in by_part.items() if len({Path(name).stem for name in of_part}) > 1}
    if (
        matching < MIN_MATCHING * len(names)
        or len(by_part) < MIN_PARTS
        or matching > MAX_MEAN_IMAGES * len(by_part)
        or max(map(len, by_part.values())) > MAX_PART_SHARE * len(names)
        or sum(map(len, shared.values())) < MIN_SHARED * matching
        or sum(DATE.search(part) is not None for part in by_part) > len(by_part) / 2
    ):
        return None
    first, second, *_ = sorted(set(shared[max(shared, key=lambda part: len(shared[part]))]))
    return FoundGroups(pattern, tuple(parts), (first, second))
