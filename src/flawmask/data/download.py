"""Download MVTec AD on request: fetch the archive, check its SHA-256, and unpack one category."""

import hashlib
import logging
import re
import shutil
import tarfile
import time
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

from flawmask.errors import FlawmaskError
from flawmask.files import LITTER, atomic_folder, folder_lock
from flawmask.progress import bar
from flawmask.settings import Settings, require

log = logging.getLogger(__name__)

URL = (
    "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/download/420938113-1629960298/"
    "mvtec_anomaly_detection.tar.xz"
)
SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"

LICENCE = """MVTec AD (Bergmann, Fauser, Sattlegger, Steger, "MVTec AD - A Comprehensive Real-World Dataset for
Unsupervised Anomaly Detection", CVPR 2019) is licensed under CC BY-NC-SA 4.0: not for commercial use, what is made from
it under the same licence. https://creativecommons.org/licenses/by-nc-sa/4.0/"""

PATIENCE = 30.0
"""Seconds of silence after which a connection is given up."""

ATTEMPTS = 6
"""A transfer is given up after this many attempts in a row without a new byte."""

REFUSALS = (400, 401, 403, 404, 405, 410, 451)
"""HTTP statuses for which another attempt is useless."""

FIRST_WAIT = 1.0
"""Seconds before the next attempt. They double after each attempt without a new byte."""

CATEGORIES = (
    *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile"),
    *("toothbrush", "transistor", "wood", "zipper"),
)

ENTRIES = ("train", "test", "ground_truth", "license.txt", "readme.txt", *LITTER)
"""Everything that a category's folder may hold. A folder with anything else is never replaced."""

CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DownloadConfig(Settings):
    """Download a category of MVTec AD. The archive (4.9 GB) holds all categories and is kept for the next one.

    It is licensed under CC BY-NC-SA 4.0: not for commercial use.
    """

    category: str
    """The category to unpack, such as bottle."""
    mvtec_root: Path = Path("datasets/mvtec")
    """Folder for the archive and the category."""
    url: str = URL
    """Address of the archive."""
    sha256: str = SHA256
    """Expected SHA-256 of the archive."""
    overwrite: bool = False
    """Replace the category if it exists already."""

    def __post_init__(self) -> None:
        super().__post_init__()
        official = self.sha256 == SHA256
        require(
            not official or self.category in CATEGORIES,
            f"--category {self.category}: MVTec AD has {', '.join(CATEGORIES)}",
        )
        is_name = bool(self.category) and Path(self.category).name == self.category and self.category not in (".", "..")
        require(is_name, f"--category {self.category!r} is not the name of a folder")
        require(
            self.url.startswith(("https://", "http://")), f"--url {self.url}: it must start with https:// or http://"
        )
        require(
            _is_url(self.url),
            f"--url {self.url}: this is not the address of a file; write odd characters as %20 and so on",
        )
        digits = set(self.sha256.lower()) <= set("0123456789abcdef") and len(self.sha256) == 64
        require(digits, f"--sha256 {self.sha256!r}: it must be 64 hexadecimal digits")


