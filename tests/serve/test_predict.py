"""`/v1/predict`: verdicts are the predictor's, however the images are sent, and never good because something failed."""

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from random_network import patchwork

from flawmask.export.config import ExportConfig
from flawmask.export.export import export
from flawmask.files import sha256_of
from flawmask.images import encode_png, read_image
from flawmask.inference.predictor import Predictor
from flawmask.masks import decode
from flawmask.serve.answers import ModelAnswer, PredictAnswer
from flawmask.serve.config import ServeConfig
from serve.served import DEFECT, GOOD, Served, config_of, image, save_model, serving

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def predictor(folder: Path, small_network: None) -> Predictor:
    return Predictor(save_model(folder / "plates" / "best.pt"), "cpu", precision="fp32", threshold=0.8)


@pytest.fixture(scope="module")
def served(predictor: Predictor, folder: Path) -> Iterator[Served]:
    save_model(folder / "caps" / "best.pt")
    models = (folder / "plates" / "best.pt", f"lids={folder / 'caps' / 'best.pt'}")
    with serving(config_of(*models, inference_batch_size=4, max_megapixels=1, max_upload_mb=2, max_queue=16)) as it:
        yield it


def test_an_image_gets_the_prediction_of_the_predictor(served: Served, predictor: Predictor) -> None:
    expected = predictor(patchwork(60, 90, DEFECT)).to_dict()
    answer = served.predict(image())
    assert answer.status == 200
    PredictAnswer.model_validate_json(answer.body)
    (found,) = answer.json["images"]
    assert found.pop("timings_ms").keys() == {"decode", "queue", "network", "finish"}
    assert (found.pop("file"), found.pop("reason")) == ("image", None)
    for instance in found["instances"]:
        assert instance.pop("counts") is True
        assert instance.pop("outline") is None
    assert found == expected
    assert found["instances"]
    assert answer.json["verdict"] == expected["verdict"] == "defect"
    assert (answer.json["model"], answer.json["threshold"]) == ("plates", 0.8)


def test_several_images_keep_their_order_and_share_batches(served: Served, predictor: Predictor) -> None:
    before = served.metric("flawmask_batch_images_count")
    names = {f"part {seed}.png": image(seed) for seed in range(8)}
    answer = served.predict_form(names)
    assert [one["file"] for one in answer.json["images"]] == list(names)
    scores = [predictor(patchwork(60, 90, seed)).verdict().score for seed in range(8)]
    assert [one["score"] for one in answer.json["images"]] == pytest.approx(scores, abs=1e-5)
    assert served.metric("flawmask_batch_images_count") - before < 8


def test_requests_that_arrive_together_are_batched(served: Served) -> None:
    batches = served.metric("flawmask_batch_images_count")
    with ThreadPoolExecutor(8) as pool:
        with served.held():
            asked = [pool.submit(served.predict, image(seed)) for seed in range(8)]
            while served.metric("flawmask_queue_images") < 8:
                pass
        assert {one.result().status for one in asked} == {200}
    assert served.metric("flawmask_batch_images_count") - batches <= 4  # the first may have been taken alone


def test_images_of_other_sizes_have_the_results_that_they_have_alone(served: Served, predictor: Predictor) -> None:
    sizes = [(60, 90), (90, 60), (64, 64), (200, 40), (1, 300)]
    files = {f"{size}": image(3, *size) for size in sizes}
    found = served.predict_form(files).json["images"]
    for size, one in zip(sizes, found, strict=True):
        expected = predictor(patchwork(*size, seed=3)).to_dict()
        assert (one["height"], one["width"]) == size
        assert one["verdict"] == expected["verdict"]
        assert one["score"] == pytest.approx(expected["score"], abs=1e-5)


def test_polygons_and_rle_are_the_same_masks(served: Served) -> None:
    rle = served.predict(image(), "?min_score=0").json["images"][0]["instances"]
    shapes = served.predict(image(), "?min_score=0&segmentation=polygons&outlines=true").json["images"][0]["instances"]
    assert any(isinstance(one["segmentation"], list) for one in shapes)
    for one, other in zip(rle, shapes, strict=True):
        np.testing.assert_array_equal(decode(one["segmentation"], 60, 90), decode(other["segmentation"], 60, 90))
        assert other["outline"].startswith("M") == bool(one["area"])


def test_min_score_lists_what_does_not_count_and_changes_no_verdict(served: Served, predictor: Predictor) -> None:
    expected = predictor(patchwork(60, 90, DEFECT))
    answer = served.predict(image(), "?min_score=0").json["images"][0]
    assert [one["score"] for one in answer["instances"]] == [one.score for one in expected.defects()]
    assert [one["counts"] for one in answer["instances"]] == [one.score >= 0.8 for one in expected.defects()]
    assert {one["counts"] for one in answer["instances"]} == {True, False}
    none = served.predict(image(), "?min_score=1").json["images"][0]
    assert none["instances"] == []
    assert none["verdict"] == answer["verdict"] == "defect"


