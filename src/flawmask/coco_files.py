"""Find the files of a COCO folder: its splits, their annotation files, and the images that records name.

Every tool lays out its exports in its own way. These layouts are read without changes:

- Roboflow: `train/`, `valid/` and `test/`, each with `_annotations.coco.json` beside its images
  (https://roboflow.com/formats/coco-json).
- CVAT: `annotations/instances_<subset>.json` and `images/<subset>/`, for a task or a whole project. The subsets are
  called Train, Validation and Test (https://docs.cvat.ai/docs/dataset_management/formats/format-coco/).
- Label Studio: `result.json` and `images/`. The names are paths on the machine that exported them: `images\\1.png`, or
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

SPLIT_WORDS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
"""The splits by the names that tools give them, in lower case. COCO itself adds the year."""

_SUBSET = re.compile(
    rf"(?:(?:instances|annotations?|labels)[_.-])?({'|'.join(SPLIT_WORDS)})(?:20[0-9]{{2}})?", re.IGNORECASE
)
"""The name of an annotation file that lies beside those of other splits, such as `instances_val2017`."""

_UPLOAD = re.compile(r"^[0-9a-f]{8}-(?=.)")
"""The prefix that Label Studio gives to the name of an uploaded file."""

PathParts = tuple[str, ...]


@dataclass(frozen=True)
class SplitFiles:
    """The paths of a split.

    Attributes:
        folder: `<dataset>/<split>`. It need not exist if the tool keeps all annotation files in one folder.
        annotation_file: the file with the split's records.
        image_folders: the folders where its images may lie, the likeliest first.
    """

    folder: Path
    annotation_file: Path
    image_folders: tuple[Path, ...]


def split_name(folder_name: str) -> str:
    """Return the name of the split that is stored in a folder of this name: `val` for `valid`, for example."""
    word = re.sub(r"(?<=[a-z])20[0-9]{2}$", "", folder_name.lower())
    return SPLIT_WORDS.get(word, folder_name)


def has_split(dataset_dir: Path, split: str) -> bool:
    """Return whether there is such a split, even if it is damaged."""
    return split_folder(dataset_dir, split).is_dir() or bool(_shared_files(dataset_dir).get(split_name(split)))


def split_folder(dataset_dir: Path, split: str) -> Path:
    """Return the folder of a split, whether it exists or not."""
    folder = dataset_dir / split
    return folder if folder.is_dir() else next(iter(_folders_of(dataset_dir, split)), folder)


def _folders_of(dataset_dir: Path, split: str) -> list[Path]:
    """Return the folders whose names mean this split, sorted."""
    paths = dataset_dir.iterdir() if dataset_dir.is_dir() else ()
    return sorted(path for path in paths if split_name(path.name) == split_name(split) and path.is_dir())


def split_names(dataset_dir: Path) -> list[str]:
    """Return the names of a COCO folder's splits, sorted.

    A split is a folder with an `annotations.json`, whatever its name; a folder with another JSON file, if its name is
    that of a split; or an annotation file whose own name contains that of a split.
    """
    found = set(_shared_files(dataset_dir))
    for path in dataset_dir.iterdir() if dataset_dir.is_dir() else ():
        if (path / "annotations.json").is_file() or (path.name.lower() in SPLIT_WORDS and annotation_files(path)):
            found.add(split_name(path.name))
    return sorted(found)


def find_split(dataset_dir: Path, split: str) -> SplitFiles:
    """Return the paths of a split.

    Raises:
        FlawmaskError: there is no such split, or it does not have exactly one annotation file.
    """
    names = [path.name for path in _folders_of(dataset_dir, split) if annotation_files(path)]
    if len(names) > 1:
        raise FlawmaskError(
            f"{dataset_dir} holds {' and '.join(names)}, which are the same split: join them, or move one away"
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
    """Return the paths of a split that has its own folder.

    Raises:
        FlawmaskError: the folder has no `annotations.json`, and not exactly one other annotation file.
    """
    path = folder / "annotations.json"
    if not path.is_file():
        others = annotation_files(folder)
        _check_single(others, folder, path)
        path = others[0]
    return SplitFiles(folder, path, (folder / "images", folder))


def annotation_files(folder: Path) -> list[Path]:
    """Return the JSON files in a split's folder and in its subfolder `annotations/`, sorted."""
    found = [*folder.glob("*.json"), *folder.glob("annotations/*.json")]
    return sorted(path for path in found if not path.name.startswith("."))


