"""Names that people use for good images are recognised; names of defects are not."""

import unicodedata

import pytest

from flawmask.good_names import looks_good


@pytest.mark.parametrize(
    "name",
    [
        *("OK", "i.O.", "Gut", "no_defect", "without defects", "keine Fehler", "ohne_Befund", "sans défaut"),
        *("sin_defecto", "faultless", "non_faulty", "no anomaly", "合格", "異常なし", "양품", "\uff2f\uff2b"),
    ],
)
def test_a_name_of_good_images_is_recognised_in_every_unicode_form(name: str) -> None:
    assert looks_good(name)
    assert looks_good(unicodedata.normalize("NFD", name))


@pytest.mark.parametrize("name", ["NOK", "n.i.O.", "not good", "NG", "bad", "crack", "不良", "Fehler", "defect"])
def test_a_name_of_defects_is_not(name: str) -> None:
    assert not looks_good(name)
