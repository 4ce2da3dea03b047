"""Where the files of a COCO folder lie: its splits, their annotation files, and the images that records name.

Other tools lay out their exports in their own ways, and these are taken as they come:

- Roboflow: `train/`, `valid/` and `test/`, each with `_annotations.coco.json` beside its images
  (https://roboflow.com/formats/coco-json).
- CVAT: `annotations/instances_<subset>.json` and `images/<subset>/`, for a task or a whole project, whose subsets are
  called Train, Validation and Test (https://docs.cvat.ai/docs/dataset_management/formats/format-coco/).
- Label Studio: `result.json` and `images/`, with names as the machine wrote them that exported: `images\\1.png`, or
  `..\\..\\label-studio\\media\\upload\\4\\1.png` (https://labelstud.io/guide/export#COCO).
- COCO itself: `annotations/instances_train2017.json` and `train2017/` (https://cocodataset.org/#download).
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from flawmask.errors import FlawmaskError
from flawmask.files import real_path, walk
from flawmask.images import is_readable, may_be_image

WORDS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
"""What tools call the splits, in small letters; COCO itself adds the year."""

_SUBSET = re.compile(rf"(?:(?:instances|annotations?|labels)[_.-])?({'|'.join(WORDS)})(?:20[0-9]{{2}})?", re.IGNORECASE)
"""The name of an annotation file that lies beside those of other splits, `instances_val2017` for one."""

_UPLOAD = re.compile(r"^[0-9a-f]{8}-(?=.)")
"""What Label Studio puts before the name of an uploaded file."""

Parts = tuple[str, ...]


@dataclass(frozen=True)
class SplitFiles:
    """Where a split lies.

    Attributes:
        folder: `<dataset>/<split>`; where a tool keeps all annotation files together, nothing need be there.
        annotation_file: the file with its records.
        image_folders: where its images may lie, the likeliest first.
    """

    folder: Path
    annotation_file: Path
    image_folders: tuple[Path, ...]


def split_name(folder_name: str) -> str:
    """Return what a split is called whose folder has this name: `val` for `valid`, say."""
    word = re.sub(r"(?<=[a-z])20[0-9]{2}$", "", folder_name.lower())
    return WORDS.get(word, folder_name)


def has_split(dataset_dir: Path, split: str) -> bool:
    """Return whether there is such a split, be it a damaged one."""
    return split_folder(dataset_dir, split).is_dir() or bool(_shared_files(dataset_dir).get(split_name(split)))


def split_folder(dataset_dir: Path, split: str) -> Path:
    """Return where a split lies, or would lie."""
    folder = dataset_dir / split
    return folder if folder.is_dir() else next(iter(_folders_of(dataset_dir, split)), folder)


def _folders_of(dataset_dir: Path, split: str) -> list[Path]:
    """Return the folders whose names say this split, sorted."""
    paths = dataset_dir.iterdir() if dataset_dir.is_dir() else ()
    return sorted(path for path in paths if split_name(path.name) == split_name(split) and path.is_dir())


def split_names(dataset_dir: Path) -> list[str]:
    """Return the names of a COCO folder's splits, sorted: of folders with an `annotations.json`, whatever they are
    called, or with another tool's file, where they are called as splits are; and of files that name a split."""
    found = set(_shared_files(dataset_dir))
    for path in dataset_dir.iterdir() if dataset_dir.is_dir() else ():
        if (path / "annotations.json").is_file() or (path.name.lower() in WORDS and annotation_files(path)):
            found.add(split_name(path.name))
    return sorted(found)


def find_split(dataset_dir: Path, split: str) -> SplitFiles:
    """Return where a split lies.

    Raises:
        FlawmaskError: there is no such split, or not exactly one annotation file for it.
    """
    several = [path.name for path in _folders_of(dataset_dir, split) if annotation_files(path)]
    if len(several) > 1:
        raise FlawmaskError(
            f"{dataset_dir} holds {' and '.join(several)}, which are one split: join them, or take one out"
        )
    folder = split_folder(dataset_dir, split)
    shared = _shared_files(dataset_dir).get(split_name(split), [])
    if shared and not annotation_files(folder):
        _check_single(shared, dataset_dir, folder / "annotations.json")
        return SplitFiles(folder, shared[0], tuple(_shared_image_folders(dataset_dir, split)))
    if not folder.is_dir():
        found = sorted(path.name for path in dataset_dir.iterdir()) if dataset_dir.is_dir() else []
        there = f"it holds {', '.join(found)}" if found else "there is no such folder, or it is empty"
        raise FlawmaskError(f"{dataset_dir} has no split {split}: {there}")
    return files_in(folder)


