"""Which fonts have the letters of a name: names of files, defect types and classes are in any script.

Pillow's own font has ASCII. DejaVu Sans, which comes with Matplotlib, has the alphabets of Europe and more. Other
letters are taken from a font of the machine, of those that Matplotlib lists. A name that no font can write is left out:
boxes in its place would say nothing.
"""

import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import ImageFont, features

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PILLOWS = frozenset(map(chr, range(0x20, 0x7F)))
"""The letters that are drawn with Pillow's own font."""

SHAPED = (range(0x590, 0xE00), range(0xF00, 0x10A0), range(0x1780, 0x1800), range(0xFB1D, 0xFF00))
"""Hebrew to Arabic, the scripts of India, Tibetan and Burmese, Khmer, and Arabic's presentation forms. Their letters
run from right to left, join or stack. For that Pillow wants Raqm, a library that it does not have on every machine."""


@dataclass(frozen=True)
class _Face:
    """A font.

    Attributes:
        path: its file.
        family: its name.
    """

    path: str
    family: str


def first_writable(*texts: str) -> str:
    """Return the first of the texts that the fonts of this machine can write; the last where they can write none."""
    return next((text for text in texts if _is_writable(text)), texts[-1])


def _is_writable(text: str) -> bool:
    letters = set(plain(text))
    if letters <= PILLOWS:
        return True
    can_shape = features.check("raqm")
    return all(
        _face(letter) is not None and (can_shape or not any(ord(letter) in script for script in SHAPED))
        for letter in letters
    )


def plain(text: str) -> str:
    """Return the text as one line of letters.

    Accents, which Apple's file systems keep apart, are joined to their letters. Whatever breaks a line is a space. What
    is no Unicode is U+FFFD.
    """
    shown = {"Cc": " ", "Zl": " ", "Zp": " ", "Zs": " ", "Cf": "", "Cs": "\ufffd"}
    return "".join(shown.get(unicodedata.category(one), one) for one in unicodedata.normalize("NFC", text))


def runs(text: str, size: int) -> Iterator[tuple[str, Font]]:
    """Yield the text in parts, each with the font that has its letters, for Pillow.

    Args:
        text: as `plain` gives it. Letters that no font has are drawn as boxes.
        size: in pixels.
    """
    for face, letters in groupby(text, key=lambda letter: None if letter in PILLOWS else _face(letter)):
        yield "".join(letters), pillow_font(size, None if face is None else face.path)


@lru_cache(maxsize=64)
def pillow_font(size: int, path: str | None = None) -> Font:
    """Return a font at a size in pixels: Pillow's own unless a file is named."""
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def _face(letter: str) -> _Face | None:
    """Return the font to take for a letter; None where no font has it."""
    return _dejavu().get(ord(letter)) or _of_machine().get(ord(letter))


@cache
def _dejavu() -> Mapping[int, _Face]:
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    path = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    return dict.fromkeys(FT2Font(path).get_charmap(), _Face(path, "DejaVu Sans"))


@cache
def _of_machine() -> Mapping[int, _Face]:
    """Return the font to take for each letter that a font of the machine has: an upright one without serifs, if there
    is one."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    def rank(entry: Any) -> tuple[bool, bool, bool, str, str]:
        is_regular = entry.style == "normal" and entry.weight in (400, "normal", "regular")
        return not is_regular, "Serif" in entry.name, "Sans" not in entry.name, entry.name, entry.fname

    faces: dict[int, _Face] = {}
    for entry in sorted(fontManager.ttflist, key=rank):
        # "Last Resort" has a box for every letter there is. Pillow takes the first font of a collection.
        is_first = not getattr(entry, "index", None)  # Matplotlib before 3.11 knows no others
        if "lastresort" in entry.name.replace(" ", "").lower() or not is_first:
            continue
        try:
            letters = FT2Font(entry.fname).get_charmap()
        except (OSError, RuntimeError):  # gone since it was listed, or of a kind that FreeType does not know
            continue
        face = _Face(entry.fname, entry.name)
        for letter in letters:
            faces.setdefault(letter, face)
    return faces


@contextmanager
def in_any_script(figure: "Figure", kind: Literal["png", "svg"]) -> Iterator[None]:
    """Within, a figure is saved with fonts that have its letters. In an SVG, what is left shows in the reader's own;
    from a PNG, names that no font can write are left out.

    Args:
        figure: a figure of Matplotlib's, with all that is written on it.
        kind: what it is saved as.
    """
    from matplotlib.text import Text

    hidden = []
    for text in (artist for artist in figure.findobj() if isinstance(artist, Text) and artist.get_visible()):
        letters = {letter for letter in plain(text.get_text()) if ord(letter) not in _dejavu()}
        families = {face.family for face in map(_face, letters) if face is not None}
        if families:
            text.set_fontfamily([*text.get_fontfamily(), *sorted(families)])
        if kind == "png" and not _is_writable(text.get_text()):
            text.set_visible(False)
            hidden.append(text)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            yield
    finally:
        for text in hidden:
            text.set_visible(True)
