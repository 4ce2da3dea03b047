"""The routes: what each request gets."""

import asyncio
import logging
import time
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from importlib.resources import files
from typing import Annotated, Any, TypeVar

import fastapi_offline
from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import flawmask
from flawmask.inference.backend import Image
from flawmask.prediction import Prediction
from flawmask.serve import answers
from flawmask.serve.answers import Health, ModelAnswer, PredictAnswer, Problem, Segmentation
from flawmask.serve.models import Loaded
from flawmask.serve.parts import Server
from flawmask.serve.refused import Refused
from flawmask.serve.uploads import MEGABYTE, Upload, read_uploads

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds after which a request gets no verdict. `X-Deadline-Ms` can only ask for fewer."""

Score = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[float, Field(ge=1, le=1000 * PATIENCE)]
ModelName = Annotated[str | SkipJsonSchema[None], Query(description="A model's name; by default the first.")]

PNG, JSON = "image/png", "application/json"

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": what}
    for status, what in {
        400: "The request cannot be read.",
        401: "The token is missing or wrong.",
        403: "Host or Origin is not this server.",
        404: "There is no such model.",
        406: "A picture was asked for several images.",
        408: "The request did not arrive in time.",
        413: "The request or the image is too large.",
        415: "It is no image that can be read.",
        422: "A parameter cannot be used.",
        500: "The network failed.",
        503: "The queue is full: send the image again after Retry-After seconds.",
        504: "The answer would be too late.",
    }.items()
}

BINARY = {"schema": {"type": "string", "format": "binary"}}
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": BINARY,
            "application/octet-stream": BINARY,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "additionalProperties": False,
                    "properties": {"image": {"type": "array", "minItems": 1, "items": BINARY["schema"]}},
                }
            },
        },
    }
}


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Return the result of the work. If the client leaves before, the work is cancelled.

    Raises:
        ClientDisconnect: the client left.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await working


def wants_png(accept: str) -> bool:
    """Return whether a picture is preferred to JSON by an Accept header (RFC 9110, 12.5.1)."""
    weights = {PNG: 0.0, JSON: 0.0}
    for part in accept.split(","):
        kind, *options = (text.strip() for text in part.split(";"))
        weight = 1.0
        for option in options:
            if option.startswith("q="):
                with suppress(ValueError):
                    weight = float(option[2:])
        if kind in weights:
            weights[kind] = weight
        elif kind in ("*/*", "application/*"):
            weights[JSON] = max(weights[JSON], weight)
    return weights[PNG] > weights[JSON]


def make_app(server: Server) -> FastAPI:
    """Return the application with all routes."""
    app = FastAPI(
        title="Flawmask",
        version=flawmask.__version__,
        summary="Verdicts, masks and scores for inspection images.",
        description="No answer without a verdict says good: its verdict is null, and it has a reason.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(Refused, partial(_refused, server))
    app.add_exception_handler(HTTPException, _http_problem)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, partial(_invalid, server))
    app.add_exception_handler(Exception, _crashed)
    _add_predict(app, server)
    _add_image(app, server)
    _add_model(app, server)
    _add_health(app, server)
    _add_pages(app)
    return app


def _token_in_docs(server: Server) -> list[Any]:
    """Return what tells the specification of the token, so that `/docs` asks for it. `Guard` checks it."""
    return [Depends(HTTPBearer(auto_error=False))] if server.config.token_file is not None else []


def _takes_images(server: Server, answer: str) -> dict[str, Any]:
    """Return what the specification says of a route that takes images and may answer with a picture."""
    return {
        "responses": {200: {"content": {PNG: BINARY}, "description": answer}, **PROBLEMS},
        "openapi_extra": BODY,
        "dependencies": _token_in_docs(server),
    }


def _problem(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"verdict": None, "reason": reason}, status, headers)


async def _refused(server: Server, _: Request, refused: Refused) -> JSONResponse:
    server.count_refusal(refused)
    return _problem(refused.status, refused.reason, refused.headers)


async def _http_problem(_: Request, error: HTTPException) -> JSONResponse:
    return _problem(error.status_code, str(error.detail), dict(error.headers or {}))


async def _invalid(server: Server, request: Request, error: RequestValidationError) -> JSONResponse:
    where = [f"{'.'.join(str(part) for part in one['loc'][1:])}: {one['msg']}" for one in error.errors()]
    return await _refused(server, request, Refused(422, "parameter", "; ".join(where)))


async def _crashed(_: Request, error: Exception) -> JSONResponse:
    log.error("the server failed", exc_info=error)
    return _problem(500, f"the server failed: {type(error).__name__}")


def _add_predict(app: FastAPI, server: Server) -> None:
    @app.post(
        "/v1/predict",
        response_model=PredictAnswer,
        **_takes_images(server, "The verdicts, or the overlay."),
    )
    async def predict(
        request: Request,
        model: ModelName = None,
        segmentation: Annotated[Segmentation, Query(description="The form of the masks.")] = "rle",
        min_score: Annotated[
            Score | SkipJsonSchema[None],
            Query(description="List defects from this score on; by default those that count."),
        ] = None,
        outlines: Annotated[bool, Query(description="Give each defect an SVG path.")] = False,
        x_deadline_ms: Annotated[
            Milliseconds | SkipJsonSchema[None], Header(description="When the answer would be too late.")
        ] = None,
    ) -> Response:
        """Return verdicts for one image or several; or one image's overlay, with `Accept: image/png`.

        With several images, the status is 200 if one of them has a verdict.
        """
        seconds = PATIENCE if x_deadline_ms is None else x_deadline_ms / 1000
        deadline = time.monotonic() + seconds
        chosen = _model(server, model)

        async def answered() -> Response:
            """Return the answer to the request, or raise `Refused`."""
            with server.places.taking() as take:
                uploads = await _uploads(server, request)
                if wants_png(request.headers.get("accept", "")):
                    return await unless_gone(request, _overlay(server, chosen, _only(uploads), deadline))
                take(len(uploads) - 1)
                finish = partial(
                    answers.image_answer, segmentation=segmentation, min_score=min_score, outlines=outlines
                )
                work = asyncio.gather(*(server.answer(chosen, one, deadline, finish) for one in uploads))
                return _answer(chosen, await unless_gone(request, work))

        with server.metrics.latency.time():
            try:
                return await _in_time(answered(), seconds)
            except TimeoutError:
                server.metrics.verdicts.labels(chosen.name, "none").inc()
                raise Refused(504, "too_late", f"no answer within {1000 * seconds:g} ms") from None


def _add_image(app: FastAPI, server: Server) -> None:
    @app.post(
        "/v1/image",
        response_class=Response,
        **_takes_images(server, "The image as PNG."),
    )
    async def image(request: Request, model: ModelName = None) -> Response:
        """Return one image at its full size as the model sees it, as PNG: browsers cannot show TIFF.

        The network computes nothing.
        """
        chosen = _model(server, model)

        async def answered() -> Response:
            """Return the answer to the request, or raise `Refused`."""
            with server.places.taking():
                upload = _only(await _uploads(server, request))
                return Response(await unless_gone(request, server.seen(chosen, upload)), media_type=PNG)

        try:
            return await _in_time(answered(), PATIENCE)
        except TimeoutError:
            raise Refused(504, "too_late", f"no answer within {1000 * PATIENCE:g} ms") from None


async def _in_time(work: Awaitable[T], seconds: float) -> T:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except ClientDisconnect:
        raise Refused(400, "client_left", "the client left before the answer") from None


def _model(server: Server, name: str | None) -> Loaded:
    chosen = server.models.get(name)
    if chosen is None:
        raise Refused(404, "no_model", f"there is no model {name}: there are {', '.join(server.models.names)}")
    return chosen


async def _uploads(server: Server, request: Request) -> list[Upload]:
    config = server.config
    return await read_uploads(request, config.max_upload_mb * MEGABYTE, config.send_timeout, config.max_queue)


def _only(uploads: list[Upload]) -> Upload:
    if len(uploads) > 1:
        raise Refused(406, "pictures", "a picture is given of one image at a time")
    return uploads[0]


def _answer(model: Loaded, results: list[tuple[dict[str, Any], int]]) -> JSONResponse:
    found = [answer for answer, _ in results]
    statuses = [status for _, status in results]
    content = {
        "model": model.name,
        "sha256": model.digest,
        "threshold": model.predictor.conf,
        **answers.overall(found),
        "images": found,
    }
    return JSONResponse(content, 200 if 200 in statuses else statuses[0])


async def _overlay(server: Server, model: Loaded, upload: Upload, deadline: float) -> Response:
    def finish(pixels: Image, prediction: Prediction) -> tuple[bytes, str, float]:
        verdict = prediction.verdict()
        return answers.overlay_png(pixels, prediction), "defect" if verdict.is_defect else "good", verdict.score

    (png, verdict, score), _ = await server.predict(model, upload, deadline, finish)
    server.count(model, verdict, score)
    return Response(png, media_type=PNG, headers={"X-Verdict": verdict, "X-Score": f"{score:.6f}"})


def _add_model(app: FastAPI, server: Server) -> None:
    @app.get(
        "/v1/model",
        response_model=ModelAnswer,
        responses={key: PROBLEMS[key] for key in (401, 403, 404, 422)},
        dependencies=_token_in_docs(server),
    )
    async def model(model: ModelName = None) -> JSONResponse:
        """Return a model's classes, its threshold and how it was chosen, its digest, and how good it was measured."""
        chosen = _model(server, model)
        problem = server.models.problems.get(chosen.name)
        return JSONResponse({"models": server.models.names, **chosen.facts, "problem": problem})


