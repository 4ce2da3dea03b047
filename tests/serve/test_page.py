"""The page in a real browser, before a real server."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest
from browsers import chromium, contrast, luminance
from PIL import Image
from random_network import SPEC, patchwork

from flawmask.files import sha256_of, write_json
from flawmask.masks import decode
from serve.served import DEFECT, GOOD, Served, config_of, image, save_model, serving, until

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("small_network")]

SCRIPT_NAME = "<img src=x onerror=alert(1)>.png"
SIZE = (600, 900)
RULES = {"conf": 0.8, "min_area": 0, "join": "off", "tile": None, "overlap": 0, "tile_from": "all"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small_network: None) -> Path:
    folder = tmp_path_factory.mktemp("models") / "plates"
    path = save_model(folder / "best.pt")
    metrics = {"model_sha256": sha256_of(path), "total_images": 44, "image_auroc": 0.971, **RULES}
    write_json(folder / "inference_test" / "metrics.json", metrics | {"intervals": {"image_auroc": [0.835, 0.995]}})
    return path


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with serving(config_of(model)) as it:
        yield it


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream") as started:
        yield started


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, served: Served) -> Iterator[Open]:
    """A function that opens the page. An error on the page, or a request to another server, fails the test."""
    wrong: list[str] = []
    contexts: list[Any] = []

    def go(port: int = 0, width: int = 1280, height: int = 900, path: str = "/", **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        contexts.append(context)
        page = context.new_page()
        own = f"http://127.0.0.1:{port or served.port}/"
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            # An answer without a verdict has a status from 400 on, and Chromium logs that.
            lambda message: wrong.append(message.text) if "Failed to load resource" not in message.text else None,
        )
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((own, f"blob:{own}", "data:")) else wrong.append(request.url)
            ),
        )
        page.goto(own.rstrip("/") + path)
        return page

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


def file(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": data}


def choose(page: Any, *files: dict[str, Any]) -> None:
    page.set_input_files("#files", list(files))


def wait(page: Any, condition: str) -> None:
    """Wait until a condition holds. (The page's policy forbids Playwright's own way, which evaluates text in it.)"""
    until(lambda: page.evaluate(condition))


def settled(page: Any, count: int) -> list[str]:
    """Wait until so many images have an answer, and return what the strip says of them, the newest first."""
    wait(page, f"document.querySelectorAll('#strip .badge:not(.waiting)').length === {count}")
    return list(page.eval_on_selector_all("#strip .badge", "all => all.map(one => one.textContent)"))


def drawn(page: Any) -> int:
    return int(page.eval_on_selector_all("#outlines g", "all => all.length"))


def slide(page: Any, threshold: float) -> None:
    page.eval_on_selector(
        "#threshold",
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', { bubbles: true })); }",
        threshold,
    )


def zoomed(page: Any) -> tuple[float, float, float]:
    """The width of the image on the screen, and where its upper left corner is in the frame."""
    return tuple(
        page.evaluate(
            "() => { const [a, b] = ['stage', 'viewer'].map(id => document.getElementById(id).getBoundingClientRect());"
            " return [a.width, a.left - b.left, a.top - b.top]; }"
        )
    )


def test_the_page_names_the_model_and_how_good_it_was_measured(opened: Open, model: Path) -> None:
    page = opened()
    wait(page, "document.getElementById('model').textContent.startsWith('plates')")
    said = page.text_content("#model")
    assert sha256_of(model)[:8] in said
    assert "threshold 0.80 (given)" in said
    assert "measured on 44 images (test) at threshold 0.80: AUROC 97.1 % (83.5 to 99.5)" in said
    with serving(replace(config_of(model), conf=0.9)) as it:
        page = opened(it.port)
        wait(page, "document.getElementById('model').textContent.startsWith('plates')")
        assert page.text_content("#model").endswith(
            "(83.5 to 99.5), figures that hold for this threshold only are left out"
        )


def test_dropped_images_get_the_servers_verdicts(opened: Open, served: Served) -> None:
    page = opened()
    page.evaluate(
        """async images => {
          const transfer = new DataTransfer();
          for (const [name, bytes] of images) transfer.items.add(new File([new Uint8Array(bytes)], name));
          for (const kind of ["dragenter", "dragover", "drop"])
            document.body.dispatchEvent(
              new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        [["bad.png", list(image(DEFECT))], ["fine.png", list(image(GOOD))]],
    )
    assert settled(page, 2) == ["good 0.79", "defect 0.82"]
    assert page.text_content("#verdict") == "defect 0.82"
    answer = served.predict(image(DEFECT)).json["images"][0]
    assert drawn(page) == len(answer["instances"])
    tags = page.eval_on_selector_all("#outlines text", "all => all.map(one => one.textContent)")
    names = [f"{one['class']} {one['score']:.2f}" for one in answer["instances"]]
    assert tags[0] == names[0]
    assert set(tags) <= set(names)  # a tag that would cover another one is left out


def test_the_camera_takes_a_picture(opened: Open) -> None:
    page = opened()
    page.click("#camera")
    wait(page, "document.getElementById('video').videoWidth > 0")
    page.click("#take")
    settled(page, 1)
    page.click("#stop")
    assert page.text_content("#name").startswith("camera 20")
    assert page.evaluate("document.getElementById('video').srcObject.getTracks().every(one => !one.enabled || "
                         "one.readyState === 'ended')")  # fmt: skip


def test_the_threshold_is_dragged_and_the_servers_verdict_stays(opened: Open, served: Served) -> None:
    page = opened()
    choose(page, file("a.png", image(DEFECT)))
    settled(page, 1)
    every = served.predict(image(DEFECT), "?min_score=0").json["images"][0]["instances"]
    for threshold in (0.55, 0.7, 0.81, 0.9):
        slide(page, threshold)
        assert drawn(page) == sum(one["score"] >= threshold for one in every)
        assert page.text_content("#verdict") == "defect 0.82"
        would = "defect" if threshold <= every[0]["score"] else "good"
        assert f"At {threshold:.2f} it would be: {would}" in page.text_content("#would")
    page.click("#reset")
    assert page.text_content("#value") == "0.80"
    assert page.text_content("#would") == ""
    # With the mouse, as a person does.
    box = page.locator("#threshold").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
    page.mouse.up()
    assert float(page.text_content("#value")) == pytest.approx(0.6, abs=0.03)


def test_classes_and_instances_are_switched_off_and_on(opened: Open) -> None:
    page = opened()
    choose(page, file("a.png", image(DEFECT)))
    settled(page, 1)
    slide(page, 0.5)
    before = drawn(page)
    assert before > 3
    page.uncheck("#instances input >> nth=0")
    assert drawn(page) == before - 1
    page.check("#instances input >> nth=0")
    name = page.text_content("#classes label >> nth=0")
    of_class = page.locator(f"#outlines g[data-class='{name}']").count()
    page.uncheck("#classes input >> nth=0")
    assert drawn(page) == before - of_class
    page.focus("#classes input >> nth=0")
    page.keyboard.press("Space")
    assert drawn(page) == before


def test_zoom_shows_every_pixel_and_keeps_what_is_under_the_pointer(opened: Open) -> None:
    page = opened()
    choose(page, file("a.png", image(DEFECT, *SIZE)))
    settled(page, 1)
    fitted = zoomed(page)
    frame = page.locator("#viewer").bounding_box()
    page.click("[data-zoom=full]")
    assert zoomed(page)[0] == pytest.approx(SIZE[1], abs=0.5)
    at = (frame["x"] + 200, frame["y"] + 150)
    page.mouse.move(*at)
    before = zoomed(page)
    page.mouse.wheel(0, -400)
    wait(page, f"document.getElementById('stage').clientWidth > {1.5 * before[0]}")
    after = zoomed(page)
    for side, offset in ((1, 200), (2, 150)):
        assert (offset - after[side]) / after[0] == pytest.approx((offset - before[side]) / before[0], abs=2e-3)
    page.mouse.down()
    page.mouse.move(at[0] - 40, at[1] - 30)
    page.mouse.up()
    assert zoomed(page)[1:] == pytest.approx((after[1] - 40, after[2] - 30), abs=1)
    page.click("[data-zoom=fit]")
    assert zoomed(page) == pytest.approx(fitted, abs=1)


def test_everything_goes_by_keyboard(opened: Open) -> None:
    page = opened()
    choose(page, file("a.png", image(DEFECT, *SIZE)), file("b.png", image(GOOD, *SIZE)))
    settled(page, 2)
    assert page.text_content("#name") == "a.png"
    page.focus("#viewer")
    fitted = zoomed(page)
    for key, larger in (("+", True), ("-", False)):
        width = zoomed(page)[0]
        page.keyboard.press(key)
        assert (zoomed(page)[0] > width) is larger
    page.keyboard.press("1")
    page.keyboard.press("+")
    page.keyboard.press("+")
    before = zoomed(page)
    page.keyboard.press("ArrowRight")
    assert zoomed(page)[1] == pytest.approx(before[1] - 60, abs=1)
    page.keyboard.press("0")
    assert zoomed(page) == pytest.approx(fitted, abs=1)
    page.keyboard.press("PageDown")
    assert page.text_content("#name") == "b.png"
    page.keyboard.press("PageUp")
    assert page.text_content("#name") == "a.png"
    reached = []
    page.evaluate("document.activeElement.blur()")
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    wanted = {"choose", "camera", "viewer", "threshold", "clear", "JSON", "CSV", "COCO", "PNG", "Fit", "1:1"}
    assert wanted <= set(reached)
    assert any("b.png" in one for one in reached)  # the strip
    ring = page.evaluate("() => { document.getElementById('choose').focus({ focusVisible: true });"
                         " return getComputedStyle(document.getElementById('choose')).outlineStyle; }")  # fmt: skip
    assert ring == "solid"


def test_the_strip_is_filtered(opened: Open) -> None:
    page = opened()
    choose(page, file("a.png", image(DEFECT)), file("b.png", image(GOOD)), file("c.png", b"no image"))
    settled(page, 3)
    for name, expected in (("defect", ["a.png"]), ("good", ["b.png"]), ("none", ["c.png"])):
        page.click(f"[data-filter={name}]")
        assert page.eval_on_selector_all("#strip .file", "all => all.map(one => one.textContent)") == expected
        assert page.text_content(f"[data-count={name}]") == "1"
        page.click("#strip button")
        assert page.text_content("#name") == expected[0]
    page.click("[data-filter=all]")
    assert page.text_content("[data-count=all]") == "3"
    page.click("#clear")
    assert page.locator("#strip li").count() == 0
    assert page.text_content("#empty") == "Drop images here"


def downloaded(page: Any, kind: str) -> bytes:
    with page.expect_download() as waiting:
        page.click(f"[data-download={kind}]")
    return Path(waiting.value.path()).read_bytes()


def test_downloads_are_what_the_server_said(opened: Open, served: Served) -> None:
    page = opened()
    assert all(page.is_disabled(f"[data-download={kind}]") for kind in ("json", "csv", "coco", "png"))
    choose(page, file("=a,1.png", image(DEFECT)), file("b.png", image(GOOD)), file("c.png", b"no image"))
    settled(page, 3)
    said = [served.predict(image(seed), "?min_score=0").json["images"][0] for seed in (DEFECT, GOOD)]
    found = json.loads(downloaded(page, "json"))["images"]
    assert [one["file"] for one in found] == ["=a,1.png", "b.png", "c.png"]
    for one, expected in zip(found, said, strict=False):
        assert (one["verdict"], one["score"], one["threshold"]) == (expected["verdict"], expected["score"], 0.8)
        masks = [instance["segmentation"] for instance in expected["instances"]]
        assert [instance["segmentation"] for instance in one["instances"]] == masks
    assert (found[2]["verdict"], found[2].get("score")) == (None, None)
    rows = list(csv.DictReader(io.StringIO(downloaded(page, "csv").decode("utf-8-sig"))))
    assert [(row["file"], row["verdict"]) for row in rows] == [
        ("'=a,1.png", "defect"),
        ("b.png", "good"),
        ("c.png", "no verdict"),
    ]
    assert rows[0]["instances"] == str(sum(one["counts"] for one in said[0]["instances"]))
    coco = json.loads(downloaded(page, "coco"))
    assert [one["file_name"] for one in coco["images"]] == ["=a,1.png", "b.png"]
    counting = [one for one in said[0]["instances"] if one["counts"]]
    assert len(coco["annotations"]) == len(counting) > 0
    for record, one in zip(coco["annotations"], counting, strict=True):
        assert coco["categories"][record["category_id"] - 1]["name"] == one["class"]
        np.testing.assert_array_equal(decode(record["segmentation"], 60, 90), decode(one["segmentation"], 60, 90))


def test_coco_has_the_classes_of_every_model(opened: Open, model: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "best.pt", replace(SPEC, classes=("good", "dent", "hole")))
    with serving(config_of(f"plates={model}", f"lids={other}")) as it:
        page = opened(it.port)
        wait(page, "!document.getElementById('models').hidden")
        expected = []
        for count, name in enumerate(("plates", "lids"), start=1):
            page.select_option("#chosen", name)
            wait(page, f"document.getElementById('model').textContent.startsWith('{name}')")
            choose(page, file(f"{name}.png", image(seed=3)))
            settled(page, count)
            found = it.predict(image(seed=3), f"?model={name}").json["images"][0]["instances"]
            expected += [one["class"] for one in found]
        coco = json.loads(downloaded(page, "coco"))
    names = {one["id"]: one["name"] for one in coco["categories"]}
    assert [names[one["category_id"]] for one in coco["annotations"]] == expected
    assert len(set(names.values())) == len(names) == len(coco["categories"])


def test_the_picture_is_the_image_at_full_resolution_with_the_outlines(opened: Open, served: Served) -> None:
    data = image(DEFECT, *SIZE)
    page = opened()
    choose(page, file("a.png", data))
    settled(page, 1)
    slide(page, 0.0)
    page.keyboard.press("Tab")
    picture = np.asarray(Image.open(io.BytesIO(downloaded(page, "png"))).convert("RGB")).astype(int)
    original = patchwork(*SIZE, seed=DEFECT).astype(int)
    assert picture.shape == original.shape
    edges = np.zeros(SIZE, np.uint8)
    for one in served.predict(data, "?min_score=0").json["images"][0]["instances"]:
        mask = decode(one["segmentation"], *SIZE).astype(np.uint8)
        x, y, width, height = (round(side) for side in one["box"])
        if not one["area"]:  # of an empty mask, the box is shown
            cv2.rectangle(edges, (x, y), (x + width, y + height), 1)
        else:
            edge = cv2.morphologyEx(np.pad(mask, 1), cv2.MORPH_GRADIENT, np.ones((3, 3)))[1:-1, 1:-1]
            edges[edge > 0] = 1
    assert edges.any()
    changed = np.abs(picture - original).max(axis=2) > 40
    far = cv2.distanceTransform(1 - edges, cv2.DIST_L2, 5) > 6
    assert not changed[far].any()
    near = cv2.dilate(changed.astype(np.uint8), np.ones((5, 5))) > 0
    assert near[edges > 0].mean() > 0.98


def test_an_unreadable_file_and_a_failing_network_have_no_verdict(
    opened: Open, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = opened()
    choose(page, file("note.png", b"this is no image"))
    assert settled(page, 1) == ["no verdict"]
    assert "cannot be read as an image" in page.text_content("#reason")
    assert page.is_disabled("[data-download=png]")
    assert page.text_content("#empty") == "This image cannot be shown"
    loaded = served.server.models.get(None)
    assert loaded is not None

    def failing(_: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr(loaded.backend, "infer", failing)
    choose(page, file("a.png", image()))
    assert settled(page, 2) == ["no verdict", "no verdict"]
    assert page.text_content("#reason") == "the network failed: RuntimeError"
    assert drawn(page) == 0
    assert page.is_visible("#picture")
    slide(page, 0.1)
    assert "good" not in page.text_content("#side")


def test_a_server_that_goes_away_comes_back_and_nothing_is_lost(opened: Open, model: Path) -> None:
    with ExitStack() as first:
        it = first.enter_context(serving(config_of(model)))
        page = opened(it.port)
        choose(page, file("a.png", image()))
        settled(page, 1)
        first.close()
    choose(page, file("b.png", image(GOOD)))
    page.wait_for_selector("#away:not([hidden])")
    assert "does not answer" in page.text_content("#away")
    assert page.text_content("#verdict") == "waiting"
    with serving(config_of(model), it.port):
        assert settled(page, 2) == ["good 0.79", "defect 0.82"]
        page.wait_for_selector("#away", state="hidden")


def test_a_server_that_comes_back_with_other_models_is_asked_for_those(
    opened: Open, model: Path, tmp_path: Path
) -> None:
    """The images of a model that was chosen and is gone have no verdict: another model's would be none of theirs."""
    with ExitStack() as first:
        it = first.enter_context(serving(config_of(f"caps={model}", f"lids={model}")))
        page = opened(it.port)
        wait(page, "!document.getElementById('models').hidden")
        page.select_option("#chosen", "lids")
        wait(page, "document.getElementById('model').textContent.startsWith('lids')")
        first.close()
    choose(page, file("a.png", image()))
    page.wait_for_selector("#away:not([hidden])")
    with ExitStack() as second:
        second.enter_context(serving(config_of(f"tops={model}", f"ends={model}"), it.port))
        assert settled(page, 1) == ["no verdict"]
        assert "there is no model lids" in page.text_content("#reason")
        wait(page, "document.getElementById('model').textContent.startsWith('tops')")
        assert page.eval_on_selector_all("#chosen option", "all => all.map(one => one.value)") == ["tops", "ends"]
        assert page.is_hidden("#away")
        choose(page, file("b.png", image()))
        assert settled(page, 2) == ["defect 0.82", "no verdict"]
        second.close()
    with serving(config_of(f"one={model}"), it.port):
        choose(page, file("c.png", image()))
        assert settled(page, 3)[0] == "no verdict"
        wait(page, "document.getElementById('models').hidden")
        choose(page, file("d.png", image()))
        assert settled(page, 4)[0] == "defect 0.82"
    with serving(config_of(f"two={model}"), it.port):  # where nothing was chosen, its name does not matter
        choose(page, file("e.png", image()))
        assert settled(page, 5)[0] == "defect 0.82"


def test_answers_that_are_cut_off_are_asked_for_again(opened: Open, served: Served) -> None:
    page = opened()
    wait(page, "document.getElementById('model').textContent.startsWith('plates')")
    cut = {"/v1/predict": 1, "/v1/model": 2}

    def cut_off(route: Any) -> None:
        path = urlsplit(route.request.url).path
        cut[path] -= 1
        if cut[path] >= 0:
            route.fulfill(status=200, content_type="application/json", body='{"model": "pla')
        else:
            route.continue_()

    page.route("**/v1/*", cut_off)
    choose(page, file("a.png", image()))
    assert settled(page, 1) == ["defect 0.82"]
    page.wait_for_selector("#away", state="hidden")
    assert max(cut.values()) < 0


def test_the_token_is_asked_for_and_kept_for_the_tab(opened: Open, model: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef")
    with serving(config_of(model, token_file=tmp_path / "token")) as it:
        page = opened(it.port)
        page.fill("#secret", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#wrong:not([hidden])")
        page.fill("#secret", "0123456789abcdef")
        page.keyboard.press("Enter")
        wait(page, "document.getElementById('model').textContent.startsWith('plates')")
        assert not page.is_visible("#token")
        choose(page, file("a.png", image()))
        assert settled(page, 1) == ["defect 0.82"]
        page.reload()
        wait(page, "document.getElementById('model').textContent.startsWith('plates')")
        assert page.evaluate("[document.cookie, localStorage.length]") == ["", 0]
        other = opened(it.port)
        other.wait_for_selector("#token[open]")


def test_a_name_is_never_html(opened: Open) -> None:
    page = opened()
    choose(page, file(SCRIPT_NAME, image()), file(f"b{SCRIPT_NAME}", b"no image"))
    settled(page, 2)
    assert page.text_content("#name") == SCRIPT_NAME
    assert SCRIPT_NAME in page.text_content("#strip")
    assert page.locator("img[src=x]").count() == 0


def test_a_format_that_browsers_do_not_know_is_shown_by_the_server(opened: Open, served: Served) -> None:
    """It is shown at its full size, as any other image, and its verdict is counted once."""
    height, width = 40, 1700
    tiff = io.BytesIO()
    Image.fromarray(patchwork(height, width, seed=DEFECT)).save(tiff, "TIFF")
    every = served.predict(tiff.getvalue(), "?min_score=0").json["images"][0]["instances"]
    page = opened()
    before = sum(served.metric("flawmask_verdicts_total", model="plates", verdict=one) for one in ("good", "defect"))
    choose(page, file("a.tif", tiff.getvalue()))
    settled(page, 1)
    wait(page, f"document.getElementById('picture').naturalWidth === {width}")
    assert page.is_visible("#picture")
    for threshold in (0.5, 0.7, 0.9):
        slide(page, threshold)
        assert drawn(page) == sum(one["score"] >= threshold for one in every)
    assert Image.open(io.BytesIO(downloaded(page, "png"))).size == (width, height)
    after = sum(served.metric("flawmask_verdicts_total", model="plates", verdict=one) for one in ("good", "defect"))
    assert after == before + 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 820, 1280])
def test_nothing_is_wider_than_the_screen_and_all_text_can_be_read(opened: Open, width: int, scheme: str) -> None:
    """WCAG 2.2, AA: a contrast of at least 4.5 between each text and what is behind it."""
    page = opened(width=width, height=800, color_scheme=scheme)
    choose(page, file("a.png", image()), file("b.png", image(GOOD)), file("c.png", b"no image"))
    settled(page, 3)
    slide(page, 0.6)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    texts = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter(one => one.checkVisibility()
            && !one.closest("svg, dialog, :disabled")
            && [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())).map(one => {
          let behind = one;
          while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
          return [one.textContent, getComputedStyle(one).color, getComputedStyle(behind).backgroundColor];
        })"""
    )
    assert len(texts) > 20
    for text, ink, ground in texts:
        one, other = (luminance(*map(float, re.findall(r"[\d.]+", colour)[:3])) for colour in (ink, ground))
        assert contrast(one, other) >= 4.5, text


def test_two_fingers_zoom_on_a_phone(opened: Open) -> None:
    page = opened(width=390, height=844, has_touch=True, is_mobile=True, device_scale_factor=2)
    choose(page, file("a.png", image(DEFECT, *SIZE)))
    settled(page, 1)
    before = zoomed(page)[0]
    frame = page.locator("#viewer").bounding_box()
    x, y = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    touch = page.context.new_cdp_session(page)

    def fingers(kind: str, apart: float) -> None:
        points = [{"x": x - apart, "y": y, "id": 1}, {"x": x + apart, "y": y, "id": 2}] if apart else []
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    fingers("touchStart", 20)
    for apart in range(25, 90, 5):
        fingers("touchMove", apart)
    fingers("touchEnd", 0)
    assert zoomed(page)[0] > 2 * before


def test_docs_are_shown_without_another_server(opened: Open) -> None:
    page = opened(path="/docs")
    page.wait_for_selector("[data-path='/v1/predict']")
    assert page.locator(".opblock").count() >= 4
    assert page.evaluate("getComputedStyle(document.querySelector('.opblock-summary-method')).backgroundColor") != ""
