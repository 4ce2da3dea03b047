"""One image in, its instances out: torchvision's masks to the pixel, at the image's own size, every time the same."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_network import SPEC, detect, infer, network, network_of, patchwork, tensors_of, torchvision_finds
from torchvision.models.detection.roi_heads import paste_masks_in_image

from flawmask.errors import FlawmaskError, ImageError
from flawmask.images import write_png
from flawmask.inference.backend import check_classes
from flawmask.inference.predictor import Predictor
from flawmask.inference.torch_backend import downloaded, uploaded
from flawmask.masks import Mask, box_of, to_rle
from flawmask.model import checkpoint
from flawmask.model.build import detector_of
from flawmask.prediction import Instance, Prediction, Verdict, post_process


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best.pt"
    checkpoint.save(path, network(), SPEC)
    return path


def instance(label: str, score: float, mask: Mask) -> Instance:
    x, y, width, height = box_of(mask)
    return Instance(
        label, score, (float(x), float(y), float(x + width), float(y + height)), to_rle(mask), int(mask.sum())
    )


def rectangle(y: int, x: int, height: int, width: int) -> Mask:
    mask = np.zeros((20, 30), dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


GOOD = instance("good", 0.99, rectangle(0, 0, 20, 30))
CRACK = instance("crack", 0.8, rectangle(2, 3, 4, 5))  # 20 pixels
SCRATCH = instance("scratch", 0.6, rectangle(10, 0, 1, 30))  # 30 pixels
SPECK = instance("crack", 0.3, rectangle(5, 7, 1, 1))  # on the crack
PREDICTION = Prediction(20, 30, (GOOD, CRACK, SCRATCH, SPECK))


def test_an_instance_gives_its_mask_at_the_images_size() -> None:
    assert (CRACK.mask == rectangle(2, 3, 4, 5)).all()


@pytest.mark.parametrize(
    ("conf", "min_area", "expected"),
    [
        (0.0, 0, [CRACK, SCRATCH, SPECK]),
        (0.3, 0, [CRACK, SCRATCH, SPECK]),
        (0.31, 0, [CRACK, SCRATCH]),
        (0.6, 0, [CRACK, SCRATCH]),
        (0.61, 0, [CRACK]),
        (0.81, 0, []),
        (0.0, 20, [CRACK, SCRATCH]),
        (0.0, 21, [SCRATCH]),
        (0.7, 21, []),
    ],
)
def test_defects_score_at_least_conf_and_cover_at_least_min_area(
    conf: float, min_area: int, expected: list[Instance]
) -> None:
    assert PREDICTION.defects(conf, min_area) == expected
    assert PREDICTION.verdict(conf, min_area).is_defect == bool(expected)


def test_the_score_of_an_image_is_its_best_defects_whatever_conf_and_of_those_large_enough() -> None:
    assert PREDICTION.verdict(0.9) == Verdict(is_defect=False, score=0.8)
    assert PREDICTION.verdict(0.5, min_area=25).score == 0.6
    assert PREDICTION.verdict(0.5, min_area=999).score == 0.0


def test_the_class_good_takes_no_part_in_the_verdict_and_the_mask() -> None:
    only_good = Prediction(20, 30, (GOOD,))
    assert not only_good.verdict(0.0).is_defect
    assert only_good.verdict().score == 0.0
    assert not only_good.defect_mask(0.0).any()
    assert only_good.within(rectangle(0, 0, 1, 1)).instances == (GOOD,)


def test_the_defect_mask_is_the_union_of_the_defects_that_count() -> None:
    assert (PREDICTION.defect_mask() == (CRACK.mask | SCRATCH.mask)).all()
    assert (PREDICTION.defect_mask(0.7) == CRACK.mask).all()
    assert (PREDICTION.defect_mask(0.0, 25) == SCRATCH.mask).all()


@pytest.mark.parametrize(("conf", "min_area"), [(0.5, 0), (0.0, 0), (0.7, 0), (0.0, 25), (0.9, 0)])
def test_the_defect_area_is_that_of_the_defect_mask(conf: float, min_area: int) -> None:
    assert PREDICTION.defect_area(conf, min_area) == PREDICTION.defect_mask(conf, min_area).sum()


def test_a_region_cuts_defects_and_drops_those_outside() -> None:
    cut = PREDICTION.within(rectangle(0, 0, 20, 5))  # the five columns on the left
    assert [(one.label, one.area, one.box) for one in cut.defects()] == [
        ("crack", 8, (3.0, 2.0, 5.0, 6.0)),
        ("scratch", 5, (0.0, 10.0, 5.0, 11.0)),
    ]
    assert (cut.defect_mask(0.0) == (PREDICTION.defect_mask(0.0) & rectangle(0, 0, 20, 5))).all()
    assert not PREDICTION.within(rectangle(18, 0, 1, 1)).verdict(0.0).is_defect


def test_a_region_of_another_size_is_refused() -> None:
    with pytest.raises(FlawmaskError, match="is 20x30 but the image is 30x20"):
        PREDICTION.within(np.ones((30, 20), dtype=bool))


@pytest.mark.parametrize("size", [(64, 64), (90, 50), (31, 200), (300, 260)])
def test_results_are_at_the_images_own_size(size: tuple[int, int]) -> None:
    height, width = size
    prediction = detect(network(), SPEC, patchwork(height, width))
    assert (prediction.height, prediction.width) == size
    assert prediction.instances
    assert max(one.box[2] for one in prediction.instances) > 0.7 * width
    assert max(one.box[3] for one in prediction.instances) > 0.7 * height
    for one in prediction.instances:
        assert one.mask.shape == size
        assert one.mask.sum() == one.area
        assert 0 <= one.box[0] < one.box[2] <= width
        assert 0 <= one.box[1] < one.box[3] <= height
        assert one.label in SPEC.classes
        assert 0.05 < one.score <= 1
    scores = [one.score for one in prediction.instances]
    assert scores == sorted(scores, reverse=True)


def test_masks_are_those_of_torchvisions_forward() -> None:
    pixels = patchwork(90, 120)
    found = torchvision_finds(network(), SPEC, pixels)
    prediction = detect(network(), SPEC, pixels)
    assert len(prediction.instances) == len(found["scores"]) > 5
    for one, at in zip(prediction.instances, torch.argsort(found["scores"], descending=True, stable=True), strict=True):
        assert one.score == float(found["scores"][at])
        assert one.box == tuple(found["boxes"][at].tolist())
        probabilities = found["masks"][at, 0].numpy()
        different = one.mask != (probabilities > 0.5)
        assert (np.abs(probabilities[different] - 0.5) < 4e-6).all()


def test_the_score_map_is_the_highest_score_times_probability_that_torchvision_pastes() -> None:
    pixels = patchwork(70, 90)
    (raw,) = infer(network(), SPEC, [pixels])
    prediction, found = post_process(raw, SPEC.classes, 70, 90), tensors_of(raw)
    pasted = paste_masks_in_image(found["masks"][:, None], found["boxes"], (70, 90))[:, 0]
    defects = found["labels"] > 1  # 1 is good
    assert defects.sum() > 3
    expected = (pasted[defects] * found["scores"][defects][:, None, None]).amax(dim=0).numpy()
    scores = prediction.score_map()
    assert scores.shape == (70, 90)
    assert scores.dtype == np.float32
    assert np.abs(scores - expected).max() < 1e-6
    small = prediction.score_map(min_area=10**6)
    assert (small == 0).all()


def test_a_mask_of_which_no_more_is_known_has_its_score_all_over() -> None:
    scores = PREDICTION.score_map()
    assert np.allclose(scores[CRACK.mask], 0.8)
    assert np.allclose(scores[SCRATCH.mask], 0.6)
    assert (scores[~(CRACK.mask | SCRATCH.mask)] == 0).all()


def test_a_cut_instance_counts_inside_the_region_only() -> None:
    region = np.zeros((70, 90), dtype=bool)
    region[:, :45] = True
    scores = detect(network(), SPEC, patchwork(70, 90)).within(region).score_map()
    assert (scores[:, 45:] == 0).all()
    assert scores.max() > 0


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((20, 30), np.uint8),
        np.zeros((20, 30, 4), np.uint8),
        np.zeros((3, 20, 30), np.uint8),
        np.zeros((20, 30, 3), np.float32),
        np.zeros((20, 30, 3), np.uint16),
    ],
)
def test_an_array_that_is_no_rgb_image_is_refused_with_what_is_expected(model_path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"\(height, width, 3\) uint8 RGB, not \("):
        Predictor(model_path, "cpu")(wrong)


def test_images_of_one_size_are_judged_together_as_they_are_one_by_one() -> None:
    batch = [patchwork(60, 90, seed) for seed in range(3)]
    together = [post_process(found, SPEC.classes, 60, 90) for found in infer(network(), SPEC, batch)]
    assert sum(len(one.instances) for one in together) > 10
    for one, pixels in zip(together, batch, strict=True):
        assert_same(one, detect(network(), SPEC, pixels))


def assert_same(one: Prediction, other: Prediction) -> None:
    """Sums in another order end in other digits; masks do not change by them here."""
    assert [(each.label, each.rle) for each in one.instances] == [(each.label, each.rle) for each in other.instances]
    for mine, theirs in zip(one.instances, other.instances, strict=True):
        assert mine.score == pytest.approx(theirs.score, abs=1e-5)
        assert mine.box == pytest.approx(theirs.box, abs=1e-3)


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0]])
@pytest.mark.parametrize("has_masks", [True, False])
def test_what_a_device_found_is_the_same_once_it_is_downloaded_in_one_piece(counts: list[int], has_masks: bool) -> None:
    random = torch.Generator().manual_seed(0)
    found = [
        {
            "boxes": torch.rand(count, 4, generator=random) * 1000,
            "labels": torch.randint(1, 2**24, (count,), generator=random),
            "scores": torch.rand(count, generator=random),
        }
        | ({"masks": torch.rand(count, 1, 28, 28, generator=random)} if has_masks else {})
        for count in counts
    ]
    here = downloaded(found)
    assert [one.keys() for one in here] == [one.keys() for one in found]
    for one, other in zip(here, found, strict=True):
        for name, tensor in one.items():
            assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
            assert torch.equal(tensor, other[name])


def test_the_network_computes_in_ieees_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = []
    cudnn: Any = torch.backends.cudnn
    before = cudnn.allow_tf32

    def infer(*given: Any) -> Any:
        inside.append(cudnn.allow_tf32)
        return detector_of(SPEC).infer(*given)

    monkeypatch.setattr("flawmask.inference.torch_backend.detector_of", lambda _: SimpleNamespace(infer=infer))
    assert detect(network(), SPEC, patchwork(60, 90)).instances
    assert inside == [False]
    assert cudnn.allow_tf32 == before


def test_images_of_several_sizes_are_no_batch() -> None:
    with pytest.raises(ValueError, match=r"of one size once they are padded, not .*64, 96.* and .*64, 128"):
        infer(network(), SPEC, [patchwork(60, 90), patchwork(60, 91)])


def test_a_score_floor_drops_what_scores_less_and_leaves_the_rest(model_path: Path) -> None:
    everything = Predictor(model_path, "cpu")(patchwork(60, 90))
    above = Predictor(model_path, "cpu", score_floor=0.4)(patchwork(60, 90))
    kept = tuple(one for one in everything.instances if one.score > 0.4)
    assert 0 < len(kept) < len(everything.instances)
    assert_same(above, replace(everything, instances=kept))
    assert everything == Predictor(model_path, "cpu", score_floor=0.05)(patchwork(60, 90))


def test_no_more_proposals_are_looked_at_than_asked_for_nor_than_there_are(model_path: Path, tmp_path: Path) -> None:
    def looked_at(path: Path = model_path, **limit: Any) -> int:
        seen: list[int] = []
        predictor = Predictor(path, "cpu", **limit)
        network: Any = network_of(predictor)
        network.roi_heads.box_head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        predictor(patchwork(60, 90))
        return seen[0]

    most = looked_at()
    assert 7 < most <= SPEC.proposals
    assert looked_at(max_proposals=7) == 7
    assert looked_at(max_proposals=SPEC.proposals) == looked_at(max_proposals=9999) == most
    many = tmp_path / "many.pt"
    checkpoint.save(many, network(), replace(SPEC, proposals=1000))
    assert looked_at(many) == 300
    assert looked_at(many, max_proposals=400) > 300


def test_a_file_an_array_and_a_string_give_the_same_and_an_image_turned_by_exif_its_upright_self(
    model_path: Path, tmp_path: Path
) -> None:
    predictor = Predictor(model_path, "cpu")
    upright = patchwork(60, 90)
    write_png(tmp_path / "upright.png", upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: to be shown, turn clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(upright, 1))).save(tmp_path / "turned.png", exif=exif)
    expected = predictor(upright)
    assert expected.instances
    assert predictor(tmp_path / "upright.png") == expected
    assert predictor(str(tmp_path / "upright.png")) == expected
    assert predictor(tmp_path / "turned.png") == expected


def test_an_answer_depends_on_the_image_alone_not_on_what_was_asked_before(model_path: Path) -> None:
    images = [patchwork(60, 90, seed) for seed in range(3)]
    one, other = Predictor(model_path, "cpu"), Predictor(model_path, "cpu")
    forward = [one(image) for image in images]
    backward = [other(image) for image in reversed(images)][::-1]
    assert forward == backward == [one(image) for image in images]
    assert forward[0] != forward[1]


def test_an_array_is_left_as_it_was_and_may_be_a_view(model_path: Path) -> None:
    predictor = Predictor(model_path, "cpu")
    image = patchwork(60, 90)
    before = image.copy()
    mirrored = predictor(image[:, ::-1])
    assert (image == before).all()
    assert mirrored == predictor(image[:, ::-1].copy())


def test_a_file_that_is_no_image_is_an_error_of_its_own(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"broken\.png"):
        Predictor(model_path, "cpu")(tmp_path / "broken.png")


def test_three_lines_of_python_are_enough(model_path: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "part.png", patchwork(60, 90))
    code = f"""from flawmask import Predictor
predictor = Predictor({str(model_path)!r})
print(predictor({str(tmp_path / "part.png")!r}).verdict(0.05))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Verdict(is_defect=True, score=")
    assert not done.stderr


def test_a_device_that_is_not_there_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(FlawmaskError, match="--device tpu is not there"):
        Predictor(tmp_path / "missing.pt", "tpu")


def test_a_model_and_data_of_other_classes_do_not_go_together() -> None:
    check_classes(SPEC, ("scratch", "good", "crack"), Path("data"))
    with pytest.raises(FlawmaskError, match="knows the classes good, crack, scratch, but data has good, defect"):
        check_classes(SPEC, ("good", "defect"), Path("data"))


def test_images_go_to_a_device_other_than_cuda_by_a_copy_that_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system may move, and MPS, know no other: the copy would be of what is in the memory by then."""
    plain, copies = torch.Tensor.to, []

    def to(self: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        copies.append(named.get("non_blocking", False))
        return plain(self, *given, **named)

    monkeypatch.setattr(torch.Tensor, "to", to)
    found = uploaded([patchwork(4, 6, 0), patchwork(5, 3, 1)], torch.device("meta"))
    assert [one.shape for one in found] == [(3, 4, 6), (3, 5, 3)]
    assert copies == [False]
