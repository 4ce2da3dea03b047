"""The answers of `/v1`, and how a prediction becomes one."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from flawmask import masks
from flawmask.draw import PREDICTION
from flawmask.images import encode_png
from flawmask.inference.overlay import draw_instances, viewing_size
from flawmask.prediction import Instance, Prediction
from flawmask.report.gallery import outline_path

Segmentation = Literal["rle", "polygons"]


class Problem(BaseModel):
    """Why a request has no verdict."""

    verdict: None = Field(description="Always null: never read it as good.")
    reason: str = Field(description="What is wrong, and what to do.")


class InstanceAnswer(BaseModel):
    """A defect."""

    class_: str = Field(alias="class")
    score: float = Field(ge=0, le=1)
    counts: bool = Field(description="Whether it counts for the verdict: its score and its area are large enough.")
    box: list[float] = Field(description="[x, y, width, height] in pixels of the image.")
    area: int = Field(description="Pixels of the mask, or of the box for a network without masks.")
    segmentation: dict[str, Any] | list[list[int]] | None = Field(
        description="COCO's compressed RLE, or polygons along pixel edges (RLE where the mask has a hole)."
    )
    outline: str | None = Field(None, description="With outlines=true: an SVG path, in quarters of a pixel.")


class Timings(BaseModel):
    """Milliseconds of an image in each stage."""

    decode: float
    queue: float
    network: float = Field(description="Of its whole batch.")
    finish: float


class ImageAnswer(BaseModel):
    """An image. Without a verdict, all but file and reason are null."""

    file: str = Field(description="The client's name for it.")
    verdict: Literal["good", "defect"] | None = Field(description="null: there is no verdict, see reason.")
    reason: str | None = Field(description="Why there is no verdict; null where there is one.")
    width: int | None = None
    height: int | None = None
    score: float | None = Field(None, description="The highest score of a defect, 0 to 1.")
    defect_probability: float | None = None
    defect_area_px: int | None = None
    defect_area_percent: float | None = None
    instances: list[InstanceAnswer] | None = None
    timings_ms: Timings | None = None


class PredictAnswer(BaseModel):
    """The verdicts for the images of a request."""

    model: str
    sha256: str = Field(description="The digest of the model's file.")
    threshold: float
    verdict: Literal["good", "defect"] | None = Field(
        description="defect if any image has a defect; otherwise null if any has no verdict; otherwise good."
    )
    reason: str | None = Field(description="Why there is no verdict; null where there is one.")
    images: list[ImageAnswer]


class ModelAnswer(BaseModel):
    """A model, and how good it was measured."""

    models: list[str] = Field(description="All models of this server, the default first.")
    model: str
    sha256: str
    loaded_at: str
    architecture: str
    classes: list[str]
    image_size: int
    has_masks: bool
    join: str
    min_area: int
    threshold: dict[str, Any] = Field(description="value, and how it was chosen.")
    calibrated_on: str | None
    figures: dict[str, Any] | None = Field(
        description="split, images, metrics with 95 % intervals, measured_with, and differs: which of that is not as "
        "here. Metrics that do not hold here are left out."
    )
    notes: list[str] = Field(description="What to mind, as sentences: that an export is unproven, say.")
    problem: str | None = Field(description="Why a newer file of this model is not used.")


class Health(BaseModel):
    """Whether the server works."""

    status: str


def no_verdict(file: str, reason: str) -> dict[str, Any]:
    """Return the answer for an image without a verdict."""
    return {"file": file, "verdict": None, "reason": reason}


def image_answer(
    file: str, prediction: Prediction, segmentation: Segmentation, min_score: float | None, *, outlines: bool
) -> dict[str, Any]:
    """Return the answer for an image, as JSON values, without its timings.

    Args:
        file: the client's name for it.
        prediction: its prediction, with the model's threshold.
        segmentation: the form of the masks.
        min_score: defects from this score on are listed; by default those that count.
        outlines: whether each has an SVG path too.
    """
    answer = {"file": file, "reason": None, **prediction.to_dict()}
    listed = prediction.defects() if min_score is not None else prediction.defects(prediction.conf, prediction.min_area)
    answer["instances"] = [
        _instance(one, prediction, segmentation, outlines=outlines)
        for one in listed
        if min_score is None or one.score >= min_score
    ]
    return answer


def _instance(one: Instance, prediction: Prediction, segmentation: Segmentation, *, outlines: bool) -> dict[str, Any]:
    shape = None
    if prediction.has_masks:
        shape = one.rle if segmentation == "rle" else masks.encode(one.mask)
    return {
        "class": one.label,
        "score": one.score,
        "counts": one.score >= prediction.conf and one.area >= prediction.min_area,
        "box": one.xywh,
        "area": one.area,
        "segmentation": shape,
        "outline": outline_path(one.mask, 1.0) if outlines else None,
    }


def overall(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the verdict of a request and its reason: never good unless every image is."""
    without = [answer["reason"] for answer in answers if answer["verdict"] is None]
    if any(answer["verdict"] == "defect" for answer in answers):
        return {"verdict": "defect", "reason": None}
    return {"verdict": None, "reason": without[0]} if without else {"verdict": "good", "reason": None}


def overlay_png(pixels: npt.NDArray[np.uint8], prediction: Prediction) -> bytes:
    """Return the image with the defects that count outlined, as a PNG at a size that suits a screen."""
    defects = prediction.defects(prediction.conf, prediction.min_area)
    return encode_png(draw_instances(pixels, defects, PREDICTION, viewing_size(pixels)))
