"""Every numeric setting: at 0, below, far above, and without a value."""

import ast
import inspect
import logging
import math
import re
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from flawmask import cli
from flawmask.cli import COMMANDS
from flawmask.comparison.config import CompareConfig
from flawmask.data.augment import AugmentConfig
from flawmask.data.demo import generate
from flawmask.errors import FlawmaskError
from flawmask.settings import as_json, from_json, has_origin
from flawmask.stages import RunConfig
from flawmask.training.config import TrainConfig

NEEDED: dict[str, dict[str, Any]] = {
    "run": {"category": "bottle", "weights": "none"},
    "download": {"category": "bottle"},
    "prepare": {"category": "bottle"},
    "import": {"source": "labels", "output_dir": "data"},
    "augment": {"dataset_dir": "data"},
    "train": {"dataset_dir": "data", "output_dir": "run", "weights": "none"},
    "evaluate": {"model": "best.pt", "dataset_dir": "data"},
    "predict": {"model": "best.pt", "input": ("images",), "output_dir": "out"},
    "serve": {"model": ("best.pt",)},
    "export": {"model": "best.pt"},
    "demo": {"image_size": 64, "good": 2, "defective": 2, "train_good": 0},
    "compare": {"category": "bottle", "weights": "none"},
    "report": {"runs": ("run",)},
    "doctor": {"category": "bottle"},
}

NUMBERS = [
    (command, field.name)
    for command, kind in COMMANDS.items()
    for field in fields(kind)  # type: ignore[arg-type]
    if any(number in str(get_type_hints(kind)[field.name]) for number in ("int", "float"))
    and field.name != "anchor_sizes"
]

HARMLESS = {
    *("epochs", "patience", "batch_size", "effective_batch_size", "max_detections", "proposals", "roi_samples"),
    *("warmup_steps", "clip_norm", "cache_gb", "inference_batch_size", "max_proposals", "min_area", "overlays", "lr"),
    *("gallery", "sheet_images", "folds", "num_classes", "page"),
}
"""Settings for which a huge number only means everything, or a training that diverges with a message."""

MAY_BE_0 = {
    *("seed", "test_ratio", "augmentation_factor", "warmup_steps", "trainable_layers", "workers", "cache_gb"),
    *("score_floor", "conf", "min_area", "overlays", "resamples", "good", "defective", "train_good", "gallery"),
    *("sheet_images", "polygon_tolerance", "max_drop"),
}
"""Where none, nothing or the first is something to ask for."""