def _check_single(files: Sequence[Path], folder: Path, wanted: Path) -> None:
    if len(files) != 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in files)
        raise FlawmaskError(f"{wanted} does not exist{f', and there are several others: {names}' if files else ''}")


def _shared_files(dataset_dir: Path) -> dict[str, list[Path]]:
    """Return the annotation files that lie together in one folder, by the split in their names."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in annotation_files(dataset_dir):
        match = _SUBSET.fullmatch(path.stem)
        if match:
            found[SPLIT_WORDS[match[1].lower()]].append(path)
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
    """Return the folder of the images, and the name of each image relative to it.

    Each name is first used as it is. If there is no such file, the name was written on another machine. Then the file
    is used whose path has the longest suffix in common with the name. This comparison ignores case, escapes such as
    `%20`, a query (`?d=`), and the prefix that Label Studio gives to uploads.

    Args:
        images: the image records, with `id` and `file_name`.
        place: the paths of the split.
        skips_missing: whether a missing file gives None instead of an error.

    Raises:
        FlawmaskError: a file is missing or outside the folder, several files match equally well, or no file exists.
    """
    names = [str(image["file_name"]) for image in images]
    folder = next((path for path in place.image_folders if (path / names[0]).is_file()), place.image_folders[0])
    root, present = real_path(folder), _files_in(folder)
    # Most names have no folder. Looking them up in a set is faster than asking the disk for each.
    exists = [name in present or _is_below(name, root) for name in names]
    if all(exists):
        return folder, list(names)
    best: tuple[Path, list[PathParts | None]] = folder, []
    for root in filter(Path.is_dir, place.image_folders):
        below = FileIndex(root)
        # If some names are right, so is the folder of all names: the others may differ in spelling only.
        found = [
            below.find(name, f"{place.annotation_file}: image {image['id']}", whole_name=any(exists))
            for image, name in zip(images, names, strict=True)
        ]
        located = [parts for parts in found if parts is not None]
        if len(located) == len(names):
            return _named_from(root, found, names, place)
        if len(located) > len(best[1]) - best[1].count(None):
            best = root, found
    if skips_missing and best[1]:
        return _named_from(*best, names, place)
    missing = [image for image, is_present in zip(images, exists, strict=True) if not is_present]
    raise FlawmaskError(f"{place.annotation_file}{_missing_message(missing, folder)}")


def unlisted_images(
    images: Sequence[dict[str, Any]], left_out: Iterable[str], folder: Path, place: SplitFiles
) -> list[str]:
    """Return the files of a split that may be images but that no record names, as POSIX paths relative to the folder.

    A folder with the images of several splits is not searched, because the records of one split do not say which
    images belong to it.

    Args:
        images: the image records that are used.
        left_out: the names in the other image records.
        folder: the folder that the names in the records are relative to.
        place: the files of the split.
    """
    is_own = place.annotation_file.is_relative_to(place.folder)
    searched = [place.folder] if is_own else [top for top in place.image_folders[:-2] if folder.is_relative_to(top)]
    listed = {folder / str(image["file_name"]) for image in images}
    by_key = {_key(str(path)): path for path in listed}  # a file system may treat different spellings as one name
    left_out_names = {_key(parts[-1]) for name in left_out for parts in _interpretations(name)}
    return [
        Path(os.path.relpath(path, folder)).as_posix()
        for top in searched
        for path in walk(top)
        if path not in listed
        and not ((other := by_key.get(_key(str(path)))) and other.samefile(path))
        and _key(path.name) not in left_out_names
        and (is_readable(path) or may_be_image(path))
    ]


def _named_from(
    root: Path, found: Sequence[PathParts | None], names: Sequence[str], place: SplitFiles
) -> tuple[Path, list[str | None]]:
    """Return the deepest folder that contains all files found below `root`, and their names relative to it."""
    located = [(name, parts) for name, parts in zip(names, found, strict=True) if parts is not None]
    _check_different([name for name, _ in located], [parts for _, parts in located], place.annotation_file)
    common = _common_folder([parts for _, parts in located])
    return root.joinpath(*common), [None if parts is None else "/".join(parts[len(common) :]) for parts in found]


def _is_below(name: str, root: Path) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and (root / path).is_file()


def _missing_message(images: Sequence[dict[str, Any]], folder: Path) -> str:
    """Return the message about missing image files. It continues after the annotation file's name."""
    for image in images:
        name = Path(str(image["file_name"]))
        if name.is_absolute() or ".." in name.parts:
            return f": image {image['id']} names {name}, which is outside {real_path(folder)}: put it there"
    shown = ", ".join(Path(str(image["file_name"])).as_posix() for image in images[:3])
    more = f" and {len(images) - 3} more" if len(images) > 3 else ""
    return f" lists images that are not in {folder} ({shown}{more}): put them there, or delete their records"


