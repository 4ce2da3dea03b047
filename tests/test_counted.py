"""In data sets with peculiar records, every stage uses each item or names it with the reason."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from stained_plates import CATEGORIES, SIDE, part
from stained_plates import settings as training_settings

from flawmask.coco import annotation, write_split
from flawmask.data.augment import AugmentConfig, augment
from flawmask.data.doctor import DoctorConfig, examine
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.evaluate import evaluate
from flawmask.images import write_png
from flawmask.inference.config import PredictConfig
from flawmask.inference.predict import predict
from flawmask.training.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_network", "undrawn")]

PECULIAR = ("crowd", "outside", "file missing", "bad file", "bad record", "twice", "plain")

Counts = dict[str, dict[str, Any]]


def make(folder: Path, peculiar: list[str], first: int = 0) -> tuple[int, int]:
    """Write a split with two plain images and one for each peculiarity; return the numbers of images and annotations.

    Another `first` draws other images.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, what in enumerate(["plain", "plain", *peculiar], start=1):
        pixels, mask = part(first + number)
        name = f"{number}.png"
        record = annotation(mask, id=number, image_id=number, category_id=2)
        changes: dict[str, dict[str, Any]] = {
            "crowd": {"iscrowd": 1},
            "outside": {"segmentation": [[900, 900, 950, 900, 950, 950]]},
            "bad record": {"category_id": 77},
        }
        record |= changes.get(what, {})
        images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        annotations.append(record)
        if what == "bad file":
            (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "images" / name).write_bytes(b"no image")
        elif what != "file missing":
            write_png(folder / "images" / name, pixels)
        if what == "twice":
            images.append({**images[-1], "id": 100 + number})
    write_split(folder, images, annotations, CATEGORIES)
    return len(images), len(annotations)


def check(counts: Counts, images: int, annotations: int) -> tuple[int, int]:
    """Check the counts against the numbers of records, and return how many images and annotations are used."""
    for what, found in (("images", images), ("annotations", annotations)):
        one = counts[what]
        assert one["found"] == found
        assert one["found"] == one["used"] + sum(len(names) for names in one["not_used"].values())
        assert all(reason and all(names) for reason, names in one["not_used"].items())
    return counts["images"]["used"], counts["annotations"]["used"]


@settings(
    max_examples=3, phases=[Phase.generate], deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(*[st.lists(st.sampled_from(PECULIAR), max_size=5)] * 2)
def test_in_every_stage_the_items_found_are_those_used_and_not_used(
    in_training: list[str], in_validation: list[str]
) -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        training = make(folder / "train", in_training)
        validation = make(folder / "val", in_validation, first=1000)
        seen: Counts = {
            tally.what: tally.to_dict() for tally in examine(DoctorConfig(dataset_dir=folder, sheet_images=0)).tallies
        }
        doctors = check(seen, training[0] + validation[0], training[1] + validation[1])

        run = train(training_settings(folder, on_error="skip")).run_dir
        told = json.loads((run / "config.json").read_text())["tally"]
        used = check(told["train"], *training)
        used_to_validate = check(told["val"], *validation)
        assert doctors == (used[0] + used_to_validate[0], used[1] + used_to_validate[1])

        config = EvaluateConfig(
            model=run / "best.pt", dataset_dir=folder, on_error="skip", resamples=0, device="cpu", overlays=0
        )
        metrics = evaluate(config).metrics
        assert check(metrics["tally"], *validation) == used_to_validate
        assert metrics["total_images"] == used_to_validate[0]

        made = augment(AugmentConfig(dataset_dir=folder, augmentation_factor=0, on_error="skip")).dataset_dir
        both = json.loads((made / "dataset_info.json").read_text())["tally"]
        assert check(both, training[0] + validation[0], training[1] + validation[1]) == doctors

        (folder / "val/images/photo.cr2").write_bytes(b"\0")
        files = list((folder / "val/images").iterdir())
        looked = predict(
            PredictConfig(
                model=run / "best.pt",
                input=(str(folder / "val/images"),),
                output_dir=Path(temporary) / "out",
                device="cpu",
            )
        )
        told = json.loads((looked.output / "predictions.json").read_text())["tally"]["images"]
        assert told["found"] == len(files) == told["used"] + sum(len(names) for names in told["not_used"].values())
        assert told["used"] == len(looked.good) + len(looked.defective)
