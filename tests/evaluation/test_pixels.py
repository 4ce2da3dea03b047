"""Pixel-level metrics, checked against scikit-learn and against slow versions written from the definitions."""

import itertools
import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from flawmask.errors import FlawmaskError
from flawmask.evaluation import pixels
from flawmask.evaluation.pixels import PixelTally
from flawmask.masks import Mask

Scores = npt.NDArray[np.float32]
Image = tuple[Scores, Mask]
RATES = ("pixel_auroc", "pixel_ap", "pixel_aupro", "pixel_aupro_05", "pixel_f1_max")


def tallied(images: Sequence[Image], threshold: float = 0.5) -> PixelTally:
    tally = PixelTally()
    for at, (scores, truth) in enumerate(images):
        tally.add(f"{at}.png", scores, truth, scores >= threshold)
    return tally


def flat(images: Sequence[Image]) -> tuple[Scores, Mask]:
    return np.concatenate([scores.ravel() for scores, _ in images]), np.concatenate(
        [mask.ravel() for _, mask in images]
    )


def share_from(values: Scores, thresholds: Scores) -> npt.NDArray[np.float64]:
    """The share of values that are at or above each threshold."""
    return 1 - np.searchsorted(np.sort(values), thresholds, side="left") / len(values)


def reference_aupro(images: Sequence[Image], limit: float) -> float:
    """AUPRO as the paper words it: at each threshold the mean share of each region that is covered, over the share of
    good pixels that are; the area up to the limit, where the curve is cut between two thresholds, over the limit.
    """
    regions: list[Scores] = []
    for scores, truth in images:
        labels, count = ndimage.label(truth, np.ones((3, 3)))
        regions += [scores[labels == at] for at in range(1, count + 1)]
    everything, truths = flat(images)
    good = everything[~truths]
    thresholds = np.unique(everything)[::-1]
    overlap = np.mean([share_from(region, thresholds) for region in regions], axis=0)
    curve = [(0.0, 0.0), *zip(share_from(good, thresholds), overlap, strict=True)]
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x1 > limit:
            cut = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            return float((area + (limit - x0) * (y0 + cut) / 2) / limit)
        area += (x1 - x0) * (y0 + y1) / 2
    return float(area / limit)


def blobs(random: np.random.Generator, shape: tuple[int, int], share: float = 0.05) -> Mask:
    noise = ndimage.gaussian_filter(random.random(shape), 2)
    return np.asarray(noise > np.quantile(noise, 1 - share))


def uniform(random: np.random.Generator, truth: Mask) -> Scores:
    return (0.3 * truth + 0.7 * random.random(truth.shape)).astype(np.float32)


def tied(random: np.random.Generator, truth: Mask) -> Scores:
    return (random.integers(0, 5, truth.shape) / 8 + truth * random.integers(0, 4, truth.shape) / 8).astype(np.float32)


def sparse(random: np.random.Generator, truth: Mask) -> Scores:
    boxes = ndimage.binary_dilation(truth, iterations=2) & (random.random(truth.shape) < 0.8)
    return np.where(boxes, uniform(random, truth), 0).astype(np.float32)


def near_one(random: np.random.Generator, truth: Mask) -> Scores:
    return (1 - 1e-3 * (1 - uniform(random, truth).astype(np.float64))).astype(np.float32)


def tiny(random: np.random.Generator, truth: Mask) -> Scores:
    return (uniform(random, truth) * 1e-30).astype(np.float32)


def in_one_place(random: np.random.Generator, truth: Mask) -> Scores:
    """Neighbouring floats around 0.3, like the scores inside one instance."""
    steps = random.integers(0, 40, truth.shape) + 20 * truth
    return (np.float32(0.3).view(np.uint32) + steps.astype(np.uint32)).view(np.float32)


def wrong_way_round(random: np.random.Generator, truth: Mask) -> Scores:
    return np.asarray(1 - uniform(random, truth), dtype=np.float32)


KINDS = (uniform, tied, sparse, near_one, tiny, in_one_place, wrong_way_round)


def images_of(kind: Callable[[np.random.Generator, Mask], Scores], seed: int, count: int = 4) -> list[Image]:
    """Images of different sizes, the first without a defect."""
    random = np.random.default_rng(seed)
    truths = [np.zeros((30, 50), dtype=bool)] + [blobs(random, (40 + at, 60 - 3 * at)) for at in range(1, count)]
    return [(kind(random, truth), truth) for truth in truths]


