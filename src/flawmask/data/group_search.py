"""Whether images that nobody has put into groups look like several photographs of each part, by their names.

Looks do not tell it. By `duplicates.look_of`, two photographs of one magnetic tile at different exposures correlate at
0.37 in the median, two different parts of the demo category at up to 0.97. Nor does it help to take off what all images
of a category have in common (their mean, or their first 4 or 8 principal components): different demo parts still
correlate at up to 0.92 then. So looks point out near-identical images alone.
"""

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flawmask.data.groups import part_named

MATCHING = 0.9
"""The share of the images, at least, whose names have to be of the form."""

WITH_OTHERS = 0.6
"""The share of these, at least, that have to have another of the same part."""

FEWEST = 4
"""Parts. Of fewer, chance makes some."""

MOST = 30
"""Images of a part, on average: what more have in common is a camera, an exposure or a day."""

LARGEST = 0.25
"""The share of all images, at most, that one part has."""

SPECIAL = re.compile(r"([.^$*+?{}\[\]\\|()])")  # re.escape would put a backslash before a hyphen, too
DATE = re.compile(r"(?<![0-9])(19|20)[0-9]{2}([-_.]?)[01][0-9]\2[0-3][0-9](?![0-9])")


@dataclass(frozen=True)
class FoundGroups:
    """Groups that names of files seem to make.

    Attributes:
        pattern: the regular expression that makes them, as `--group_by` takes it.
        parts: each image's part; None where the name does not match.
        examples: names of two images of one part.
    """

    pattern: str
    parts: tuple[str | None, ...]
    examples: tuple[str, str]

    def __str__(self) -> str:
        """The finding in words, which follow the name of what holds the images."""
        images = sum(part is not None for part in self.parts)
        return (
            f"seems to show {len({*self.parts} - {None})} parts on {images} of its {len(self.parts)} images, by their "
            f"names: {' and '.join(self.examples)} would be of one part"
        )

    @property
    def flag(self) -> str:
        """What to say to `prepare` to keep these groups together."""
        return f"--group_by {shlex.quote(self.pattern)}"


def find_groups(names: Sequence[str]) -> FoundGroups | None:
    """Return the groups that the names of files seem to make; None where they seem to make none.

    A name that begins `part0012_` or `lot3-part0012` speaks of a part if nearly all do, if most parts have several
    images, under names that go on differently, and if none has a large share. A counter alone, as in `IMG_0001`, does
    not, and neither does a date. Of several beginnings, the one that makes the fewest groups is returned: it keeps
    those of the others together.

    Args:
        names: of image files, without their folders.
    """
    found = [one for one in (_groups(names, pattern) for pattern in _patterns(names)) if one is not None]
    return min(found, key=lambda one: (not one.pattern.startswith("^"), len({*one.parts})), default=None)


def _patterns(names: Sequence[str]) -> Iterator[str]:
    """Yield regular expressions of the forms that enough names have: each beginning of a name up to a number, or the
    word before the number and the number, where more follows."""
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
        if count >= MATCHING * len(names):
            yield form


def _groups(names: Sequence[str], pattern: str) -> FoundGroups | None:
    """Return the groups that a regular expression makes of the names; None where they are no likely parts."""
    parts = [part_named(pattern, name) for name in names]
    stems: dict[str, list[str]] = defaultdict(list)
    for name, part in zip(names, parts, strict=True):
        if part is not None:
            stems[part].append(name)
    matching = sum(map(len, stems.values()))
    # Numbers that begin anew in each folder give the same name to different parts.
    several = {part: found for part, found in stems.items() if len({Path(name).stem for name in found}) > 1}
    if (
        matching < MATCHING * len(names)
        or len(stems) < FEWEST
        or matching > MOST * len(stems)
        or max(map(len, stems.values())) > LARGEST * len(names)
        or sum(map(len, several.values())) < WITH_OTHERS * matching
        or sum(DATE.search(part) is not None for part in stems) > len(stems) / 2
    ):
        return None
    one, other, *_ = sorted(set(several[max(several, key=lambda part: len(several[part]))]))
    return FoundGroups(pattern, tuple(parts), (one, other))
