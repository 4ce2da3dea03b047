"""Read the label files of other tools. Each format has a module; this module lists them.

The rest of the code sees only `labels.LabelledImage`.
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
"""How many JSON files are read to recognise a format. A tool writes all of its files in the same format."""


class Format(Protocol):
    """A label format. Each module with these names is one."""

    NAME: str
    """The format's name in messages."""

    def read(self, labels: Labels) -> None:
        """Add the images in the source's label files, and the problems of these files."""


class JsonFormat(Format, Protocol):
    """A label format that is JSON."""

    def is_own(self, content: Any) -> bool:
        """Return whether a file's JSON content has this format."""


JSON_FORMATS: Mapping[str, JsonFormat] = {"coco": coco, "labelme": labelme, "via": via, "labelstudio": labelstudio}

FORMATS: Mapping[str, Format] = {**JSON_FORMATS, "cvat": cvat, "yolo": yolo}
"""The formats by the values of `--from`."""


def recognised(source: Path) -> str | None:
    """Return the name of the format of a file or folder, or None if it is not a known one."""
    if coco.detects(source):
        return "coco"
    if cvat.detects(source):
        return "cvat"
    for path in islice(files_below(source, ".json"), TRIED):
        try:
            content = read_json(path)
        except FlawmaskError:
            continue
        for name, json_format in JSON_FORMATS.items():
            if json_format.is_own(content):
                return name
    return "yolo" if yolo.detects(source) else None


def read(labels: Labels, name: str) -> None:
    """Read a source's label files into `labels`.

    Args:
        labels: the source; its content is filled in.
        name: the name of the format.

    Raises:
        FlawmaskError: there are no labels in this format.
    """
    FORMATS[name].read(labels)
    if not labels.images and not labels.bad and not labels.unlabelled:
        raise FlawmaskError(f"{labels.source} holds no labels as {FORMATS[name].NAME} writes them: name another format")
