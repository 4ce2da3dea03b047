"""The command line. It is made from the stages' settings and nothing else: a field's docstring is its help."""

import io
import json
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, make_dataclass, replace
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

import flawmask
from flawmask.comparison.config import CompareConfig
from flawmask.data import dataset_info
from flawmask.data.augment import AugmentConfig, augment
from flawmask.data.doctor import DoctorConfig, Report, examine
from flawmask.data.doctor_tables import tables
from flawmask.data.download import DownloadConfig, download
from flawmask.data.import_labels import ImportConfig, import_labels
from flawmask.data.layouts import AUTO, LAYOUTS, chosen_categories
from flawmask.data.prepare import PrepareConfig, prepare
from flawmask.errors import FlawmaskError, RecordsError, UnusedError
from flawmask.evaluation.config import EvaluateConfig
from flawmask.evaluation.summary import percent, summary
from flawmask.inference.config import PredictConfig
from flawmask.launch import THREAD_NAME, is_main_process, own_process
from flawmask.pipeline import DemoCommand, demo, run
from flawmask.progress import log_to, show_details, show_progress_on
from flawmask.report.config import ReportConfig
from flawmask.settings import require
from flawmask.stages import Finished, RunConfig
from flawmask.tally import warn_of_unused
from flawmask.training.config import TrainConfig

COMMANDS: dict[str, Callable[..., Any]] = {
    "run": RunConfig,
    "download": DownloadConfig,
    "prepare": PrepareConfig,
    "import": ImportConfig,
    "augment": AugmentConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "demo": DemoCommand,
    "compare": CompareConfig,
    "report": ReportConfig,
    "doctor": DoctorConfig,
}

DESCRIPTION = """Flawmask finds and outlines defects on manufactured parts: a folder of labelled images in, a trained
network, its figures and its outlined defects out. `flawmask demo --run` shows it all on images that it draws itself;
`flawmask run --category bottle` does it on yours; `flawmask COMMAND --help` explains one step."""

FLAGS = {
    "mvtec_root": tyro.conf.arg(aliases=("--root",)),
    "layout": tyro.conf.arg(metavar=f"{{{','.join((AUTO, *LAYOUTS))}}}"),
    "source_format": tyro.conf.arg(name="from"),
}
"""What a setting is on the command line beside what its field says."""

SPARING = ("batch_size", "inference_batch_size", "image_size", "max_proposals")
"""Settings that take less memory the lower they are: those first that change nothing else."""

OK, DEFECT_FOUND, FAILED, UNUSED, INTERRUPTED, UNREAD = 0, 1, 2, 3, 130, 141
"""The exit statuses, which docs/formats.md explains; 128 and a signal's number is one that ended the process."""


