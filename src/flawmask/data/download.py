"""MVTec AD, fetched when it is asked for: one archive, checked by its SHA-256, of which one category is unpacked."""

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
from flawmask.files import LITTER, only_one, whole_folder
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
"""Seconds after which a connection that says nothing is given up."""

ATTEMPTS = 6
"""After so many attempts in a row that brought no byte, a transfer is given up."""

REFUSALS = (400, 401, 403, 404, 405, 410, 451)
"""What a server says that will say so again."""

FIRST_WAIT = 1.0
"""Seconds before it is taken up again; twice as many after each attempt that brought nothing."""

CATEGORIES = (
    *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile"),
    *("toothbrush", "transistor", "wood", "zipper"),
)

ENTRIES = ("train", "test", "ground_truth", "license.txt", "readme.txt", *LITTER)
"""All that a category's folder holds; one with anything else in it is never replaced."""

CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DownloadConfig(Settings):
    """Fetch a category of MVTec AD: 4.9 GB for all categories, kept so that a second one need not be fetched.

    It is licensed under CC BY-NC-SA 4.0: not for commercial use.
    """

    category: str
    """The category that is unpacked, bottle for one."""
    mvtec_root: Path = Path("datasets/mvtec")
    """Where the archive and the category go."""
    url: str = URL
    """Where the archive is."""
    sha256: str = SHA256
    """What it must be."""
    overwrite: bool = False
    """Replace the category, if it is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        official = self.sha256 == SHA256
        require(
            not official or self.category in CATEGORIES,
            f"--category {self.category}: MVTec AD has {', '.join(CATEGORIES)}",
        )
        plain = bool(self.category) and Path(self.category).name == self.category and self.category not in (".", "..")
        require(plain, f"--category {self.category!r} is no name of a folder")
        require(
            self.url.startswith(("https://", "http://")), f"--url {self.url}: it must start with https:// or http://"
        )
        require(
            _is_url(self.url), f"--url {self.url}: it is no address of a file; write odd characters as %20 and so on"
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
    """Fetch and unpack a category, and return its folder.

    What a broken transfer left is gone on with; an archive that is there already is not fetched again.

    Raises:
        FlawmaskError: the category is there already, the archive cannot be had or is another one, or it does not hold
            the category, or a member of it would leave the folder. No part of a category is left.
    """
    target = config.mvtec_root / config.category
    require(config.overwrite or not target.exists(), f"{target} is there already: replace it with --overwrite")
    strange = sorted(one.name for one in target.iterdir() if one.name not in ENTRIES) if target.is_dir() else []
    require(not strange, f"{target} holds something else ({', '.join(strange[:3])}): move it away")
    require(not target.is_file(), f"{target} is a file: move it away")
    log.info("%s", LICENCE)
    config.mvtec_root.mkdir(parents=True, exist_ok=True)
    archive = config.mvtec_root / Path(urlparse(config.url).path).name
    with only_one(archive):
        if not archive.is_file():
            _fetch(config.url, archive, config.sha256.lower())
        elif _digest(archive) != config.sha256.lower():
            raise FlawmaskError(f"{archive} is another file than --sha256 says: delete it, and it is fetched again")
        _unpack(archive, config.category, target)
    log.info("unpacked %s; %s is kept for further categories, and may be deleted", target, archive)
    return target


def _fetch(url: str, archive: Path, wanted: str) -> None:
    """Fetch the archive, going on where an earlier transfer broke off, and check it."""
    partial = archive.with_name(f"{archive.name}.partial")
    failures = 0
    while True:
        before = _size(partial)
        try:
            _transfer(url, partial, before)
            break
        except HTTPError as error:
            if error.code == 416:  # nothing lies behind what is there already
                break
            reason, is_final = f"HTTP {error.code} {error.reason}", error.code in REFUSALS
        except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
            reason, is_final = str(getattr(error, "reason", error)) or type(error).__name__, False
        after = _size(partial)
        failures = failures + 1 if after <= before else 0
        if is_final or failures == ATTEMPTS:
            raise FlawmaskError(f"{url} cannot be fetched ({reason}): try again later, or name a mirror with --url")
        log.warning("%s: %s; going on behind the first %d MB", url, reason, after // 10**6)
        time.sleep(FIRST_WAIT * 2**failures)
    found = _digest(partial)
    if found != wanted:
        partial.unlink()
        raise FlawmaskError(f"{url} is another file than wanted (SHA-256 {found}, not {wanted}): it was deleted")
    partial.replace(archive)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _transfer(url: str, partial: Path, start: int) -> None:
    """Append to the file what the server has behind so many bytes, or all of it where it cannot go on.

    Raises:
        ConnectionError: it broke off.
        OSError: the disk is full.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        goes_on = answer.status == 206
        start = start if goes_on else 0
        left = int(answer.headers.get("Content-Length") or 0)
        free = shutil.disk_usage(partial.parent).free
        require(left < free, f"{partial.parent} has {free // 10**6} MB free, and {left // 10**6} MB are to come")
        with partial.open("ab" if goes_on else "wb") as file, bar("fetching", start + left, start) as move:
            while chunk := _next(answer):
                file.write(chunk)
                move(len(chunk))
                left -= len(chunk)
    if left > 0:
        raise ConnectionError("the connection broke off")


def _next(answer: HTTPResponse) -> bytes:
    """Return what has come so far, however late the rest is; nothing at the end.

    Raises:
        ConnectionError: the connection broke off, whichever way.
    """
    try:
        return answer.read1(CHUNK)
    except OSError as error:  # no route, a broken record of TLS, a timeout
        raise ConnectionError(str(error)) from None


def _digest(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file, bar("checking", _size(path)) as move:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            move(len(chunk))
    return digest.hexdigest()


def _unpack(archive: Path, category: str, target: Path) -> None:
    """Unpack what lies under one name of the archive, and nothing that would lead out of there."""
    found = at = 0
    try:
        with whole_folder(target) as folder, archive.open("rb") as data, bar("unpacking", _size(archive)) as move:
            for member in (content := tarfile.open(fileobj=data)):  # noqa: SIM115 - it has nothing of its own to close
                name = member.name.removeprefix("./")
                member.name = name.partition("/")[2]
                if name.split("/")[0] == category and member.name:
                    # Links are how archives have got past filters.
                    require(member.isreg() or member.isdir(), f"{archive} cannot be unpacked: {name} is no file")
                    content.extract(member, folder, filter="data")
                    found += 1
                move(data.tell() - at)
                at = data.tell()
            require(bool(found), f"{archive} holds no {category}")
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0]
        raise FlawmaskError(f"{archive} cannot be unpacked: {reason}") from None
