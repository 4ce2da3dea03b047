"""`Predictor`: torchvision's masks, pixel by pixel, at the image's own size, and the same result each time."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from random_network import SPEC, detect, infer, network, network_of, patchwork, tensors_of, torchvision_finds
from torchvision.models.detection.roi_heads import paste_masks_in_image

from flawmask import images
from flawmask.errors import FlawmaskError, ImageError
from flawmask.images import write_png
from flawmask.inference import calibration
from flawmask.inference import threshold as thresholds
from flawmask.inference.backend import check_classes
from flawmask.inference.calibration import Calibration
from flawmask.inference.predictor import Predictor
from flawmask.inference.torch_backend import downloaded, uploaded
from flawmask.joining import Join
from flawmask.model import checkpoint
from flawmask.model.build import detector_of
from flawmask.prediction import Prediction, post_process


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best.pt"
    checkpoint.save(path, network(), SPEC)
    return path


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


def test_a_predictor_joins_by_its_argument_or_else_by_the_checkpoints_rule(model_path: Path) -> None:
    pixels = patchwork(90, 120)
    by_rule = {rule: Predictor(model_path, "cpu", join=rule)(pixels) for rule in (None, *get_args(Join))}
    assert by_rule[None].instances == by_rule["off"].instances
    assert len(by_rule["touching"]) < len(by_rule["off"])
    assert by_rule["touching"].instances == by_rule["off"].joined().instances
    assert by_rule["touching"].defect_probability is None


def test_a_predictor_gives_the_probability_of_a_defect(model_path: Path) -> None:
    curve = Calibration(0.5, -1.0, "val", 40, 20)
    calibration.save(curve, model_path)
    try:
        prediction = Predictor(model_path, "cpu")(patchwork(70, 90))
        assert prediction.defect_probability == float(curve.probability(prediction.verdict().score))
        assert prediction.to_dict()["defect_probability"] == prediction.defect_probability
        assert Predictor(model_path, "cpu", min_area=3)(patchwork(70, 90)).defect_probability is None
    finally:
        model_path.with_name("best.calibration.json").unlink()


def test_a_cut_instance_counts_inside_the_region_only() -> None:
    region = np.zeros((70, 90), dtype=bool)
    region[:, :45] = True
    scores = detect(network(), SPEC, patchwork(70, 90)).within(region).score_map()
    assert (scores[:, 45:] == 0).all()
    assert scores.max() > 0


PIXELS = patchwork(60, 90)
GREY = np.ascontiguousarray(PIXELS[:, :, 1])
AS_RGB = np.repeat(GREY[:, :, None], 3, axis=2)
ALPHA = np.full((60, 90, 1), 7, dtype=np.uint8)
SIXTEEN = (GREY.astype(np.uint16) << 8) + 200
SOURCES: list[tuple[Any, dict[str, Any], Any]] = [
    (PIXELS, {}, PIXELS),
    (PIXELS[:, :, ::-1], {"colour": "bgr"}, PIXELS),
    (np.concatenate([PIXELS, ALPHA], axis=2), {}, PIXELS),
    (np.concatenate([PIXELS[:, :, ::-1], ALPHA], axis=2), {"colour": "bgr"}, PIXELS),
    (GREY, {}, AS_RGB),
    (GREY[:, :, None], {"colour": "bgr"}, AS_RGB),
    (SIXTEEN, {}, AS_RGB),
    (np.repeat(SIXTEEN[:, :, None], 3, axis=2), {}, AS_RGB),
    (PIXELS / 255, {}, PIXELS),
    ((GREY / 255).astype(np.float32), {}, AS_RGB),
    (torch.from_numpy(PIXELS).permute(2, 0, 1), {}, PIXELS),
    (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255, {}, PIXELS),
    (torch.from_numpy(GREY), {}, AS_RGB),
    (torch.from_numpy(GREY)[None], {}, AS_RGB),
    (Image.fromarray(PIXELS), {"colour": "bgr"}, PIXELS),
    (Image.fromarray(PIXELS).convert("RGBA"), {}, PIXELS),
    (Image.fromarray(GREY), {}, AS_RGB),
    (Image.fromarray(SIXTEEN), {}, AS_RGB),
]
"""A source, the order of its colours, and the image that it stands for."""


@pytest.mark.parametrize(("source", "how", "expected"), SOURCES)
def test_every_kind_of_source_gives_the_same_image_as_a_file(source: Any, how: dict[str, Any], expected: Any) -> None:
    found = images.pixels_of(source, **how)
    assert found.dtype == np.uint8
    assert (found == expected).all()


def test_a_pillow_image_is_rotated_by_its_exif_and_not_changed_itself() -> None:
    picture = Image.fromarray(np.ascontiguousarray(np.rot90(PIXELS, 1)))
    picture.getexif()[0x0112] = 6
    assert (images.pixels_of(picture) == PIXELS).all()
    assert picture.size == (60, 90)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (np.zeros((20, 30, 2), np.uint8), r"of shape \(20, 30, 2\)"),
        (np.zeros((3, 20, 30), np.uint8), r"of shape \(3, 20, 30\)"),
        (np.zeros((2, 20, 30, 3), np.uint8), r"of shape \(2, 20, 30, 3\)"),
        (np.zeros((0, 30, 3), np.uint8), r"of shape \(0, 30, 3\)"),
        (torch.zeros(20, 30, 3), r"of shape \(20, 30, 3\)"),
        (np.zeros((20, 30), np.int64), "of int64"),
        (np.zeros((20, 30), bool), "of bool"),
        (np.full((20, 30), 200.0), "from 200 to 200"),
        (np.full((20, 30), -0.1), "from -0.1 to -0.1"),
        (np.full((20, 30, 3), np.nan, np.float32), "from nan to nan"),
        (None, "a NoneType"),
        ([[1]], "a list"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "floating-point numbers"),
    ],
)
def test_a_value_that_is_no_image_is_refused_with_a_list_of_the_accepted_kinds(wrong: Any, why: str) -> None:
    accepted = (
        "" if isinstance(wrong, Image.Image) else ".*but an image is a file's path, a picture of Pillow's, an array"
    )
    with pytest.raises(ImageError, match=why + accepted):
        images.pixels_of(wrong)


def test_many_images_of_every_kind_are_predicted_in_order_with_the_results_of_single_ones(
    model_path: Path, tmp_path: Path
) -> None:
    write_png(tmp_path / "file.png", PIXELS)
    # In bfloat16, a batch may sum in another order than a single image, and scores then differ in their third digit.
    predictor = Predictor(model_path, "cpu", threshold=0.3, min_area=5, precision="fp32")
    sources: list[Any] = [
        tmp_path / "file.png",
        str(tmp_path / "file.png"),
        GREY,
        Image.fromarray(PIXELS),
        torch.from_numpy(GREY),
    ]
    alone = [predictor(source) for source in sources]
    for size in (None, 8):
        found = list(predictor.predict(iter(sources), batch_size=size))
        for one, other in zip(found, alone, strict=True):
            assert_same(one, other)
            assert (one.conf, one.min_area, one.classes) == (0.3, 5, SPEC.classes)
            assert one.image is not None
            assert other.image is not None
            assert (one.image == other.image).all()
    assert len(list(predictor.predict(GREY))) == len(list(predictor.predict(str(tmp_path / "file.png")))) == 1
    (mirrored,) = predictor.predict([PIXELS[:, :, ::-1]], colour="bgr")
    assert_same(mirrored, alone[0])
    assert predictor(PIXELS[:, :, ::-1], colour="bgr") == alone[0]


def test_an_unreadable_image_raises_an_error_in_its_turn_and_frames_are_not_read_far_ahead(model_path: Path) -> None:
    taken = 0

    def frames() -> Iterator[Any]:
        nonlocal taken
        for frame in [GREY, GREY, "missing.png", *[GREY] * 60]:
            taken += 1
            yield frame

    found = Predictor(model_path, "cpu").predict(frames(), batch_size=2)
    assert next(found).instances
    assert next(found).instances
    with pytest.raises(ImageError, match=r"missing\.png cannot be opened"):
        next(found)
    assert taken < 20


def test_the_threshold_is_the_one_given_or_the_one_chosen_for_the_checkpoint(model_path: Path) -> None:
    assert Predictor(model_path, "cpu").conf == 0.5
    with pytest.raises(FlawmaskError, match="has no threshold chosen"):
        Predictor(model_path, "cpu", threshold="auto")
    thresholds.save(thresholds.Threshold(0.123, "aim", min_area=4), model_path)
    assert Predictor(model_path, "cpu", threshold="auto", min_area=4).conf == 0.123
    with pytest.raises(FlawmaskError, match="has no threshold chosen"):
        Predictor(model_path, "cpu", threshold="auto")
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(FlawmaskError, match="must lie between 0 and 1"):
            Predictor(model_path, "cpu", threshold=wrong)


def test_a_batch_of_one_size_has_the_results_of_single_images() -> None:
    batch = [patchwork(60, 90, seed) for seed in range(3)]
    together = [post_process(found, SPEC.classes, 60, 90) for found in infer(network(), SPEC, batch)]
    assert sum(len(one.instances) for one in together) > 10
    for one, pixels in zip(together, batch, strict=True):
        assert_same(one, detect(network(), SPEC, pixels))


def assert_same(one: Prediction, other: Prediction) -> None:
    """Sums in another order differ in their last digits, which does not change the masks here."""
    assert [(each.label, each.rle) for each in one.instances] == [(each.label, each.rle) for each in other.instances]
    for mine, theirs in zip(one.instances, other.instances, strict=True):
        assert mine.score == pytest.approx(theirs.score, abs=1e-5)
        assert mine.box == pytest.approx(theirs.box, abs=1e-3)


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0]])
@pytest.mark.parametrize("has_masks", [True, False])
def test_outputs_do_not_change_when_they_are_downloaded_in_one_piece(counts: list[int], has_masks: bool) -> None:
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


def test_images_of_different_padded_sizes_are_refused_as_a_batch() -> None:
    with pytest.raises(ValueError, match=r"images of one batch need one padded size, not .*64, 96.* and .*64, 128"):
        infer(network(), SPEC, [patchwork(60, 90), patchwork(60, 91)])


def test_a_score_floor_drops_lower_scores_and_keeps_the_others(model_path: Path) -> None:
    everything = Predictor(model_path, "cpu")(patchwork(60, 90))
    above = Predictor(model_path, "cpu", score_floor=0.4)(patchwork(60, 90))
    kept = tuple(one for one in everything.instances if one.score > 0.4)
    assert 0 < len(kept) < len(everything.instances)
    assert_same(above, replace(everything, instances=kept))
    assert everything == Predictor(model_path, "cpu", score_floor=0.05)(patchwork(60, 90))


def test_the_number_of_proposals_is_limited_by_the_setting_and_by_the_checkpoint(
    model_path: Path, tmp_path: Path
) -> None:
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


def test_a_prediction_does_not_depend_on_earlier_images(model_path: Path) -> None:
    asked = [patchwork(60, 90, seed) for seed in range(3)]
    one, other = Predictor(model_path, "cpu"), Predictor(model_path, "cpu")
    forward = [one(image) for image in asked]
    backward = [other(image) for image in reversed(asked)][::-1]
    assert forward == backward == [one(image) for image in asked]
    assert forward[0] != forward[1]


def test_an_array_is_not_changed_and_may_be_a_view(model_path: Path) -> None:
    predictor = Predictor(model_path, "cpu")
    image = patchwork(60, 90)
    before = image.copy()
    mirrored = predictor(image[:, ::-1])
    assert (image == before).all()
    assert mirrored == predictor(image[:, ::-1].copy())


def test_a_file_that_is_no_image_raises_an_image_error(model_path: Path, tmp_path: Path) -> None:
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


def test_a_model_and_data_with_different_classes_are_refused() -> None:
    check_classes(SPEC, ("scratch", "good", "crack"), Path("data"))
    with pytest.raises(FlawmaskError, match="knows the classes good, crack, scratch, but data has good, defect"):
        check_classes(SPEC, ("good", "defect"), Path("data"))


def test_images_are_copied_synchronously_to_a_device_other_than_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """From memory that is not pinned, and on MPS, an asynchronous copy could read memory that has changed since."""
    plain, copies = torch.Tensor.to, []

    def to(self: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        copies.append(named.get("non_blocking", False))
        return plain(self, *given, **named)

    monkeypatch.setattr(torch.Tensor, "to", to)
    found = uploaded([patchwork(4, 6, 0), patchwork(5, 3, 1)], torch.device("meta"))
    assert [one.shape for one in found] == [(3, 4, 6), (3, 5, 3)]
    assert copies == [False]
