"""Find fonts for names in any script: names of files, defect types and classes.

Pillow's own font has ASCII. DejaVu Sans, which comes with Matplotlib, has the alphabets of Europe and more. For other
letters, a font of the machine is used, if Matplotlib lists one. If no font has the letters, the name is left out:
empty boxes in its place would tell nothing.
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

PILLOW_LETTERS = frozenset(map(chr, range(0x20, 0x7F)))
"""The characters that are drawn with Pillow's own font."""

SHAPED_SCRIPTS = (range(0x590, 0xE00), range(0xF00, 0x10A0), range(0x1780, 0x1800), range(0xFB1D, 0xFF00))
"""Scripts whose letters run from right to left, join or stack: Hebrew and Arabic, the scripts of India, Tibetan and
Burmese, Khmer, and Arabic's presentation forms. For these Pillow needs Raqm, a library that not every machine has."""


@dataclass(frozen=True)
class _Face:
    """A font.

    Attributes:
        path: the font's file.
        family: the font's name.
    """

    path: str
    family: str


def first_writable(*texts: str) -> str:
    """Return the first text that the fonts of this machine can write, or the last text if they can write none."""
    return next((text for text in texts if _is_writable(text)), texts[-1])


def _is_writable(text: str) -> bool:
    letters = set(plain(text))
    if letters <= PILLOW_LETTERS:
        return True
    can_shape = features.check("raqm")
    return all(
        _face(letter) is not None and (can_shape or not any(ord(letter) in script for script in SHAPED_SCRIPTS))
        for letter in letters
    )


def plain(text: str) -> str:
    """Return the text as one line of printable characters.

    Accents are joined to their letters (Apple's file systems store them separately). Line breaks become spaces.
    Characters that are not valid Unicode become U+FFFD.
    """
    shown = {"Cc": " ", "Zl": " ", "Zp": " ", "Zs": " ", "Cf": "", "Cs": "\ufffd"}
    return "".join(shown.get(unicodedata.category(letter), letter) for letter in unicodedata.normalize("NFC", text))


def runs(text: str, size: int) -> Iterator[tuple[str, Font]]:
    """Yield the parts of a text, each with a Pillow font that has its letters.

    Args:
        text: the text that `plain` returned. Letters that no font has are drawn as boxes.
        size: the font size in pixels.
    """
    for face, letters in groupby(text, key=lambda letter: None if letter in PILLOW_LETTERS else _face(letter)):
        yield "".join(letters), pillow_font(size, None if face is None else face.path)


@lru_cache(maxsize=64)
def pillow_font(size: int, path: str | None = None) -> Font:
    """Return a font with this size in pixels: Pillow's own font, or the font in the file `path`."""
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def _face(letter: str) -> _Face | None:
    """Return a font that has the letter, or None."""
    return _dejavu().get(ord(letter)) or _system_fonts().get(ord(letter))


@cache
def _dejavu() -> Mapping[int, _Face]:
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    path = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    return dict.fromkeys(FT2Font(path).get_charmap(), _Face(path, "DejaVu Sans"))


@cache
def _system_fonts() -> Mapping[int, _Face]:
    """Return a font of this machine for each letter; upright fonts without serifs are preferred."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    def rank(entry: Any) -> tuple[bool, bool, bool, str, str]:
        is_regular = entry.style == "normal" and entry.weight in (400, "normal", "regular")
        return not is_regular, "Serif" in entry.name, "Sans" not in entry.name, entry.name, entry.fname

    faces: dict[int, _Face] = {}
    for entry in sorted(fontManager.ttflist, key=rank):
        # The font "Last Resort" has a box for every letter. Of a font collection, Pillow uses the first font.
        is_main_process = not getattr(entry, "index", None)  # Matplotlib before 3.11 lists only the first font
        if "lastresort" in entry.name.replace(" ", "").lower() or not is_main_process:
            continue
        try:
            letters = FT2Font(entry.fname).get_charmap()
        except (OSError, RuntimeError):  # the file is gone, or FreeType does not know its format
            continue
        face = _Face(entry.fname, entry.name)
        for letter in letters:
            faces.setdefault(letter, face)
    return faces


@contextmanager
def in_any_script(figure: "Figure", kind: Literal["png", "svg"]) -> Iterator[None]:
    """Inside this context, a figure is saved with fonts that have its letters.

    Names that no font can write are left out of a PNG. In an SVG they stay, since the viewer may have a font for them.

    Args:
        figure: a Matplotlib figure with all of its text.
        kind: the file format.
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