def help_texts(kind: type) -> list[str]:
    """Return the strings below the fields of a settings class, without the class's own docstring."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    strings = [one.value.value for one in definition.body if isinstance(one, ast.Expr) and hasattr(one.value, "value")]
    return [text for text in strings if isinstance(text, str)][1:]


def test_the_help_of_every_setting_is_one_line() -> None:
    """`--help` prints each line of a longer one as a paragraph."""
    classes = {one for kind in COMMANDS.values() for one in inspect.getmro(kind)} - {object}  # type: ignore[arg-type]
    texts = [text for one in classes for text in help_texts(one)]
    assert len(texts) > 100
    assert [text for text in texts if "\n" in text] == []


def checked(command: str, **changes: Any) -> None:
    config = COMMANDS[command](**NEEDED[command] | changes)
    if command == "demo":  # demo checks its settings when it draws
        generate(config)


@pytest.mark.parametrize(("command", "name"), NUMBERS)
def test_an_impossible_number_is_refused_with_the_name_of_the_setting(
    command: str, name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in (-1, math.nan):
        with pytest.raises(FlawmaskError, match=name):
            checked(command, **{name: value})
    for value in (10**20, 10**30):
        if name not in HARMLESS:
            with pytest.raises(FlawmaskError, match=name):
                checked(command, **{name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "name"), [one for one in NUMBERS if one[1] in MAY_BE_0])
def test_0_is_accepted_if_it_makes_sense(
    command: str, name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checked(command, **{name: 0})


@pytest.mark.parametrize(("command", "name"), [one for one in NUMBERS if one[1] not in MAY_BE_0])
def test_0_is_refused_with_the_name_of_the_setting_if_it_makes_no_sense(
    command: str, name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FlawmaskError, match=name):
        checked(command, **{name: 0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("demo", "report")])
def test_settings_are_read_back_from_json(command: str) -> None:
    config = COMMANDS[command](**NEEDED[command])
    found = from_json(type(config), as_json(config))
    assert as_json(found) == as_json(config)
    assert [type(getattr(found, one.name)) for one in fields(config) if one.name not in NEEDED[command]] == [
        type(getattr(config, one.name)) for one in fields(config) if one.name not in NEEDED[command]
    ]


@pytest.mark.parametrize(
    ("script", "needed"),
    [
        ("run_maskrcnn_pipeline.py", ["--category", "bottle"]),
        ("train_maskrcnn.py", ["--dataset_dir", "a", "--output_dir", "b"]),
    ],
)
def test_the_scripts_keep_their_default_network(
    script: str, needed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def dispatch(config: Any) -> int:
        given.append((config.arch, config.weights, config.train_augment, getattr(config, "augmentation_factor", None)))
        return cli.OK

    monkeypatch.setattr(cli, "_dispatch", dispatch)
    for flags in ([], ["--arch", "auto", "--weights", "none", "--train_augment", "light"]):
        monkeypatch.setattr("sys.argv", [script, *needed, *flags])
        with pytest.raises(SystemExit):
            runpy.run_path(str(Path(__file__).parents[1] / script), run_name="__main__")
    variants = 3 if script.startswith("run") else None
    assert given == [("maskrcnn_resnet50_fpn", "coco", "off", variants), ("auto", "none", "light", variants)]


def test_images_are_augmented_while_training_and_not_in_a_folder() -> None:
    for config in (RunConfig(category="nut"), CompareConfig(category="nut")):
        assert (config.train_augment, config.augmentation_factor) == ("light", 0)
    assert TrainConfig(dataset_dir=Path("a"), output_dir=Path("b")).train_augment == "light"
    assert AugmentConfig(dataset_dir=Path("a")).augmentation_factor == 3


@pytest.mark.parametrize("kind", [RunConfig, CompareConfig])
def test_variants_of_validation_images_need_variants(kind: Any) -> None:
    assert kind(category="nut", augment_val=True, augmentation_factor=1).augment_val
    with pytest.raises(FlawmaskError, match="--augment_val needs an --augmentation_factor"):
        kind(category="nut", augment_val=True)
    with pytest.raises(FlawmaskError, match="--augment_val adds variants, and --skip_augment"):
        kind(category="nut", augment_val=True, augmentation_factor=1, skip_augment=True)


@pytest.mark.parametrize("command", ["run", "download", "prepare", "demo", "compare", "doctor"])
def test_root_is_another_name_for_mvtec_root(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = []

    def dispatch(config: Any) -> int:
        given.append(config.mvtec_root)
        return cli.OK

    monkeypatch.setattr(cli, "_dispatch", dispatch)
    needed = [] if command == "demo" else ["--category", "bottle"]
    for flags in (["--root", "here"], ["--mvtec_root", "here"], ["--mvtec-root", "here"]):
        monkeypatch.setattr("sys.argv", ["flawmask", command, *needed, *flags])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == cli.OK
    assert given == [Path("here")] * 3
    monkeypatch.setattr("sys.argv", ["flawmask", command, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    assert "--root" in shown
    assert ("--layout {auto,mvtec,visa,loco," in shown) == (command in ("run", "prepare", "compare", "doctor"))


@pytest.mark.parametrize(
    ("command", "former", "name", "value"),
    [("predict", "output", "output_dir", Path("here")), ("compare", "yardsticks", "baselines", "none")],
)
def test_a_former_name_works_as_flag_and_as_argument(
    command: str,
    former: str,
    name: str,
    value: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = []

    def dispatch(config: Any) -> int:
        given.append(getattr(config, name))
        return cli.OK

    monkeypatch.setattr(cli, "_dispatch", dispatch)
    needed = {"predict": ["--model", "best.pt", "--input", "a.png"], "compare": ["--category", "bottle"]}[command]
    for flag in (former, name, name.replace("_", "-")):
        monkeypatch.setattr("sys.argv", ["flawmask", command, *needed, f"--{flag}", str(value)])
        with pytest.raises(SystemExit):
            cli.main()
    kind: Any = COMMANDS[command]
    others = {key: one for key, one in NEEDED[command].items() if key != name}
    given.append(getattr(from_json(kind, {former: str(value), **others}), name))
    assert given == [value] * 4
    with pytest.raises(TypeError, match=f"{former} is the former name of {name}: give one of them"):
        from_json(kind, {former: str(value), name: str(value), **others})
    monkeypatch.setattr("sys.argv", ["flawmask", command, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"--{name}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "prepare", "compare", "doctor"])
def test_an_unknown_layout_is_refused_with_the_list_of_known_ones(command: str) -> None:
    with pytest.raises(FlawmaskError, match="--layout lowco: there are auto, mvtec"):
        COMMANDS[command](**NEEDED[command], layout="lowco")


def test_a_missing_setting_of_an_older_file_has_its_legacy_value() -> None:
    origin = {"made_by": "flawmask prepare", "settings": {"seed": 1, "layout": "mvtec"}, "source": "a"}
    assert has_origin(origin | {"version": "0.1"}, origin)
    assert has_origin(origin | {"settings": {"seed": 1}}, origin)
    assert not has_origin(origin | {"settings": {"seed": 1, "layout": "visa"}}, origin)
    assert not has_origin(origin | {"settings": {}}, origin)
    assert not has_origin(origin | {"settings": {"seed": 1}}, origin | {"settings": {"seed": 1, "layout": "visa"}})
    others: list[Any] = [None, [], {}, origin | {"settings": None}]
    assert not any(has_origin(other, origin) for other in others)


@pytest.mark.parametrize("command", COMMANDS)
def test_if_memory_runs_out_each_command_names_flags_that_it_has(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> int:
        raise MemoryError

    monkeypatch.setattr(cli, "_execute", full)
    monkeypatch.setattr("sys.argv", ["flawmask", command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == cli.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory ran out: ")
    flags = re.findall(r"--(\w+)", line)
    names = {field.name for field in fields(COMMANDS[command])}  # type: ignore[arg-type]
    assert set(flags) <= names
    assert len(flags) == len(names & {"batch_size", "inference_batch_size", "image_size", "max_proposals", "workers"})


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_flag_for_details_that_is_not_a_setting_of_its_stage(
    command: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown = []

    def dispatch(config: Any) -> int:
        shown.append((type(config), logging.getLogger("flawmask").isEnabledFor(logging.DEBUG)))
        return 0

    monkeypatch.setattr(cli, "_dispatch", dispatch)
    logger = logging.getLogger("flawmask")
    monkeypatch.setattr(logger, "handlers", [])
    caplog.set_level(logger.level, "flawmask")  # restored after the test
    needed = [
        part
        for name, value in NEEDED[command].items()
        for part in (
            *([] if name in ("runs", "source") else [f"--{name}"]),
            *(value if isinstance(value, tuple) else [str(value)]),
        )
    ]
    for flags in ([], ["--verbose"]):
        monkeypatch.setattr("sys.argv", ["flawmask", command, *needed, *flags])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
    assert shown == [(COMMANDS[command], False), (COMMANDS[command], True)]
