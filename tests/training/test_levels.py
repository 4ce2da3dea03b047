"""Images of more than 8 bits give the same training and evaluation as the same images in 8 bits."""

import json
from pathlib import Path

import numpy as np
from stained_plates import light, make_dataset, same_weights

from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import evaluate
from flawmask.images import read_image, read_pixels, write_png
from flawmask.joining import DEFAULT
from flawmask.model import checkpoint
from flawmask.training.loop import train


def test_12_bit_images_train_and_evaluate_like_the_same_images_in_8_bits(tmp_path: Path) -> None:
    shallow, deep = make_dataset(tmp_path / "8" / "data"), make_dataset(tmp_path / "12" / "data")
    for path in deep.glob("*/images/*.png"):
        pixels = read_pixels(path).astype(np.uint16)
        pixels[0, 0] = 255  # a reflection, which uses all bits
        write_png(path, (pixels << 4 | pixels >> 4).astype(np.uint16))
        write_png(shallow / path.relative_to(deep), pixels.astype(np.uint8))
    done = {dataset: train(light(dataset)) for dataset in (shallow, deep)}
    assert same_weights(done[shallow].run_dir / "best.pt", done[deep].run_dir / "best.pt")
    _, spec = checkpoint.load(done[deep].run_dir / "best.pt")
    assert spec.intensity == (0, 4095)
    assert checkpoint.load(done[shallow].run_dir / "best.pt")[1].intensity == (0, 65535)
    config = json.loads((done[deep].run_dir / "config.json").read_text())
    assert config["model"]["intensity"] == [0, 4095]
    known = [json.loads((one.run_dir / "training_images.json").read_text()) for one in done.values()]
    assert known[0]["sha256_of_pixels"] == known[1]["sha256_of_pixels"]

    evaluated = {
        dataset: evaluate(
            EvaluateConfig(model=one.run_dir / "best.pt", dataset_dir=dataset, conf=0.05, device="cpu", resamples=0)
        )
        for dataset, one in done.items()
    }
    assert evaluated[deep].metrics["intensity"] == [0, 4095]
    ranked = [one.metrics["image_auroc"] for one in evaluated.values()]
    assert ranked[0] == ranked[1]
    found = [json.loads((one.results_dir / "predictions.json").read_text()) for one in evaluated.values()]
    assert found[0] == found[1]
    pictures = [sorted(one.results_dir.glob("overlays/*.png")) for one in evaluated.values()]
    for one, other in zip(*pictures, strict=True):
        assert np.array_equal(read_image(one), read_image(other))

    went_on = train(light(deep, resume=done[deep].run_dir))
    assert checkpoint.load(went_on.run_dir / "best.pt")[1].intensity == (0, 4095)


def test_a_given_intensity_rule_is_stored_in_the_checkpoint(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data")
    done = train(light(dataset, intensity="10"))
    spec = checkpoint.load(done.run_dir / "last.pt")[1]
    assert (spec.intensity, spec.join) == ((0, 1023), DEFAULT)
    done = train(light(dataset, join="off", overwrite=True))
    assert checkpoint.load(done.run_dir / "last.pt")[1].join == "off"
