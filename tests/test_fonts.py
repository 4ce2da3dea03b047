"""Names on pictures are drawn in a font that has their letters, or left out; never as boxes."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import features

from flawmask import draw, fonts
from flawmask.fonts import first_writable, in_any_script

UNKNOWN = "\u0378"
"""A letter that no font has: Unicode does not assign this code."""


@pytest.fixture
def own_font(tmp_path: Path) -> Iterator[None]:
    """Install a font that has only UNKNOWN, drawn as a triangle."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "own"])
    builder.setupCharacterMap({ord(UNKNOWN): "own"})
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((400, 700))
    pen.lineTo((800, 0))
    pen.closePath()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "own": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (800, 0), "own": (800, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Flawmask Own", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "own.ttf")
    before = list(fontManager.ttflist)
    fontManager.addfont(tmp_path / "own.ttf")
    fonts._system_fonts.cache_clear()
    yield
    fontManager.ttflist[:] = before
    fonts._system_fonts.cache_clear()


def title(text: str, side: int = 300) -> draw.Picture:
    return draw.title_bar(np.zeros((side, side, 3), np.uint8), text)[:-side]


@pytest.mark.parametrize("pair", ["ae", "üé", "ЖЩ", "λπ", "łż", "…—"])
def test_letters_that_differ_are_drawn_differently(pair: str) -> None:
    one, other = map(title, pair)
    assert (one < 128).any()
    assert (one != other).any(), "both are boxes"
    assert first_writable(pair, "") == pair


def test_a_name_that_no_font_can_write_is_left_out() -> None:
    assert first_writable(f"{UNKNOWN}_1.png: good", "good") == "good"
    assert first_writable(UNKNOWN, f"ü{UNKNOWN}", "") == ""


@pytest.mark.usefixtures("own_font")
def test_a_name_is_drawn_in_a_font_of_the_machine_that_has_its_letters() -> None:
    assert first_writable(f"ü {UNKNOWN}.png", "") == f"ü {UNKNOWN}.png"
    only, beside = title(UNKNOWN), title(f"ü{UNKNOWN}b")
    rows, columns = np.nonzero((only < 128).any(axis=2))
    assert len(rows) > 15
    assert columns.max() - columns.min() <= 11, "a triangle as wide as a letter"
    triangle = only[:, columns.min() : columns.max() + 1]
    drawn = [beside[:, start : start + triangle.shape[1]] for start in range(60)]
    assert any((abs(window.astype(int) - triangle) < 128).all() for window in drawn), (
        "the triangle must be among the letters"
    )


def test_separate_accents_are_joined_to_their_letters() -> None:
    assert (title("Teil_u\u0308 e\u0301") == title("Teil_ü é")).all()


@pytest.mark.parametrize("name", ["a\nb.png", "a\tb", "part_\udcff.png", "a\u200bb", "\x00", ""])
def test_a_name_with_control_characters_is_drawn_as_one_line(name: str) -> None:
    assert title(first_writable(name, "")).shape == title("a").shape


def test_right_to_left_scripts_are_written_only_if_pillow_can_lay_them_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "\u0641\u062d\u0635.png"
    assert first_writable(name, "") == (name if features.check("raqm") else "")
    monkeypatch.setattr("flawmask.fonts.features.check", lambda _: False)
    assert first_writable(name, "ü") == "ü"


def bars(name: str, kind: str) -> bytes:
    figure = Figure(figsize=(2, 2))
    axes = figure.subplots()
    axes.barh([0, 1], [1, 2])
    axes.set_yticks([0, 1], ["crack", name])
    data = io.BytesIO()
    with in_any_script(figure, "png" if kind == "png" else "svg"):
        figure.savefig(data, format=kind, metadata={"Date": None} if kind == "svg" else None)
    assert [label.get_visible() for label in axes.get_yticklabels()] == [True, True]
    return data.getvalue()


def test_names_that_no_font_can_write_are_left_out_of_a_png_figure() -> None:
    assert bars(UNKNOWN, "png") == bars("", "png")
    assert bars("ü", "png") != bars("", "png")


@pytest.mark.usefixtures("own_font")
def test_a_figure_is_drawn_with_a_font_of_the_machine_that_has_its_letters(recwarn: pytest.WarningsRecorder) -> None:
    assert bars(UNKNOWN, "png") != bars("", "png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_an_svg_keeps_every_name_for_the_fonts_of_the_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    assert UNKNOWN in bars(UNKNOWN, "svg").decode()
