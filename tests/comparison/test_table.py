"""The table's cells."""

from flawmask.comparison.entry import Entry, TrainingSummary
from flawmask.comparison.table import Column, markdown, rows

LEARNED = TrainingSummary(
    seconds=3725.4, epochs=12, image_size=320, parameters=44_396_123, protocol="learns", peak_bytes=2_512_000_000
)
SPEED = {
    "1": {"median": 0.12345, "p99": 0.5, "rounds": 50},
    "8": {"median": 0.0101, "p99": 0.02, "rounds": 6},
}
METRICS = {"image_auroc": 0.98765, "recall": 0.0, "mask_ap": None, "intervals": {"image_auroc": [0.9, 1.0]}}


def cells(column: Column) -> dict[str, str]:
    return dict(rows([column]))  # type: ignore[arg-type]


def test_a_metric_has_its_interval_and_an_undefined_one_reads_na_and_never_0() -> None:
    found = cells(Column(Entry("a", learned=LEARNED, checkpoint_bytes=9_049_000), METRICS, SPEED))
    assert found["Result"] == "evaluated"
    assert found["Image AUROC"].replace("\u00a0", " ") == "98.8 % (90.0\u2013100.0 %)"
    assert found["Recall"].replace("\u00a0", " ") == "0.0 %"
    assert found["Mask AP"] == found["Box AP"] == found["Pixel AUPRO"] == "n/a"


def test_costs_have_the_units_of_their_labels() -> None:
    found = cells(Column(Entry("a", learned=LEARNED, checkpoint_bytes=9_049_000), METRICS, SPEED))
    assert found["Parameters, million"] == "44.4"
    assert found["Checkpoint, MB"] == "9.0"
    assert found["Training time"] == "62 min 05 s"
    assert found["Peak memory, MB"] == "2512"
    assert found["Seconds per image, median"] == "0.123"
    assert found["Seconds per image, p99"] == "0.5 (of 50)"
    assert found["Seconds per image in batches of 8, median"] == "0.0101"
    assert (found["Image size, pixels"], found["Epochs"]) == ("320", "12")


def test_a_model_that_failed_says_why_and_has_na_in_every_other_row() -> None:
    found = cells(Column(Entry("a", reason="memory ran out", failed=True), {}, {}))
    assert found.pop("Result") == "failed: memory ran out"
    assert set(found.values()) == {"n/a"}
    left_out = cells(Column(Entry("a", reason=80 * "x"), {}, {}))
    assert left_out["Result"] == f"n/a: {59 * 'x'}\u2026"


def test_markdown_has_a_line_per_row_and_no_cell_breaks_it() -> None:
    assert markdown(("", "a|b"), [("Recall", "50 %")]).splitlines() == [
        "|  | a\\|b |",
        "| --- | ---: |",
        "| Recall | 50 % |",
    ]
