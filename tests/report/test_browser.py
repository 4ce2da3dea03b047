"""The report in a real browser: slider, filters and enlarging work, and 500 images open at once."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import chromium, contrast, luminance

from flawmask.coco import read_split
from flawmask.files import read_json, write_json
from flawmask.masks import decode
from flawmask.report import many
from flawmask.report.report import write_report
from report.made import make_dataset, make_run

pytestmark = pytest.mark.services

MIN_AREA = 60
PATIENCE_MS = 60_000  # for 500 images on a machine that does other things too; alone it takes less than a second


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Results with a report, made with a least area that some detections do not reach."""
    made = make_run(tmp_path_factory.mktemp("evaluated") / "run", dataset, min_area=MIN_AREA, seed=3)
    write_report(made)
    return made


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """A function that opens a page. Any error on the page fails the test."""
    complaints: list[str] = []
    contexts = []

    def go(path: Path, width: int = 1280, height: int = 900, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked_for.append(request.url))
        page.goto(path.as_uri())
        return page

    asked_for: list[str] = []
    yield go
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url[:60] for url in asked_for if not url.startswith(("file:", "data:"))] == []


def tally(results: Path, threshold: float) -> dict[str, str]:
    """The outcome of each image at a threshold, computed from the files."""
    metrics = read_json(results / "metrics.json")
    split = read_split(Path(metrics["dataset"]), "val")
    rejected = {
        record["image_id"]
        for record in read_json(results / "predictions.json")
        if record["category_id"] == 2
        and record["score"] >= threshold
        and decode(record["segmentation"], 96, 96).sum() >= metrics["min_area"]
    }
    outcomes = {}
    for image in split.images:
        truth, verdict = split.is_defective(image), image["id"] in rejected
        outcomes[image["file_name"]] = "Right" if truth == verdict else "Missed" if truth else "False alarm"
    return outcomes


def said_of(results: Path, threshold: float) -> str:
    """What the page says about a threshold."""
    outcomes = tally(results, threshold)
    truth = {name: not name.startswith("good") for name in outcomes}
    fn = sum(outcome == "Missed" for outcome in outcomes.values())
    fp = sum(outcome == "False alarm" for outcome in outcomes.values())
    defective = sum(truth.values())
    tp, good = defective - fn, len(truth) - defective

    def percent(part: int, whole: int) -> str:
        tenths = (2000 * part + whole) // (2 * whole) if whole else 0  # 56.25 reads 56.3
        return f"{tenths // 10}.{tenths % 10} %" if whole else "n/a"

    return (
        f"Finds {tp} of {defective} defective, rejects {fp} of {good} good. Precision {percent(tp, tp + fp)}, "
        f"recall {percent(tp, defective)}, F1 {percent(2 * tp, 2 * tp + fp + fn)}."
    )


def slide(page: Any, threshold: float) -> None:
    """Move the slider as a person does: an event while it moves, one when it is let go."""
    page.eval_on_selector(
        "#threshold",
        "(slider, value) => { slider.value = value; for (const name of ['input', 'change']) "
        "slider.dispatchEvent(new Event(name, { bubbles: true })); }",
        threshold,
    )


def cards(page: Any) -> dict[str, str]:
    """File and outcome of every card that is shown, in their order; all of them are brought into view."""
    for card in page.query_selector_all(".card:not([hidden])"):
        card.scroll_into_view_if_needed()
        card.wait_for_selector(".outcome")
    shown = page.eval_on_selector_all(
        ".card:not([hidden])",
        "cards => cards.map(card => [card.querySelector('.name span').textContent, "
        "card.querySelector('.outcome').textContent])",
    )
    return dict(shown)


def test_the_page_opens_with_the_verdict_of_the_results(results: Path, opened: Any) -> None:
    page = opened(results / "report.html")
    metrics = read_json(results / "metrics.json")
    assert page.text_content("#live") == said_of(results, 0.5)
    assert page.text_content("#live").startswith(f"Finds {metrics['tp_defect']} of ")
    assert page.text_content("#value") == "0.50"
    assert page.is_disabled("#reset")
    outcomes = cards(page)
    assert outcomes == tally(results, 0.5)
    assert [name == "Right" for name in outcomes.values()] == sorted(name == "Right" for name in outcomes.values())


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.31, 0.62, 0.8, 0.95, 1.0])
def test_the_slider_evaluates_every_image_again(results: Path, opened: Any, threshold: float) -> None:
    page = opened(results / "report.html")
    slide(page, threshold)
    expected = tally(results, threshold)
    assert page.text_content("#live") == said_of(results, threshold)
    assert cards(page) == expected
    shown = [name == "Right" for name in cards(page).values()]
    assert shown == sorted(shown)
    counts = {"Missed": "missed", "False alarm": "false_alarm", "Right": "right"}
    for name, key in counts.items():
        assert page.text_content(f"[data-count={key}]") == str(sum(one == name for one in expected.values()))
    page.click("#reset")
    assert page.text_content("#live") == said_of(results, 0.5)