def test_the_overlay_is_the_predictors(served: Served, predictor: Predictor) -> None:
    expected = np.asarray(predictor(patchwork(60, 90, DEFECT)).overlay())
    for accept in ("image/png", "image/png, application/json;q=0.5", "*/*;q=0.1, image/png"):
        answer = served.predict(image(), Accept=accept)
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-verdict"] == "defect"
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.body))), expected)
    for accept in ("*/*", "application/json", "text/html", "image/png;q=0.2, application/json"):
        assert served.predict(image(), Accept=accept).headers["content-type"] == "application/json"
    assert served.predict_form({"a": image(), "b": image()}, Accept="image/png").status == 406


def test_an_image_is_returned_as_the_model_sees_it_and_nothing_is_computed(
    served: Served, predictor: Predictor, tmp_path: Path
) -> None:
    before = served.metric("flawmask_batch_images_count"), served.metric("flawmask_verdicts_total", model="plates")
    pixels = patchwork(40, 2000, DEFECT)
    Image.fromarray(pixels).save(tmp_path / "a.tif", exif={0x0112: 6})
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(tmp_path / "deep.tif")
    for name in ("a.tif", "deep.tif"):
        answer = served.ask("POST", "/v1/image", (tmp_path / name).read_bytes())
        assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
        found = np.asarray(Image.open(io.BytesIO(answer.body)))
        np.testing.assert_array_equal(found, read_image(tmp_path / name, predictor.spec.intensity))
    assert found.shape == (40, 2000, 3)
    for path, body, status in (("", b"nothing", 415), ("", b"", 400), ("?model=cups", image(), 404)):
        refused = served.ask("POST", f"/v1/image{path}", body)
        assert (refused.status, refused.json["verdict"]) == (status, None)
    form = served.predict_form({"a": image(), "b": image()}, Accept="image/png")
    assert form.status == 406
    after = served.metric("flawmask_batch_images_count"), served.metric("flawmask_verdicts_total", model="plates")
    assert before == after


def test_models_are_chosen_by_name(served: Served) -> None:
    assert served.predict(image()).json["model"] == "plates"
    assert served.predict(image(), "?model=lids").json["model"] == "lids"
    assert served.get("/v1/model").json["models"] == ["plates", "lids"]
    for answer in (served.predict(image(), "?model=../best.pt"), served.get("/v1/model?model=cups")):
        assert answer.status == 404
        assert answer.json["verdict"] is None
        assert "plates, lids" in answer.json["reason"]


def test_the_model_is_described(served: Served, predictor: Predictor, folder: Path) -> None:
    answer = served.get("/v1/model?model=lids")
    ModelAnswer.model_validate_json(answer.body)
    facts = answer.json
    assert facts["classes"] == list(predictor.spec.classes)
    assert facts["threshold"]["how"] == "given"
    assert facts["figures"] is None
    assert facts["sha256"] == sha256((folder / "caps" / "best.pt").read_bytes()).hexdigest()


NO_IMAGES = {
    "text": b"good",
    "empty PNG": b"\x89PNG\r\n\x1a\n",
    "half a PNG": image()[:200],
    "html": b"<html><script>alert(1)</script></html>",
    "half a JPEG": cv2.imencode(".jpg", patchwork(60, 90, DEFECT))[1].tobytes()[:500],
}


@pytest.mark.parametrize("what", NO_IMAGES)
def test_what_is_no_image_has_no_verdict(served: Served, what: str) -> None:
    for answer in (served.predict(NO_IMAGES[what]), served.predict(NO_IMAGES[what], Accept="image/png")):
        assert answer.status == 415
        assert answer.json["verdict"] is None
        assert "cannot be read" in answer.json["reason"]


def test_among_several_only_the_one_that_is_no_image_has_no_verdict(served: Served) -> None:
    answer = served.predict_form({"a.png": image(), "<b>.png": b"nothing", "c.png": image(GOOD)})
    assert answer.status == 200
    assert answer.json["verdict"] == "defect"  # that is known, whatever the second image would show
    verdicts = [one["verdict"] for one in answer.json["images"]]
    assert verdicts[1] is None
    assert None not in (verdicts[0], verdicts[2])
    assert answer.json["images"][1]["file"] == "<b>.png"
    both = served.predict_form({"a.png": b"x", "b.png": b"y"})
    assert (both.status, both.json["verdict"]) == (415, None)


def test_a_good_image_beside_an_unreadable_one_is_no_good_request(served: Served) -> None:
    assert served.predict(image(GOOD)).json["verdict"] == "good"
    answer = served.predict_form({"a": image(GOOD), "b": b"nothing"}).json
    assert answer["verdict"] is None
    assert "b cannot be read" in answer["reason"]


