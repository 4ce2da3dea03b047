"""The table of metrics: each follows from the evidence and weights, and weights of 1 give the figure itself."""

import numpy as np
import pytest
from handmade_split import blob, instance, make_split, predicted, shaken

from flawmask.evaluation.measure import Evidence, gather, measure
from flawmask.evaluation.metrics import METRICS, values
from flawmask.report.headline import lookup


def evidence(seed: int, images: int = 12) -> Evidence:
    rng = np.random.default_rng(seed)
    truths = [[(3, blob(rng))] if at % 2 else [] for at in range(images)]
    found = [
        predicted(*(instance("crack", float(rng.random()), shaken(mask, rng)) for _, mask in [*truth, (3, blob(rng))]))
        for truth in truths
    ]
    return gather(make_split(truths), found, 0.5, 0)


@pytest.mark.parametrize("seed", range(5))
def test_weights_of_1_give_the_figure_itself(seed: int) -> None:
    case = evidence(seed)
    figures, weighted = (values(METRICS.values(), case, weights) for weights in (None, np.ones((3, 12))))
    assert set(figures) == set(METRICS)
    for key, drawn in weighted.items():
        group = METRICS[key].group
        if group == "verdicts" or (group == "ranking" and key != "confidence"):
            np.testing.assert_array_equal(drawn, np.repeat(figures[key], 3), err_msg=key)
        else:  # other sums, or for pixels scores in groups
            assert drawn == pytest.approx(np.repeat(figures[key], 3), abs=1e-3 if group == "pixels" else 1e-6), key


def test_only_what_is_asked_for_is_computed() -> None:
    case = evidence(0)
    assert list(values([METRICS["recall"], METRICS["image_auroc"]], case)) == ["recall", "image_auroc"]
    assert case.detections is not None
    assert not {"evaluations", "errors", "pixels"} & vars(case.detections).keys()


def test_scores_alone_give_the_metrics_of_images_and_no_others() -> None:
    found = values(METRICS.values(), Evidence(evidence(0).judged))
    assert {METRICS[key].group for key in found} == {"verdicts", "ranking"}
    assert "confidence" not in found


def test_every_metric_of_the_table_is_in_metrics_json() -> None:
    detections = evidence(1).detections
    assert detections is not None
    metrics = measure(detections.split, detections.predictions, 0.5, 0, resamples=20, seed=0).metrics
    for key, metric in METRICS.items():
        there, value = lookup(metrics, key)
        assert there, key
        assert isinstance(value, int) == (metric.shown == "count"), key
        assert metric.has_interval or key.replace(".", "_") not in metrics["intervals"], key