def assert_right(images: Sequence[Image], within: float) -> None:
    figures = tallied(images).figures()
    scores, truth = flat(images)
    assert figures["pixel_auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=within)
    assert figures["pixel_ap"] == pytest.approx(average_precision_score(truth, scores), abs=within)
    assert figures["pixel_aupro"] == pytest.approx(reference_aupro(images, 0.3), abs=within)
    assert figures["pixel_aupro_05"] == pytest.approx(reference_aupro(images, 0.05), abs=within)
    precision, recall, thresholds = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    assert figures["pixel_f1_max"] == pytest.approx(f1.max(), abs=within)
    best = figures["pixel_f1_max_threshold"]
    assert best is not None
    reached = f1[:-1][int(np.searchsorted(thresholds, best))]
    assert reached == pytest.approx(f1.max(), abs=within)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_figures_are_scikit_learns_and_the_papers(kind: Callable[..., Scores], seed: int) -> None:
    assert_right(images_of(kind, seed), within=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not in_one_place])
def test_with_too_many_scores_for_exact_counts_metrics_are_off_by_less_than_a_ten_thousandth(
    kind: Callable[..., Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "EXACT_SCORES", 15)
    images = images_of(kind, seed=5)
    assert (tallied(images)._table is None) == (kind is tied)
    assert_right(images, within=1e-4)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_iou_and_dice_are_those_of_all_pixels_together(threshold: float) -> None:
    images = images_of(uniform, seed=1)
    figures = tallied(images, threshold).figures()
    scores, truth = flat(images)
    predicted = scores >= threshold
    both, either = (predicted & truth).sum(), (predicted | truth).sum()
    assert figures["pixel_iou"] == pytest.approx(both / either)
    assert figures["pixel_dice"] == pytest.approx(2 * both / (predicted.sum() + truth.sum()))


def test_f1_max_is_the_best_of_all_thresholds_and_its_threshold_the_highest_that_reaches_it() -> None:
    images = images_of(tied, seed=2)
    scores, truth = flat(images)
    f1 = {}
    for threshold in np.unique(scores):
        predicted = scores >= threshold
        f1[float(threshold)] = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
    figures = tallied(images).figures()
    assert figures["pixel_f1_max"] == pytest.approx(max(f1.values()))
    best = [threshold for threshold, value in f1.items() if value == max(f1.values())]
    assert figures["pixel_f1_max_threshold"] == max(best)


def test_with_a_perfect_score_map_every_metric_is_1() -> None:
    images = [(truth.astype(np.float32) * 0.8, truth) for _, truth in images_of(uniform, seed=3)]
    figures = tallied(images).figures()
    assert figures.pop("pixel_f1_max_threshold") == np.float32(0.8)
    assert set(figures.values()) == {1.0}


def test_aupro_of_a_hand_worked_case() -> None:
    """Two regions, of 1 and 3 pixels, and 4 good pixels. The first is found, then a good pixel, then the rest."""
    truth = np.array([[1, 0, 0, 0, 0, 1, 1, 1]], dtype=bool)
    scores = np.array([[0.9, 0.8, 0.0, 0.0, 0.0, 0.7, 0.7, 0.7]], dtype=np.float32)
    figures = tallied([(scores, truth)]).figures()
    assert figures["pixel_aupro"] == pytest.approx((0.25 * 0.5 + 0.05 * 1) / 0.3)
    assert figures["pixel_aupro_05"] == pytest.approx(0.5)


def test_pixels_that_touch_by_a_corner_are_one_region() -> None:
    truth = np.array([[1, 0, 0, 0], [0, 1, 1, 1]], dtype=bool)
    scores = np.array([[0.9, 0, 0, 0], [0, 0, 0, 0]], dtype=np.float32)
    curve = tallied([(scores, truth)]).curves()["pro"]
    assert max(y for x, y in zip(curve["x"], curve["y"], strict=True) if x == 0) == 0.25


def test_an_undefined_metric_is_none_and_has_no_curve() -> None:
    scores = np.random.default_rng(0).random((5, 6), dtype=np.float32)
    nothing, everything = np.zeros((5, 6), dtype=bool), np.ones((5, 6), dtype=bool)
    for tally in (PixelTally(), tallied([(scores, nothing)])):
        assert set(tally.figures().values()) == {None}
        assert tally.curves() == {}
    all_defect = tallied([(scores, everything)])
    figures = all_defect.figures()
    assert [figures[name] for name in RATES[:4]] == [None, 1.0, None, None]
    assert figures["pixel_f1_max"] == 1.0
    assert figures["pixel_f1_max_threshold"] == scores.min()
    assert list(all_defect.curves()) == ["pixel_pr"]
    missed = tallied([(np.zeros_like(scores), scores > 0.5)]).figures()
    assert missed["pixel_iou"] == missed["pixel_dice"] == 0.0
    assert missed["pixel_auroc"] == 0.5


@pytest.mark.parametrize("value", [np.nan, 1.001, -0.001, np.inf])
def test_an_invalid_score_is_refused_with_the_images_name(value: float) -> None:
    scores = np.full((4, 7), 0.5, dtype=np.float32)
    scores[2, 3] = value
    mask = np.zeros((4, 7), dtype=bool)
    with pytest.raises(FlawmaskError, match=r"part_7\.png: pixel scores reach from .* between 0 and 1"):
        PixelTally().add("part_7.png", scores, mask, mask)


@pytest.mark.parametrize(("true", "predicted"), [((4, 8), (4, 7)), ((4, 7), (7, 4))])
def test_a_mask_of_another_size_is_refused_with_the_images_name(
    true: tuple[int, int], predicted: tuple[int, int]
) -> None:
    scores = np.zeros((4, 7), dtype=np.float32)
    with pytest.raises(FlawmaskError, match=r"part_7\.png: the (true|predicted) mask is .* but the score map is 7x4"):
        PixelTally().add("part_7.png", scores, np.zeros(true, dtype=bool), np.zeros(predicted, dtype=bool))


def test_a_refused_image_leaves_no_trace() -> None:
    images = images_of(sparse, seed=4)
    tally = tallied(images)
    mask = np.zeros((4, 7), dtype=bool)
    with pytest.raises(FlawmaskError):
        tally.add("bad.png", np.full((4, 7), 2, dtype=np.float32), mask, mask)
    assert tally.figures() == tallied(images).figures()
    assert tally.resampled(np.ones((1, len(images))))["pixel_ap"].shape == (1,)


def test_minus_zero_is_zero() -> None:
    (scores, truth), *_ = images_of(sparse, seed=4)[1:]
    assert (
        tallied([(np.where(scores == 0, np.float32(-0.0), scores), truth)]).figures()
        == tallied([(scores, truth)]).figures()
    )


def test_memory_does_not_grow_with_the_number_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of an image is much less than its pixels, and does not depend on its size."""
    monkeypatch.setattr(pixels, "EXACT_SCORES", 10_000)
    monkeypatch.setattr(pixels, "COARSE_BITS", 14)
    monkeypatch.setattr(pixels, "SCORE_BINS", 100)
    random = np.random.default_rng(0)
    tally, held = PixelTally(), []
    truth = blobs(random, (200, 200))
    tracemalloc.start()
    try:
        for at in range(24):
            tally.add(f"{at}.png", uniform(random, truth), truth, truth)
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[-1] - held[3] < 20 * truth.size * 4 / 10


@st.composite
def splits(draw: st.DrawFn) -> list[Image]:
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels = draw(st.integers(1, 50))
    images = []
    for _ in range(draw(st.integers(1, 5))):
        shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
        scores = (random.integers(0, levels + 1, shape) / levels).astype(np.float32)
        images.append((scores, random.random(shape) < draw(st.sampled_from([0.0, 0.2, 1.0]))))
    return images


def assert_same(ours: dict[str, float | None], theirs: dict[str, float | None]) -> None:
    assert ours == pytest.approx(theirs, abs=1e-12)


@settings(deadline=None)
@given(splits(), st.randoms(use_true_random=False), st.sampled_from([1, 20, 10**6]))
def test_the_order_of_images_does_not_matter(images: list[Image], random: object, exact: int) -> None:
    shuffled = images.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "EXACT_SCORES", exact)
        assert_same(tallied(shuffled).figures(), tallied(images).figures())


@settings(deadline=None)
@given(splits(), st.sampled_from([1, 20, 10**6]))
def test_computing_metrics_between_images_does_not_matter(images: list[Image], exact: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "EXACT_SCORES", exact)
        asked = PixelTally()
        for at, (scores, truth) in enumerate(images):
            asked.add(f"{at}.png", scores, truth, scores >= 0.5)
            asked.figures()
        assert_same(asked.figures(), tallied(images).figures())


@settings(deadline=None)
@given(splits())
def test_an_image_cut_in_two_between_regions_counts_as_the_whole(images: list[Image]) -> None:
    """A row of good pixels with score 0 separates the halves, so that no region is cut."""
    halves = [
        (np.pad(scores, ((0, 1), (0, 9 - scores.shape[1]))), np.pad(truth, ((0, 1), (0, 9 - truth.shape[1]))))
        for scores, truth in images
    ]
    whole = [(np.concatenate([scores for scores, _ in halves]), np.concatenate([truth for _, truth in halves]))]
    assert_same(tallied(whole).figures(), tallied(halves).figures())


def test_curves_have_few_points_and_go_through_the_true_ones() -> None:
    images = images_of(uniform, seed=6)
    curves = tallied(images).curves()
    scores, truth = flat(images)
    assert set(curves) == {"pixel_roc", "pixel_pr", "pro"}
    assert all(20 < len(curve["x"]) == len(curve["y"]) <= 200 for curve in curves.values())
    rate, recall, _ = roc_curve(truth, scores, drop_intermediate=False)
    true_points = set(zip(rate.tolist(), recall.tolist(), strict=True))
    assert all(point in true_points for point in zip(*curves["pixel_roc"].values(), strict=True))
    assert (curves["pixel_roc"]["x"][0], curves["pixel_roc"]["y"][0]) == (0, 0)
    assert (curves["pixel_roc"]["x"][-1], curves["pixel_roc"]["y"][-1]) == (1, 1)
    assert curves["pixel_pr"]["x"][-1] == 1
    assert curves["pixel_pr"]["y"][-1] == pytest.approx(truth.mean())
    area = float(np.trapezoid(curves["pro"]["y"], curves["pro"]["x"])) / 0.3
    assert area == pytest.approx(reference_aupro(images, 0.3), abs=2e-3)
    assert curves["pro"]["x"][-1] == 0.3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [150, 2048])
def test_with_all_weights_1_resampled_figures_are_the_figures(
    kind: Callable[..., Scores], groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer score bins replace more pixels, which would take too long."""
    monkeypatch.setattr(pixels, "SCORE_BINS", groups)
    images = images_of(kind, seed=7, count=9)
    tally = tallied(images)
    figures = tally.figures()
    figures.pop("pixel_f1_max_threshold")
    resampled = tally.resampled(np.ones((2, len(images)), dtype=int))
    within = 1e-3 if groups == 2048 else 1e-2
    assert {name: values[1] for name, values in resampled.items()} == pytest.approx(figures, abs=within)


@pytest.mark.parametrize("kind", [sparse, uniform, tied])
def test_resampled_figures_are_those_of_the_resampled_images(kind: Callable[..., Scores]) -> None:
    images = images_of(kind, seed=8, count=6)
    weights = np.random.default_rng(0).multinomial(6, [1 / 6] * 6, size=70)
    resampled = tallied(images).resampled(weights)
    assert all(values.shape == (70,) for values in resampled.values())
    for at in (0, 1, 64, 69):
        drawn = [image for image, count in zip(images, weights[at], strict=True) for _ in range(count)]
        figures = tallied(drawn).figures()
        figures.pop("pixel_f1_max_threshold")
        assert {name: values[at] for name, values in resampled.items()} == pytest.approx(figures, abs=1e-3)


def test_metrics_of_a_resample_without_a_defect_are_undefined() -> None:
    images = images_of(uniform, seed=9, count=3)
    resampled = tallied(images).resampled(np.array([[3, 0, 0], [0, 1, 1]]))
    assert all(np.isnan(values[0]) and not np.isnan(values[1]) for values in resampled.values())


def test_images_without_scores_have_the_overlap_of_their_masks_and_nothing_else() -> None:
    random = np.random.default_rng(5)
    with_scores, masks_alone = PixelTally(), PixelTally()
    for at in range(7):
        truth, predicted = random.random((2, 20, 30)) < 0.3
        with_scores.add(f"{at}.png", random.random((20, 30), dtype=np.float32), truth, predicted)
        masks_alone.add_masks(
            *(int(part.sum()) for part in (truth & predicted, predicted & ~truth, truth & ~predicted))
        )
    weights = random.multinomial(7, np.full(7, 1 / 7), size=5)
    figures, resampled = masks_alone.figures(), masks_alone.resampled(weights)
    for key in ("pixel_iou", "pixel_dice"):
        assert figures.pop(key) == with_scores.figures()[key]
        assert np.array_equal(resampled.pop(key), with_scores.resampled(weights)[key])
    assert set(figures.values()) == {None}
    assert not resampled
    assert masks_alone.curves() == {}