def test_min_area_counts_on_the_page_too(results: Path, opened: Any) -> None:
    records = read_json(results / "predictions.json")
    small = [one for one in records if 0 < decode(one["segmentation"], 96, 96).sum() < MIN_AREA and one["score"] >= 0.3]
    assert small  # or the test would show nothing
    page = opened(results / "report.html")
    slide(page, 0.3)
    assert page.text_content("#live") == said_of(results, 0.3)


def test_outlines_follow_the_slider(results: Path, opened: Any) -> None:
    page = opened(results / "report.html")
    images = {one["file"]: one for one in json.loads(_data(results))["images"]}
    for threshold in (0.05, 0.5, 0.9):
        slide(page, threshold)
        cards(page)
        drawn = page.eval_on_selector_all(
            ".card", "cards => cards.map(card => [card.querySelector('.name span').textContent, "
            "card.querySelectorAll('.truth g').length, card.querySelectorAll('.found g').length])",
        )  # fmt: skip
        for file, truth, found in drawn:
            one = images[file]
            assert truth == len(one["outlines"])
            assert found == sum(each["score"] >= threshold and each["area"] >= MIN_AREA for each in one["found"])


def _data(results: Path) -> str:
    content = (results / "report.html").read_text(encoding="utf-8")
    return content.split('id="gallery-data">')[1].split("</script>")[0]


def test_filters_show_one_outcome_and_one_type(results: Path, opened: Any) -> None:
    page = opened(results / "report.html")
    slide(page, 0.75)
    expected = tally(results, 0.75)
    for key, name in (("missed", "Missed"), ("false_alarm", "False alarm"), ("right", "Right")):
        page.click(f".filters [data-outcome={key}]")
        assert cards(page) == {file: outcome for file, outcome in expected.items() if outcome == name}
        assert page.get_attribute(f".filters [data-outcome={key}]", "aria-pressed") == "true"
    page.click(".filters [data-outcome=all]")
    page.select_option("#type", "scratch")
    assert sorted(cards(page)) == sorted(file for file in expected if file.startswith("scratch"))
    page.click(".filters [data-outcome=false_alarm]")
    assert cards(page) == {}
    assert page.is_visible("#nothing")
    page.select_option("#type", "")
    slide(page, 1.0)
    assert cards(page) == {}
    slide(page, 0.0)
    assert set(cards(page).values()) == {"False alarm"}


def test_an_image_is_enlarged_by_click_and_walked_through_by_keyboard(results: Path, opened: Any) -> None:
    page = opened(results / "report.html")
    order = list(cards(page))
    page.click(f".card:has([title='{order[1]}'])")
    assert page.is_visible("#viewer")
    assert page.text_content("#viewer strong") == order[1]
    page.keyboard.press("ArrowRight")
    assert page.text_content("#viewer strong") == order[2]
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    assert page.text_content("#viewer strong") == order[0]
    page.keyboard.press("ArrowLeft")
    assert page.text_content("#viewer strong") == order[0]
    page.click("#viewer [aria-label^=Next]")
    page.keyboard.press("Enter")  # the button keeps the focus
    assert page.text_content("#viewer strong") == order[2]
    page.keyboard.press("Escape")
    assert not page.is_visible("#viewer")
    page.focus(f".card:has([title='{order[3]}'])")
    page.keyboard.press("Enter")
    assert page.text_content("#viewer strong") == order[3]
    page.click("#viewer [aria-label^=Close]")
    assert not page.is_visible("#viewer")