def _check_different(names: Sequence[str], found: Sequence[PathParts], path: Path) -> None:
    """Raise an error if two names lead to the same file. If one name ends with the other, the image is listed twice."""
    first: dict[PathParts, str] = {}
    for name, parts in zip(names, found, strict=True):
        other = first.setdefault(parts, name)
        length = min(len(_parts(name)), len(_parts(other)))
        if _parts(name)[-length:] != _parts(other)[-length:]:
            raise FlawmaskError(
                f"{path} names {other} and {name}, but only {'/'.join(parts)} exists: put each image into the "
                "folder in its name"
            )


def _common_folder(found: Sequence[PathParts]) -> PathParts:
    """Return the deepest folder that contains all of the paths."""
    first, last = min(parts[:-1] for parts in found), max(parts[:-1] for parts in found)
    return first[: _common_length(first, last)]


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the common prefix of two sequences."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class FileIndex:
    """An index of the files below a folder, searched by the ends of their paths."""

    def __init__(self, root: Path) -> None:
        """Index the files below `root`."""
        self._by_name: Mapping[str, list[PathParts]] = defaultdict(list)
        for path in filter(Path.is_file, walk(root)):  # a link may be broken
            self._by_name[_key(path.name)].append(path.relative_to(root).parts)

    def find(self, name: str, where: str, *, whole_name: bool = False) -> PathParts | None:
        """Return the file whose path has the longest suffix in common with the name; None if no file has this name.

        The path is relative to the folder.

        Args:
            name: the name as the record has it.
            where: which name it is, for the message.
            whole_name: whether the whole name must match, apart from its spelling.

        Raises:
            FlawmaskError: several files match equally well, and none has exactly this name.
        """
        for parts in _interpretations(name):
            found = self._by_name.get(_key(parts[-1]), ())
            lengths = [_common_length([*map(_key, reversed(path))], [*map(_key, reversed(parts))]) for path in found]
            wanted = len(parts) if whole_name else max(lengths, default=0)
            longest = [path for path, length in zip(found, lengths, strict=True) if length == wanted]
            matches = [path for path in longest if path[-1] == parts[-1]] or longest
            if len(matches) > 1:
                shown = " or ".join("/".join(path) for path in matches[:2])
                raise FlawmaskError(f"{where} names {name}, which may be {shown}: put each into the folder in its name")
            if matches:
                return matches[0]
        return None


def _interpretations(name: str) -> Iterator[PathParts]:
    """Yield the paths that a name may mean, the likeliest first."""
    for text in dict.fromkeys((name, unquote(name.rpartition("?d=")[2]), unquote(name.partition("?")[0]))):
        parts = _parts(text)
        if parts:
            yield parts
            bare = _UPLOAD.sub("", parts[-1])
            if bare != parts[-1]:
                yield (*parts[:-1], bare)


def _parts(name: str) -> PathParts:
    """Return the folders and the file name of a POSIX or Windows path, without `.` and `..`."""
    return tuple(part for part in re.split(r"[/\\]", name) if part not in ("", ".", ".."))


def _key(name: str) -> str:
    """Return a key that is equal for two names which a file system may treat as the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _files_in(folder: Path) -> frozenset[str]:
    """Return the names of the files in a folder; none if the folder does not exist."""
    if not folder.is_dir():
        return frozenset()
    with os.scandir(folder) as entries:
        return frozenset(entry.name for entry in entries if entry.is_file())