def main(command: str | None = None, **defaults: Any) -> None:
    """Run the command line and exit the process, with one of the statuses in docs/formats.md.

    Args:
        command: a subcommand's name, for the scripts that are one subcommand each.
        defaults: settings that such a script has others of than the subcommand.
    """
    status = _guarded([*([command] if command else []), *sys.argv[1:]], defaults)
    if any(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate()):
        # One hangs, in a file on a dead mount say, and Python would wait for it.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _guarded(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Run one command and return its exit status; what the user can mend is one line on stderr, no traceback."""
    own_process()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may have letters that a terminal or a pipe has not
        sys.stdout.reconfigure(errors="backslashreplace")
    status = FAILED
    console = Console(stderr=True)
    log_to(console)
    show_progress_on(console if is_main_process() else None)
    try:
        return _printed(arguments, defaults)
    except RecordsError as error:
        reasons = [f"{error.path}: {problem}" for problem in error.problems]
    except UnusedError as error:
        reasons, status = [str(error)], UNUSED
    except FlawmaskError as error:
        reasons = [str(error)]
    except BrokenPipeError:  # whoever read the output, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes when Python ends
        return UNREAD
    except OSError as error:
        reasons = [f"{error.filename or 'the disk'}: {error.strerror or error}"]
    except (RuntimeError, MemoryError) as error:
        from flawmask.runtime import is_out_of_memory

        # A process that reads images and was killed for its memory "exited unexpectedly".
        if not (is_out_of_memory(error) or "exited unexpectedly" in str(error)):
            raise
        reasons = [f"memory ran out: {_sparing(arguments[0])}"]
    except KeyboardInterrupt:
        console.print("interrupted")
        return INTERRUPTED
    finally:
        show_progress_on(None)
    for reason in reasons:
        console.print(f"error: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    return status


def _sparing(command: str) -> str:
    """Return what a command's settings can do for less memory."""
    names = {field.name for field in fields(COMMANDS[command])}  # type: ignore[arg-type]
    flags = [f"--{name}" for name in SPARING if name in names]
    if not flags:
        return "close other programs"
    return f"lower {', then '.join(flags)}" + (", and try --workers 0" if "workers" in names else "")


def _printed(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Run one command, see off what it printed, and return its exit status."""
    try:
        if arguments == ["--version"]:
            _print_lines([f"flawmask {flawmask.__version__}"])
            return OK
        config, is_verbose = _parse(arguments, defaults)
        if is_verbose:
            show_details()
        return _dispatch(config)
    finally:
        sys.stdout.flush()


def _parse(arguments: Sequence[str], defaults: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return the settings of the command, and whether it shows details, which is no setting of its stage's."""
    given = tyro.extras.subcommand_cli_from_dict(
        {name: _as_flags(kind, defaults) for name, kind in COMMANDS.items()},
        prog="flawmask",
        description=DESCRIPTION,
        args=list(arguments),
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    kind = COMMANDS[arguments[0]]
    return kind(**{field.name: getattr(given, field.name) for field in fields(kind)}), given.verbose  # type: ignore[arg-type]


def _as_flags(kind: Callable[..., Any], defaults: Mapping[str, Any]) -> type:
    """Return a command's settings with what `FLAGS` says of them, with other defaults, and with one flag more."""
    flag = Annotated[bool, tyro.conf.arg(help="Show more of what is done, such as what was loaded and recorded.")]
    known = [field for field in fields(kind) if field.name in FLAGS.keys() | defaults]  # type: ignore[arg-type]
    changed = [
        (field.name, Annotated[field.type, FLAGS.get(field.name)], defaults.get(field.name, field.default))
        for field in known
    ]
    flags = [("verbose", flag, False), *changed]
    made = make_dataclass(kind.__name__, flags, bases=(kind,), frozen=True, kw_only=True)  # type: ignore[arg-type]
    made.__doc__ = kind.__doc__
    return made


def _dispatch(config: Any) -> int:  # noqa: PLR0911 - a case for each command
    """Run the stage that the config belongs to, and return the exit status."""
    match config:
        case RunConfig():
            return _print_finished(run(config))
        case DemoCommand():
            return _print_finished(demo(config))
        case DownloadConfig() | ImportConfig():
            _print_lines([_brought_in(config)])
        case PrepareConfig():
            return _prepare(config)
        case AugmentConfig():
            augment(config)
        case TrainConfig():
            from flawmask.training.loop import train

            train(config)
        case EvaluateConfig():
            _evaluate(config)
        case PredictConfig():
            return _predict(config)
        case CompareConfig():
            return _compare(config)
        case ReportConfig():
            from flawmask.report.side_by_side import report

            _print_lines(f"look at {page.as_posix()}" for page in report(config))
        case DoctorConfig():
            return _doctor(config)
    return OK


def _brought_in(config: DownloadConfig | ImportConfig) -> str:
    """Fetch a category, or import labels, and return where it is and what to do next."""
    if isinstance(config, DownloadConfig):
        return f"{download(config).as_posix()}: now flawmask run --category {config.category}"
    folder = import_labels(config).dataset_dir.as_posix()
    return f"{folder}: now {shlex.join(['flawmask', 'run', '--dataset_dir', folder])}"


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)  # noqa: T201


def _doctor(config: DoctorConfig) -> int:
    examined = examine(config)
    _print_report(examined, as_json=config.json)
    warn_of_unused(examined.tallies, config.name, strict=config.strict)
    return DEFECT_FOUND if any(problem.severity == "error" for problem in examined.problems) else OK


def _print_report(report: Report, *, as_json: bool) -> None:
    """Print what the doctor found: tables for a person, or one JSON object and nothing else."""
    if as_json:
        _print_lines([json.dumps(report.to_dict(), indent=2, ensure_ascii=False)])
        return
    for table in tables(report):
        Console().print(table)
    _print_lines([f"look at {report.contact_sheet}"] if report.contact_sheet is not None else [])


def _prepare(config: PrepareConfig) -> int:
    names = chosen_categories(config.mvtec_root, config.category, config)
    require(len(names) == 1 or config.output_dir is None, "--output_dir takes one category: leave it out for several")
    table = Table("category", "train", "val", "test", "defective", "left out", "data set")
    status = OK
    for name in names:
        try:
            made = prepare(replace(config, category=name))
        except FlawmaskError as error:
            if len(names) == 1:
                raise
            table.add_row(name, "", "", "", "", "", str(error))
            status = UNUSED if isinstance(error, UnusedError) and status != FAILED else FAILED
            continue
        splits = (made.train, made.val, made.test or {"images": 0, "defective": 0})
        counts = [dataset_info.size(split) for split in splits]
        defective = str(sum(split["defective"] for split in splits))
        table.add_row(name, *counts, defective, str(len(made.left_out)), str(made.dataset_dir))
    Console(markup=False).print(table)
    return status


def _evaluate(config: EvaluateConfig) -> None:
    from flawmask.evaluation.evaluate import evaluate

    judged = evaluate(config)
    if is_main_process():
        _print_lines([summary(judged.metrics), f"look at {(judged.results_dir / 'report.html').as_posix()}"])


def _predict(config: PredictConfig) -> int:
    from flawmask.inference.predict import predict

    found = predict(config)
    if found.unreadable:
        return FAILED
    return DEFECT_FOUND if config.fail_on_defect and found.defective else OK


def _compare(config: CompareConfig) -> int:
    from flawmask.comparison.compare import compare

    compared = compare(config)
    table = Table()
    for name in compared.head:
        table.add_column(name, overflow="fold")
    for row in compared.body:
        table.add_row(*(cell.replace(" (", "\n(") for cell in row))
    Console(markup=False).print(table)
    _print_lines([*compared.said, f"look at {(compared.folder / 'comparison.html').as_posix()}"])
    return FAILED if compared.failed else OK


def _print_finished(finished: list[Finished]) -> int:
    """Print what became of each category: the metrics of one, a table of several."""
    if len(finished) == 1 and finished[0].metrics is not None:
        print(summary(finished[0].metrics))  # noqa: T201
    elif len(finished) > 1:
        table = Table("category", "images", "F1", "precision", "recall", "mask AP", "run")
        for one in finished:
            metrics = one.metrics or {}
            names = ("f1_score", "precision", "recall", "mask_ap")
            figures = [percent(metrics[name]) if metrics else "" for name in names]
            images = str(metrics.get("total_images", ""))
            images += f" of {metrics['groups']} parts" if "groups" in metrics else ""
            table.add_row(one.name, images, *figures, one.error or str(one.run_dir))
        Console(markup=False).print(table)
    for one in finished:
        if one.run_dir is not None:
            reports = sorted(one.run_dir.glob("inference_*/report.html")) if one.metrics is not None else []
            print(f"{one.name}: look at", *(path.as_posix() for path in (one.run_dir, *reports)))  # noqa: T201
    return FAILED if any(one.error for one in finished) else OK