def test_what_is_too_large_is_refused(served: Served) -> None:
    pixels = served.predict(encode_png(np.zeros((1000, 1001), np.uint8)))
    assert (pixels.status, pixels.json["verdict"]) == (413, None)
    assert "1 million pixels" in pixels.json["reason"]
    body = served.predict(bytes(2 * 10**6 + 1))
    assert (body.status, body.json) == (413, {"verdict": None, "reason": "the request is larger than 2 MB"})
    chunked = served.ask("POST", "/v1/predict", iter([bytes(10**6)] * 3))  # type: ignore[arg-type]
    assert chunked.status == 413
    with served.connected() as connection:  # it asks before it sends, and is told at once
        head = "POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    assert served.predict(image()).status == 200


def test_a_body_that_is_neither_image_nor_form_is_refused(served: Served) -> None:
    def send(body: bytes, kind: str) -> int:
        return served.ask("POST", "/v1/predict", body, {"Content-Type": kind}).status

    assert send(json.dumps({"path": "/etc/passwd"}).encode(), "application/json") == 415
    assert send(b"", "image/png") == 400
    assert send(b"", "multipart/form-data; boundary=a") == 400
    assert send(b"x", "multipart/form-data") == 400
    assert send(b"--a\r\nfoo", "multipart/form-data; boundary=a") == 400
    field = b'--a\r\nContent-Disposition: form-data; name="image"\r\n\r\n/etc/passwd\r\n--a--\r\n'
    assert send(field, "multipart/form-data; boundary=a") == 400


@pytest.mark.parametrize("part", [image(), b"text", bytes(1_500_000)])
def test_a_part_of_a_form_without_a_filename_is_refused_and_not_left_out(served: Served, part: bytes) -> None:
    """Some programs' forms have none unless one is given, such as those of .NET's MultipartFormDataContent."""
    named, unnamed = b'name="image"; filename="a.png"', b'name="image"'
    for parts in ([(named, image()), (unnamed, part)], [(unnamed, part), (named, image())]):
        body = b"".join(b"--a\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % one for one in parts)
        answer = served.ask(
            "POST", "/v1/predict", body + b"--a--\r\n", {"Content-Type": "multipart/form-data; boundary=a"}
        )
        assert (answer.status, answer.json["verdict"]) == (400, None)
        assert "image of the form has no filename" in answer.json["reason"]


@pytest.mark.parametrize("query", ["min_score=2", "min_score=nan", "segmentation=svg", "outlines=perhaps"])
def test_a_parameter_that_cannot_be_used_is_refused(served: Served, query: str) -> None:
    answer = served.predict(image(), f"?{query}")
    assert (answer.status, answer.json["verdict"]) == (422, None)
    assert query.partition("=")[0] in answer.json["reason"]


def test_sixteen_bits_colours_and_turned_images_are_read_as_by_predict(
    served: Served, predictor: Predictor, tmp_path: Path
) -> None:
    turned = Image.fromarray(patchwork(60, 90, DEFECT))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "deep.png").write_bytes(encode_png(patchwork(60, 90, DEFECT)[:, :, 0].astype(np.uint16) * 257))
    for name in ("turned.jpg", "deep.png"):
        expected = predictor(tmp_path / name).to_dict()
        found = served.predict((tmp_path / name).read_bytes()).json["images"][0]
        assert (found["width"], found["height"], found["score"]) == (
            expected["width"],
            expected["height"],
            expected["score"],
        )
    dark = served.predict(encode_png(np.full((60, 90), 700, np.uint16)))
    assert (dark.status, dark.json["verdict"]) == (415, None)
    assert "black" in dark.json["reason"]


def test_an_exported_model_gives_the_verdicts_that_predictor_gives(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = save_model(tmp_path / "best.pt")
    folder = export(ExportConfig(model=model, output_dir=tmp_path / "exported", unproven=True)).folder
    predictor = Predictor(folder, threshold=0.8)
    config = ServeConfig(model=(str(folder),), conf=0.8)
    with serving(config) as it:
        for seed in range(3):
            (answer,) = it.predict(encode_png(patchwork(70, 90, seed))).json["images"]
            expected = predictor(patchwork(70, 90, seed)).verdict()
            assert (answer["verdict"], answer["score"]) == ("defect" if expected.is_defect else "good", expected.score)
        facts = it.get("/v1/model").json
        assert facts["sha256"] == sha256_of(folder / "export.json")
        assert "unproven" in facts["notes"][0]


@pytest.mark.parametrize("tile_from", ["all", "coarse"])
def test_a_model_that_sees_tiles_gives_the_verdicts_that_predictor_gives(tmp_path: Path, tile_from: Any) -> None:
    model = save_model(tmp_path / "best.pt")
    predictor = Predictor(model, "cpu", precision="fp32", threshold=0.8, tile=64, overlap=16, tile_from=tile_from)
    with serving(config_of(model, tile=64, overlap=16, tile_from=tile_from)) as it:
        pixels = patchwork(150, 200, 3)
        (answer,) = it.predict(encode_png(pixels)).json["images"]
        expected = predictor(pixels)
        assert answer["score"] == expected.verdict().score
        assert len(answer["instances"]) == len(expected.defects(0.8))
        assert it.get("/v1/model").json["tile"] == 64