def _is_url(url: str) -> bool:
    try:
        parts = urlparse(url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return has_host and bool(Path(parts.path).name) and re.fullmatch(r"[!-~]+", url) is not None


def download(config: DownloadConfig) -> Path:
    """Download and unpack a category, and return its folder.

    A broken transfer is continued. An archive that exists already is not downloaded again.

    Raises:
        FlawmaskError: the category exists already, the archive cannot be fetched or has another SHA-256, it does not
            hold the category, or one of its files would be unpacked outside the folder. No partial category is left.
    """
    target = config.mvtec_root / config.category
    require(config.overwrite or not target.exists(), f"{target} is there already: replace it with --overwrite")
    unknown = sorted(path.name for path in target.iterdir() if path.name not in ENTRIES) if target.is_dir() else []
    require(not unknown, f"{target} holds something else ({', '.join(unknown[:3])}): move it away")
    require(not target.is_file(), f"{target} is a file: move it away")
    log.info("%s", LICENCE)
    config.mvtec_root.mkdir(parents=True, exist_ok=True)
    archive = config.mvtec_root / Path(urlparse(config.url).path).name
    with folder_lock(archive):
        if not archive.is_file():
            _fetch(config.url, archive, config.sha256.lower())
        elif _digest(archive) != config.sha256.lower():
            raise FlawmaskError(f"{archive} is another file than --sha256 says: delete it, and it is fetched again")
        _unpack(archive, config.category, target)
    log.info("unpacked %s; %s is kept for further categories, and may be deleted", target, archive)
    return target


def _fetch(url: str, archive: Path, wanted: str) -> None:
    """Fetch the archive, continuing an earlier transfer that broke off, and check it."""
    partial = archive.with_name(f"{archive.name}.partial")
    failures = 0
    while True:
        before = _size(partial)
        try:
            _transfer(url, partial, before)
            break
        except HTTPError as error:
            if error.code == 416:  # the file is complete already
                break
            reason, is_final = f"HTTP {error.code} {error.reason}", error.code in REFUSALS
        except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
            reason, is_final = str(getattr(error, "reason", error)) or type(error).__name__, False
        after = _size(partial)
        failures = failures + 1 if after <= before else 0
        if is_final or failures == ATTEMPTS:
            raise FlawmaskError(f"{url} cannot be fetched ({reason}): try again later, or name a mirror with --url")
        log.warning("%s: %s; continuing after the first %d MB", url, reason, after // 10**6)
        time.sleep(FIRST_WAIT * 2**failures)
    digest = _digest(partial)
    if digest != wanted:
        partial.unlink()
        raise FlawmaskError(f"{url} is another file than wanted (SHA-256 {digest}, not {wanted}): it was deleted")
    partial.replace(archive)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _transfer(url: str, partial: Path, start: int) -> None:
    """Append the rest of the server's file, from byte `start` on. If the server cannot continue, fetch all of it.

    Raises:
        ConnectionError: the connection broke off.
        OSError: the disk is full.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        continues = response.status == 206
        start = start if continues else 0
        remaining = int(response.headers.get("Content-Length") or 0)
        free = shutil.disk_usage(partial.parent).free
        require(remaining < free, f"{partial.parent} has {free // 10**6} MB free, but needs {remaining // 10**6} MB")
        with partial.open("ab" if continues else "wb") as file, bar("fetching", start + remaining, start) as advance:
            while chunk := _next(response):
                file.write(chunk)
                advance(len(chunk))
                remaining -= len(chunk)
    if remaining > 0:
        raise ConnectionError("the connection broke off")


def _next(response: HTTPResponse) -> bytes:
    """Return the bytes that have arrived, without waiting for more; nothing at the end.

    Raises:
        ConnectionError: the connection broke off, for any reason.
    """
    try:
        return response.read1(CHUNK)
    except OSError as error:  # no route, a broken TLS record, a timeout
        raise ConnectionError(str(error)) from None


def _digest(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file, bar("checking", _size(path)) as advance:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _unpack(archive: Path, category: str, target: Path) -> None:
    """Unpack one category of the archive, and refuse files that would leave its folder."""
    count = position = 0
    try:
        with atomic_folder(target) as folder, archive.open("rb") as data, bar("unpacking", _size(archive)) as advance:
            for member in (content := tarfile.open(fileobj=data)):  # noqa: SIM115 - `data` is closed by the with statement
                name = member.name.removeprefix("./")
                member.name = name.partition("/")[2]
                if name.split("/")[0] == category and member.name:
                    # Refuse links: with them, archives have bypassed filters.
                    require(member.isreg() or member.isdir(), f"{archive} cannot be unpacked: {name} is not a file")
                    content.extract(member, folder, filter="data")
                    count += 1
                advance(data.tell() - position)
                position = data.tell()
            require(count > 0, f"{archive} holds no {category}")
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0]
        raise FlawmaskError(f"{archive} cannot be unpacked: {reason}") from None