def _add_health(app: FastAPI, server: Server) -> None:
    not_well: dict[int | str, dict[str, Any]] = {503: {"model": Health}}

    @app.get("/health/live", response_model=Health, responses=not_well)
    async def live() -> JSONResponse:
        """Return whether the server can compute. If not, start it again."""
        return JSONResponse(*(({"status": "live"}, 200) if server.is_alive else ({"status": "hangs"}, 503)))

    @app.get("/health/ready", response_model=Health, responses=not_well)
    async def ready() -> JSONResponse:
        """Return whether the server takes images now."""
        is_ready = server.is_ready and server.is_alive and server.places.taken < server.places.limit
        return JSONResponse(*(({"status": "ready"}, 200) if is_ready else ({"status": "not ready"}, 503)))

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(server.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


PAGES = {
    "/": ("flawmask.serve.page", "index.html", "text/html"),
    "/page.css": ("flawmask.serve.page", "page.css", "text/css"),
    "/page.js": ("flawmask.serve.page", "page.js", "text/javascript"),
    "/viewer.js": ("flawmask.serve.page", "viewer.js", "text/javascript"),
    "/downloads.js": ("flawmask.serve.page", "downloads.js", "text/javascript"),
    "/docs": ("flawmask.serve.page", "docs.html", "text/html"),
    "/docs.js": ("flawmask.serve.page", "docs.js", "text/javascript"),
    "/swagger-ui.css": (fastapi_offline.__name__, "static/swagger-ui.css", "text/css"),
    "/swagger-ui-bundle.js": (fastapi_offline.__name__, "static/swagger-ui-bundle.js", "text/javascript"),
}
"""The files of the pages: package, name and type of each. They are read once, and no name of a client's is opened."""


def _add_pages(app: FastAPI) -> None:
    for path, (package, name, kind) in PAGES.items():
        content = files(package).joinpath(name).read_bytes()
        app.add_route(path, partial(_page, content, kind), methods=["GET"])


async def _page(content: bytes, kind: str, _: Request) -> Response:
    return Response(content, media_type=kind)