def files_in(folder: Path) -> SplitFiles:
    """Return where the files of a split lie that has a folder of its own.

    Raises:
        FlawmaskError: it has not exactly one annotation file, and none called `annotations.json`.
    """
    path = folder / "annotations.json"
    if not path.is_file():
        others = annotation_files(folder)
        _check_single(others, folder, path)
        path = others[0]
    return SplitFiles(folder, path, (folder / "images", folder))


def annotation_files(folder: Path) -> list[Path]:
    """Return the JSON files of a split's folder, sorted: those in it, and those in `annotations/` under it."""
    found = [*folder.glob("*.json"), *folder.glob("annotations/*.json")]
    return sorted(path for path in found if not path.name.startswith("."))


def _check_single(files: Sequence[Path], folder: Path, wanted: Path) -> None:
    if len(files) != 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in files)
        raise FlawmaskError(f"{wanted} does not exist{f', and {names} are several' if files else ''}")


def _shared_files(dataset_dir: Path) -> dict[str, list[Path]]:
    """Return the annotation files that lie beside those of other splits, by the split that their names say."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in annotation_files(dataset_dir):
        match = _SUBSET.fullmatch(path.stem)
        if match:
            found[WORDS[match[1].lower()]].append(path)
    return dict(found)


def _shared_image_folders(dataset_dir: Path, split: str) -> Iterator[Path]:
    for folder in (dataset_dir / "images", dataset_dir):
        own = split_folder(folder, split)
        if own.is_dir():
            yield own
    yield from (dataset_dir / "images", dataset_dir)


def locate(
    images: Sequence[dict[str, Any]], place: SplitFiles, *, skips_missing: bool = False
) -> tuple[Path, list[str | None]]:
    """Return the folder that the images' names lead from, and the name of each from there.

    A name is first taken as it is. Names that lead nowhere like this were written on another machine: of those, the
    file is taken whose path has the longest common tail with the name. Capitals do not matter then, nor do escapes as
    in `%20`, a query (`?d=`), or what Label Studio puts before the names of uploads.

    Args:
        images: the records, of which `id` and `file_name` are looked at.
        place: where the split lies.
        skips_missing: whether a name that leads nowhere is None in what is returned. If not, it is an error.

    Raises:
        FlawmaskError: a file is not there, lies outside the folder, or several fit equally well; or no file is there.
    """
    names = [str(image["file_name"]) for image in images]
    folder = next((one for one in place.image_folders if (one / names[0]).is_file()), place.image_folders[0])
    root, there = real_path(folder), _files_in(folder)
    # Most are plain names, and asking the disk for each takes its time.
    is_here = [name in there or _is_below(name, root) for name in names]
    if all(is_here):
        return folder, list(names)
    most: tuple[Path, list[Parts | None]] = folder, []
    for root in filter(Path.is_dir, place.image_folders):
        below = FilesBelow(root)
        # Where some names lead from here, so do all: of the others, no more than the spelling may differ.
        found = [
            below.best(name, f"{place.annotation_file}: image {image['id']}", spelling_alone=any(is_here))
            for image, name in zip(images, names, strict=True)
        ]
        located = [parts for parts in found if parts is not None]
        if len(located) == len(names):
            return _named_from(root, found, names, place)
        if len(located) > len(most[1]) - most[1].count(None):
            most = root, found
    if skips_missing and most[1]:
        return _named_from(*most, names, place)
    missing = [image for image, is_there in zip(images, is_here, strict=True) if not is_there]
    raise FlawmaskError(f"{place.annotation_file}{_what_is_missing(missing, folder)}")


def unlisted(images: Sequence[dict[str, Any]], left_out: Iterable[str], folder: Path, place: SplitFiles) -> list[str]:
    """Return the files of a split that may be images and of which its records do not speak, as POSIX paths from the
    folder.

    Where a folder holds the images of several splits, nobody can tell from the records of one: it is not looked into.

    Args:
        images: the records that are used.
        left_out: the names of the others.
        folder: where the records' names lead from.
        place: where the split lies.
    """
    is_own = place.annotation_file.is_relative_to(place.folder)
    tops = [place.folder] if is_own else [one for one in place.image_folders[:-2] if folder.is_relative_to(one)]
    listed = {folder / str(image["file_name"]) for image in images}
    alike = {_key(str(path)): path for path in listed}  # names that a file system may take for the same
    said = {_key(parts[-1]) for name in left_out for parts in _readings(name)}
    return [
        Path(os.path.relpath(path, folder)).as_posix()
        for top in tops
        for path in walk(top)
        if path not in listed
        and not ((other := alike.get(_key(str(path)))) and other.samefile(path))
        and _key(path.name) not in said
        and (is_readable(path) or may_be_image(path))
    ]


def _named_from(
    root: Path, found: Sequence[Parts | None], names: Sequence[str], place: SplitFiles
) -> tuple[Path, list[str | None]]:
    """Return the folder that all files lie in which were found below `root`, and their names from there."""
    located = [(name, parts) for name, parts in zip(names, found, strict=True) if parts is not None]
    _check_different([name for name, _ in located], [parts for _, parts in located], place.annotation_file)
    common = _common_folder([parts for _, parts in located])
    return root.joinpath(*common), [None if parts is None else "/".join(parts[len(common) :]) for parts in found]


def _is_below(name: str, root: Path) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and (root / path).is_file()


def _what_is_missing(images: Sequence[dict[str, Any]], folder: Path) -> str:
    """Return what to say of images whose files are not there, after the annotation file's name."""
    for image in images:
        name = Path(str(image["file_name"]))
        if name.is_absolute() or ".." in name.parts:
            return f": image {image['id']} names {name}, which is outside {real_path(folder)}: put it there"
    shown = ", ".join(Path(str(image["file_name"])).as_posix() for image in images[:3])
    more = f" and {len(images) - 3} more" if len(images) > 3 else ""
    return f" lists images that are not in {folder} ({shown}{more}): put them there, or take them out"


