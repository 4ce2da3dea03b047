"""Predictions of many images as rows, in the parts of a folder: what `predict --records` writes.

A row is one image. Parts are JSON Lines or Parquet (https://parquet.apache.org), and hold the same rows.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flawmask.errors import FlawmaskError
from flawmask.files import atomic_file
from flawmask.prediction import Instance, Prediction

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]

Format = Literal["jsonl", "parquet"]


def row(file: str, prediction: Prediction | FlawmaskError, conf: float, min_area: int) -> Row:
    """Return the row of an image, as JSON values.

    Keys: `file`; `verdict`, `good`, `defect` or None where there is none; `reason`, why there is no verdict, else None;
    `width`, `height`, `score`, `defect_probability` and `defect_area_px` as in `Prediction.to_dict`; `instances`, all
    instances of the network above the score floor, also those below the threshold and those of class `good`, each with
    `class`, `score`, `box` [x, y, width, height], `area` in pixels and `counts`, the compressed COCO RLE at the image's
    size. `counts` and `defect_area_px` are None for a network without masks. Without a verdict, all keys but `file` and
    `reason` are None, and `instances` is empty.

    Args:
        file: the image's path.
        prediction: the prediction, or why there is none.
        conf: the threshold of the verdict, 0 to 1.
        min_area: defects with fewer pixels do not count for verdict and score.
    """
    if isinstance(prediction, FlawmaskError):
        empty = dict.fromkeys(("verdict", "width", "height", "score", "defect_probability", "defect_area_px"))
        return {"file": file, **empty, "reason": str(prediction), "instances": []}
    verdict = prediction.verdict(conf, min_area)
    return {
        "file": file,
        "verdict": "defect" if verdict.is_defect else "good",
        "width": prediction.width,
        "height": prediction.height,
        "score": verdict.score,
        "defect_probability": verdict.defect_probability,
        "defect_area_px": prediction.defect_area(conf, min_area) if prediction.has_masks else None,
        "reason": None,
        "instances": [_instance(one, has_mask=prediction.has_masks) for one in prediction.instances],
    }


def _instance(instance: Instance, *, has_mask: bool) -> Row:
    return {
        "class": instance.label,
        "score": instance.score,
        "box": instance.xywh,
        "area": instance.area,
        "counts": instance.rle["counts"] if has_mask else None,
    }


def check_format(form: Format) -> None:
    """Raise a FlawmaskError if rows cannot be written in this format here."""
    if form == "parquet":
        _pyarrow()


def write_part(path: Path, rows: Sequence[Row]) -> None:
    """Write rows to a part, atomically. The suffix of its name, `.jsonl` or `.parquet`, says the format."""
    with atomic_file(path) as temporary:
        if path.suffix == ".jsonl":
            encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode
            with temporary.open("wb") as file:
                file.writelines(f"{encode(one)}\n".encode(errors="backslashreplace") for one in rows)
        else:
            from pyarrow import parquet

            parquet.write_table(table(rows), temporary, compression="zstd")


def table(rows: Sequence[Row]) -> "pyarrow.Table":
    """Return rows as an Arrow table with the columns of every part.

    Bytes of a file name that are not Unicode become escapes, `\\\\udcff`, because Arrow's text is Unicode.
    """
    named = [{**one, "file": one["file"].encode(errors="backslashreplace").decode()} for one in rows]
    return _pyarrow().Table.from_pylist(named, schema=schema())


def schema() -> "pyarrow.Schema":
    """Return the columns of a Parquet part."""
    pa = _pyarrow()
    instance = {
        "class": pa.string(),
        "score": pa.float64(),
        "box": pa.list_(pa.float64()),
        "area": pa.int64(),
        "counts": pa.string(),
    }
    columns = {
        "file": pa.string(),
        "verdict": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "score": pa.float64(),
        "defect_probability": pa.float64(),
        "defect_area_px": pa.int64(),
        "reason": pa.string(),
        "instances": pa.list_(pa.struct(instance)),
    }
    return pa.schema(columns)


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise FlawmaskError("Parquet needs pyarrow: pip install 'flawmask[records]'") from None
    return pyarrow


def read_part(path: Path, columns: Iterable[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a part.

    Args:
        path: the part.
        columns: the keys to read; by default all.

    Raises:
        FlawmaskError: the part cannot be read.
    """
    wanted = None if columns is None else list(columns)
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                for line in file:
                    one = json.loads(line)
                    yield one if wanted is None else {key: one[key] for key in wanted}
        else:
            _pyarrow()
            from pyarrow import parquet

            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=wanted):
                    yield from batch.to_pylist()
    except (OSError, ValueError, KeyError, TypeError) as error:  # Arrow's errors are among these
        raise FlawmaskError(f"{path} is no part that flawmask predict --records wrote: {error}") from None


def verdicts(parts: Iterable[Path]) -> Iterator[str | None]:
    """Yield the verdict of each row of some parts: `good`, `defect` or None.

    Raises:
        FlawmaskError: a part cannot be read.
    """
    for path in parts:
        yield from (one["verdict"] for one in read_part(path, ["verdict"]))