def test_the_enlarged_image_has_outlines_and_scores_that_can_be_hidden(results: Path, opened: Any) -> None:
    page = opened(results / "report.html")
    images = {one["file"]: one for one in json.loads(_data(results))["images"]}
    file = next(name for name, one in images.items() if sum(each["score"] >= 0.5 for each in one["found"]) > 1)
    cards(page)
    page.click(f".card:has([title='{file}'])")
    counted = [one for one in images[file]["found"] if one["area"] >= MIN_AREA and one["score"] >= 0.5]
    assert page.eval_on_selector_all("#viewer .found text", "all => all.map(one => one.textContent)") == [
        f"defect {one['score']:.2f}" for one in counted
    ]
    listed = page.eval_on_selector_all("#viewer li", "all => all.map(one => one.textContent)")
    assert len(listed) == len(images[file]["found"]) <= 8
    assert sum("below the threshold" in line for line in listed) == sum(
        one["score"] < 0.5 for one in images[file]["found"]
    )
    assert page.is_visible("#viewer .found g")
    page.keyboard.press("o")
    assert not page.is_visible("#viewer .found g")
    page.click("#viewer [aria-label^=Outlines]")
    assert page.is_visible("#viewer .found g")


def test_arrows_stay_within_what_the_filter_shows(results: Path, opened: Any) -> None:
    page = opened(results / "report.html")
    page.select_option("#type", "hole")
    shown = list(cards(page))
    assert len(shown) > 1
    page.click(f".card:has([title='{shown[0]}'])")
    seen = [page.text_content("#viewer strong")]
    for _ in shown:
        page.keyboard.press("ArrowRight")
        seen.append(page.text_content("#viewer strong"))
    assert seen == [*shown, shown[-1]]
    assert f"{len(shown)} of {len(shown)}" in page.text_content("#viewer .bar")


def test_a_listed_instance_opens_its_image(results: Path, opened: Any) -> None:
    page = opened(results / "report.html")
    link = page.query_selector("#instances [data-file]")
    link.click()
    assert page.text_content("#viewer strong") == link.get_attribute("data-file")


def test_a_limited_gallery_works_on_what_it_has(results: Path, opened: Any, tmp_path: Path) -> None:
    copy = tmp_path / "inference_val"
    shutil.copytree(results, copy)
    metrics = read_json(copy / "metrics.json")
    right = next(name for name, outcome in tally(results, 0.5).items() if outcome == "Right")
    instance = {"file": right, "annotation_id": 1, "bbox": [0, 0, 1, 1], "area": 1, "best_iou": 0.1}
    write_json(copy / "metrics.json", {**metrics, "missed_instances": [instance]})
    page = opened(write_report(copy, gallery_limit=1))
    assert len(cards(page)) == 1
    assert page.text_content("#live") == said_of(results, 0.5)
    assert page.is_disabled(f"#instances [data-file='{right}']")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 820, 1280])
