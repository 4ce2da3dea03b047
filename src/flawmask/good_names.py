"""Names that people use for good images instead of `good`."""

import re
import unicodedata

GOOD = "good"
"""The name of the class that is not a defect. AP, image scores and overlays ignore it."""

NAMES = frozenset(
    """
    accept accepted anomalyfree bon bonne bueno buena buono buona clean conform conforme correct defectfree faultfree
    fehlerfrei fine flawless goed good goods gut gutteil gutteile healthy inordnung intact io nodefect nodefects
    nofault nofaults noanomaly noanomalies nonfaulty undefected faultless
    nonanomalous nondefect nondefective normal normale ok okay pass passed perfect sano undamaged
    withoutdefect withoutdefects einwandfrei fehlerlos keinfehler keinefehler ohnefehler keindefekt keinedefekte
    ohnebefund sansdefaut sansdéfaut sindefecto sindefectos senzadifetti semdefeito semdefeitos
    dobry dobre godny норма годен годные хорошо
    合格 合格品 良品 良好 正常 好 好品 无缺陷 無缺陷 没有缺陷 ok品 良 無欠陥 異常なし 無異常 无异常 양품 정상
    """.split()  # noqa: SIM905 - sixty lines else
)
"""These names in lower case, without punctuation, digits and spaces."""

_OTHERS = re.compile(r"[\W\d_]+")
_AROUND = re.compile(r"^(images?|parts?|samples?|teile?)|(images?|parts?|samples?|teile?)$")


def looks_good(name: str) -> bool:
    """Return whether the name of a type or category probably means good images: `OK`, `i.O.`, `Good_parts`, `合格`."""
    bare = _OTHERS.sub("", unicodedata.normalize("NFKC", name).casefold())
    return bare in NAMES or _AROUND.sub("", bare) in NAMES
