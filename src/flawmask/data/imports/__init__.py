"""What other tools write about images: a module for each format, and the list of them.

All others see labelled images alone.
"""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from flawmask.data.imports import coco, cvat, labelme, labelstudio, via, yolo
from flawmask.data.imports.labels import Labels, files_below
from flawmask.errors import FlawmaskError
from flawmask.files import read_json

__all__ = ["FORMATS", "FormatName", "read", "recognised"]

FormatName = Literal["auto", "coco", "cvat", "labelme", "via", "labelstudio", "yolo"]

TRIED = 5
"""So many JSON files are looked into to recognise a format; a tool writes all in one way."""


class Format(Protocol):
    """How a tool writes its labels. A module with these names is one."""

    NAME: str
    """What people call it."""

    def read(self, labels: Labels) -> None:
        """Add the images that the source's label files speak of, and what is wrong with these files."""


class JsonFormat(Format, Protocol):
    """One that is written as JSON."""

    def is_own(self, content: Any) -> bool:
        """Return whether a file holds this format, from what `json` made of it."""


JSON_FORMATS: Mapping[str, JsonFormat] = {"coco": coco, "labelme": labelme, "via": via, "labelstudio": labelstudio}

FORMATS: Mapping[str, Format] = {**JSON_FORMATS, "cvat": cvat, "yolo": yolo}
"""The formats by the names that `--from` knows."""


def recognised(source: Path) -> str | None:
    """Return the name of the format that a file or a folder is in; None where it is none of those known."""
    if coco.lies_in(source):
        return "coco"
    if cvat.lies_in(source):
        return "cvat"
    for path in islice(files_below(source, ".json"), TRIED):
        try:
            content = read_json(path)
        except FlawmaskError:
            continue
        for name, one in JSON_FORMATS.items():
            if one.is_own(content):
                return name
    return "yolo" if yolo.lies_in(source) else None


def read(labels: Labels, name: str) -> None:
    """Read a source's label files.

    Args:
        labels: takes what they say.
        name: the format's.

    Raises:
        FlawmaskError: there is nothing of the kind.
    """
    FORMATS[name].read(labels)
    if not labels.images and not labels.bad and not labels.unlabelled:
        raise FlawmaskError(f"{labels.source} holds no labels as {FORMATS[name].NAME} writes them: name another format")