def _check_different(names: Sequence[str], found: Sequence[Parts], path: Path) -> None:
    """Refuse two names that lead to one file, unless one of them is the other's end: then it is listed twice."""
    first: dict[Parts, str] = {}
    for name, parts in zip(names, found, strict=True):
        other = first.setdefault(parts, name)
        length = min(len(_parts(name)), len(_parts(other)))
        if _parts(name)[-length:] != _parts(other)[-length:]:
            raise FlawmaskError(
                f"{path} names {other} and {name}, and only {'/'.join(parts)} is there: put each image in a folder as "
                "its name says"
            )


def _common_folder(found: Sequence[Parts]) -> Parts:
    """Return the folder that all of them lie in, the deepest one."""
    first, last = min(parts[:-1] for parts in found), max(parts[:-1] for parts in found)
    return first[: _common(first, last)]


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many elements two sequences have in common at their beginnings."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class FilesBelow:
    """The files below a folder, found by the ends of their paths."""

    def __init__(self, root: Path) -> None:
        """Take the folder, and see what is in it."""
        self._by_name: Mapping[str, list[Parts]] = defaultdict(list)
        for path in filter(Path.is_file, walk(root)):  # a link may lead nowhere
            self._by_name[_key(path.name)].append(path.relative_to(root).parts)

    def best(self, name: str, where: str, *, spelling_alone: bool = False) -> Parts | None:
        """Return the path, from the folder, of the file that has the longest tail in common with the name; None where
        no file is called so.

        Args:
            name: as the record has it.
            where: which name it is, for the message.
            spelling_alone: whether the tail has to be all of the name.

        Raises:
            FlawmaskError: several have, and none is spelt just so.
        """
        for parts in _readings(name):
            found = self._by_name.get(_key(parts[-1]), ())
            lengths = [_common([*map(_key, reversed(one))], [*map(_key, reversed(parts))]) for one in found]
            wanted = len(parts) if spelling_alone else max(lengths, default=0)
            nearest = [one for one, length in zip(found, lengths, strict=True) if length == wanted]
            spelt = [one for one in nearest if one[-1] == parts[-1]] or nearest
            if len(spelt) > 1:
                fitting = " or ".join("/".join(one) for one in spelt[:2])
                raise FlawmaskError(f"{where} names {name}, which may be {fitting}: put them in folders as names say")
            if spelt:
                return spelt[0]
        return None


def _readings(name: str) -> Iterator[Parts]:
    """Yield what a name may mean, the likeliest first."""
    for text in dict.fromkeys((name, unquote(name.rpartition("?d=")[2]), unquote(name.partition("?")[0]))):
        parts = _parts(text)
        if parts:
            yield parts
            bare = _UPLOAD.sub("", parts[-1])
            if bare != parts[-1]:
                yield (*parts[:-1], bare)


def _parts(name: str) -> Parts:
    """Return the folders and the file of a path that may be Windows', without drive and steps upwards."""
    return tuple(part for part in re.split(r"[/\\]", name) if part not in ("", ".", ".."))


def _key(name: str) -> str:
    """Return what two names have in common that a file system may take for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _files_in(folder: Path) -> frozenset[str]:
    """Return the names of the files in the folder, in one look; none where there is no folder."""
    if not folder.is_dir():
        return frozenset()
    with os.scandir(folder) as entries:
        return frozenset(entry.name for entry in entries if entry.is_file())
