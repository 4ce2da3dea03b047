"""The images in a request: one as the body, or one or several as multipart/form-data (RFC 7578)."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from flawmask.serve.refused import Refused

MEGABYTE = 10**6
MUCH = 4
"""How many times as large as allowed a body may be to be read to its end."""

NAME_LENGTH = 200
"""The most characters of a client's name for an image that are kept."""


@dataclass(frozen=True)
class Upload:
    """An image as it was sent.

    Attributes:
        name: what the client calls it. It is a text for messages and answers, never a path.
        data: the content of the file.
    """

    name: str
    data: bytes


async def read_uploads(request: Request, max_bytes: int, seconds: float, max_images: int) -> list[Upload]:
    """Return the images of a request, in their order; at least one.

    Args:
        request: the request; its body was not read yet.
        max_bytes: the largest body.
        seconds: how long the client has to send it.
        max_images: the most images in it.

    Raises:
        Refused: 400, 408, 413 or 415: it holds no image, took too long, is too large, or is of no type that is known.
        ClientDisconnect: the client left before it had sent all.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    is_form = kind == b"multipart/form-data"
    if not is_form and kind not in (b"", b"application/octet-stream") and not kind.startswith(b"image/"):
        raise Refused(415, "no_image", "send an image as the body, as image/* or application/octet-stream, or a form")
    try:
        async with asyncio.timeout(seconds):
            body = await _body(request, max_bytes)
    except TimeoutError:
        close = {"Connection": "close"}
        raise Refused(408, "slow_client", f"the request did not arrive within {seconds:g} seconds", close) from None
    if not is_form:
        if not body:
            raise Refused(400, "no_image", "the request has no body: send an image")
        return [Upload("image", body)]
    if b"boundary" not in options:
        raise Refused(400, "bad_form", "the form names no boundary")
    return await _images_in_form(request, body, max_images)


async def _body(request: Request, max_bytes: int) -> bytes:
    """Return the body of a request. One that is too large is read to its end, or the client would not see the answer.

    A client that has asked before it sends (`Expect: 100-continue`) is told at once. A much larger body is cut off.
    """
    reason = f"the request is larger than {max_bytes // MEGABYTE} MB"
    too_large = Refused(413, "too_large", reason, {"Connection": "close"})
    length = request.headers.get("content-length", "0")
    if "expect" in request.headers and length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body, received = bytearray(), 0
    async for chunk in request.stream():
        received += len(chunk)
        if received <= max_bytes:
            body += chunk
        elif received > MUCH * max_bytes:
            break
    if received > max_bytes:
        raise too_large
    return bytes(body)


async def _images_in_form(request: Request, body: bytes, max_images: int) -> list[Upload]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    all_of_it = len(body) + 1  # it is in memory already: nothing goes to a file
    parser = MultiPartParser(
        request.headers, stream(), max_files=max_images, max_fields=max_images, max_part_size=all_of_it
    )
    parser.spool_max_size = all_of_it
    try:
        form = await parser.parse()
    except (MultiPartException, HTTPException) as error:
        reason = getattr(error, "message", None) or str(error)
        raise Refused(400, "bad_form", f"the form cannot be read: {reason}") from None
    try:
        uploads = []
        for field, value in form.multi_items():
            if not isinstance(value, UploadFile):  # left out, it would be an image that nobody looked at
                reason = f"the part {_name(field)} of the form has no filename: send each image as a file"
                raise Refused(400, "bad_form", reason)
            uploads.append(Upload(_name(value.filename), await value.read()))
    finally:
        await form.close()
    if not uploads:
        raise Refused(400, "no_image", "the form has no file: send each image as a file")
    return uploads


def _name(name: str | None) -> str:
    """Return a client's name for an image, short and printable."""
    return "".join(letter if letter.isprintable() else "?" for letter in (name or "image")[:NAME_LENGTH])