def test_nothing_is_wider_than_the_screen(results: Path, opened: Any, width: int, scheme: str) -> None:
    page = opened(results / "report.html", width=width, color_scheme=scheme)
    cards(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.click(".card >> nth=0")
    assert page.eval_on_selector("#viewer", "viewer => viewer.scrollWidth <= viewer.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(results: Path, opened: Any, scheme: str) -> None:
    """WCAG 2.2's contrast of at least 4.5 between the page's text colours and its grounds."""
    page = opened(results / "report.html", color_scheme=scheme)
    colours = page.evaluate(
        "() => { const style = getComputedStyle(document.documentElement); "
        "return Object.fromEntries(['ink', 'soft', 'link', 'paper', 'panel'].map("
        "name => [name, style.getPropertyValue('--' + name).trim()])); }"
    )

    def bright(name: str) -> float:
        return luminance(*(int(colours[name][place : place + 2], 16) for place in (1, 3, 5)))

    for ink in ("ink", "soft", "link"):
        for ground in ("paper", "panel"):
            assert contrast(bright(ink), bright(ground)) >= 4.5, (ink, ground)


def test_print_shows_every_image_that_the_filter_shows(results: Path, opened: Any) -> None:
    page = opened(results / "report.html")
    page.click(".filters [data-outcome=right]")
    page.pdf()
    drawn = page.eval_on_selector_all(".card:not([hidden]) img", "all => all.length")
    assert drawn == 2 * sum(outcome == "Right" for outcome in tally(results, 0.5).values())


def test_500_images_open_at_once_and_stay_usable(
    opened: Any, tmp_path_factory: pytest.TempPathFactory, record_property: Any
) -> None:
    folder = tmp_path_factory.mktemp("many")
    results = make_run(folder / "run", make_dataset(folder / "drawn", count=500, size=512))
    path = write_report(results)
    page = opened(path)
    load = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    record_property("load_ms", load)
    record_property("megabytes", path.stat().st_size / 1e6)
    assert load < PATIENCE_MS
    assert len(page.query_selector_all(".card")) == 500
    page.eval_on_selector("#gallery", "gallery => gallery.scrollIntoView()")
    page.wait_for_selector(".card .outcome")
    assert 0 < len(page.query_selector_all(".card img")) < 200  # only what is near the screen has been drawn
    took = page.evaluate(
        "() => { const start = performance.now(); const slider = document.getElementById('threshold'); "
        "for (let at = 0; at < 20; at++) { slider.value = at / 20; "
        "slider.dispatchEvent(new Event('input', { bubbles: true })); } "
        "document.body.getBoundingClientRect(); return (performance.now() - start) / 20; }"
    )
    record_property("slider_ms", took)
    page.click("#reset")
    page.click(".filters [data-outcome=missed]")
    missed = int(page.text_content("[data-count=missed]"))
    assert missed == len(page.query_selector_all(".card:not([hidden])"))
    page.click(".card:not([hidden]) >> nth=0")
    for _ in range(missed):
        page.keyboard.press("ArrowRight")
    assert f"{missed} of {missed}" in page.text_content("#viewer .bar")


def test_of_many_detections_those_that_count_are_listed_and_the_others_counted(
    dataset: Path, opened: Any, tmp_path: Path
) -> None:
    results = make_run(tmp_path / "run", dataset)
    records = read_json(results / "predictions.json")
    first = next(one for one in records if one["category_id"] == 2)
    others = [one for one in records if one["image_id"] != first["image_id"]]
    scores = [0.9] * 11 + [0.3] * 4
    write_json(results / "predictions.json", [*others, *({**first, "score": score} for score in scores)])
    file = next(one["file_name"] for one in read_split(dataset, "val").images if one["id"] == first["image_id"])
    page = opened(write_report(results))
    cards(page)
    page.click(f".card:has([title='{file}'])")
    listed = page.eval_on_selector_all("#viewer li", "all => all.map(one => one.textContent)")
    assert listed == [*listed[:1] * 11, "4 more that do not count"]


def test_the_table_of_many_images_is_loaded_filtered_and_sorted(
    tmp_path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MANY": 20, "WORST": 12, "PART": 100}.items():
        monkeypatch.setattr(many, name, value)
    made = make_run(tmp_path / "run", make_dataset(tmp_path / "data", count=250), min_area=MIN_AREA, seed=3)
    page = opened(write_report(made))
    expected = said_of(made, 0.5)
    assert page.locator("#live").text_content() == expected
    page.locator("#threshold").evaluate("it => { it.value = 0.3; it.dispatchEvent(new Event('input')); }")
    assert page.locator("#live").text_content() == said_of(made, 0.3)
    assert page.locator("#cards .card").count() == 12
    page.locator("#load").click()
    count, shown = page.locator("#table-count"), page.locator("#table-rows tr")
    shown.first.wait_for(timeout=PATIENCE_MS)
    assert (count.text_content(), shown.count()) == ("1 to 100 of 250 of 250 images", 100)
    page.locator("#table-next").click()
    page.locator("#table-next").click()
    assert count.text_content() == "201 to 250 of 250 of 250 images"
    assert page.locator("#table-next").is_disabled()
    missed = [name for name, outcome in tally(made, 0.5).items() if outcome == "Missed"]
    page.locator("#table-outcome").select_option("2")
    page.get_by_text(f"1 to {len(missed)} of {len(missed)} of 250 images").wait_for(timeout=PATIENCE_MS)
    assert [row.locator("th").text_content() for row in shown.all()] == missed
    page.locator("#table-outcome").select_option("")
    page.locator("#table-order").select_option("falling")
    page.locator("#table-name").press_sequentially("SCRATCH")
    found = sum("scratch" in name for name in tally(made, 0.5))
    page.get_by_text(f"1 to {min(found, 100)} of {found} of 250 images").wait_for(timeout=PATIENCE_MS)
    scores = [float(row.locator("td").last.text_content()) for row in shown.all()]
    assert scores == sorted(scores, reverse=True)
    assert all("scratch" in row.locator("th").text_content() for row in shown.all())
