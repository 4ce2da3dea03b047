"""Files that are named by addresses, such as `s3://bucket/archive`: they are read by fsspec.

fsspec comes with PyTorch. Each kind of address needs its own package (https://filesystem-spec.readthedocs.io), such as
s3fs, gcsfs or, for https, aiohttp. Those find credentials and settings in their own ways.
"""

import re
from collections.abc import Iterator
from typing import Any

from flawmask.errors import FlawmaskError, ImageError

ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


def is_address(name: object) -> bool:
    """Return whether a name is an address, and not the path of a local file."""
    return isinstance(name, str) and ADDRESS.match(name) is not None


def find(address: str) -> Iterator[str]:
    """Yield the addresses of the files that an address leads to, each folder's files sorted.

    Only the names of a few folders are in memory, unless the address is a pattern.

    Args:
        address: of a file or a folder, or a pattern with `*`.

    Raises:
        FlawmaskError: the address cannot be read, or a package is missing.
    """
    system, path = _system(address)
    try:
        if "*" in path:
            yield from (system.unstrip_protocol(one) for one in sorted(system.glob(path)) if not system.isdir(one))
        elif system.isdir(path):
            for folder, folders, names in system.walk(path, detail=False, on_error="raise"):
                folders.sort()
                yield from (system.unstrip_protocol(f"{folder.rstrip('/')}/{name}") for name in sorted(names))
        else:
            yield address
    except Exception as error:  # each file system has errors of its own
        raise FlawmaskError(f"--input {address} cannot be listed: {_text(error)}") from None


def read(address: str) -> bytes:
    """Return the content of a file.

    Raises:
        ImageError: it cannot be read.
    """
    system, path = _system(address)
    try:
        return bytes(system.cat_file(path))
    except Exception as error:  # each file system has errors of its own
        raise ImageError(f"{address} cannot be opened: {_text(error)}") from None


def _system(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the file's path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise FlawmaskError(f"{address} needs fsspec: pip install fsspec") from None
    try:
        system, path = url_to_fs(address)
    except (ImportError, ValueError) as error:  # the text names the package, or the unknown protocol
        raise FlawmaskError(f"{address} cannot be read: {_text(error)}") from None
    return system, path


def _text(error: Exception) -> str:
    """Return an error's text in one line; the name of its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
