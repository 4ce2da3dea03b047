"""The command line. It is generated from the settings classes of the stages: a field's docstring is its help text."""

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
from flawmask.export.config import ExportConfig
from flawmask.inference.config import PredictConfig
from flawmask.launch import THREAD_NAME, is_main_process, own_process
from flawmask.pipeline import DemoCommand, demo, run
from flawmask.progress import log_to, show_details, show_progress_on
from flawmask.report.config import ReportConfig
from flawmask.serve.config import ServeConfig
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
    "serve": ServeConfig,
    "export": ExportConfig,
    "demo": DemoCommand,
    "compare": CompareConfig,
    "report": ReportConfig,
    "doctor": DoctorConfig,
}

DESCRIPTION = """Flawmask finds and outlines defects on manufactured parts. It trains a network on a folder of labelled
images, measures how good it is, and outlines the defects on new images. `flawmask demo --run` shows all steps on images
that it draws itself. `flawmask run --root parts --category bottle` takes your images, which are in parts/bottle.
`flawmask COMMAND --help` explains a command."""

FLAGS = {
    "mvtec_root": tyro.conf.arg(aliases=("--root",)),
    "layout": tyro.conf.arg(metavar=f"{{{','.join((AUTO, *LAYOUTS))}}}"),
    "source_format": tyro.conf.arg(name="from"),
}
"""Options of flags that their settings' fields do not have, by the name of the setting."""

SERVER_PACKAGES = "fastapi fastapi-offline prometheus-client python-multipart uvicorn"
"""The packages of the extra `serve`. Beside flawmask-runtime, the extra itself would install PyTorch."""

MEMORY_SETTINGS = ("batch_size", "inference_batch_size", "image_size", "max_proposals")
"""Settings that save memory when they are lowered. Those that change no result come first."""

OK, DEFECT_FOUND, FAILED, UNUSED, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141
"""The exit statuses. docs/formats.md explains them. A status above 128 is 128 plus the number of a signal."""


def main(command: str | None = None, **defaults: Any) -> None:
    """Run the command line and exit the process with one of the statuses in docs/formats.md.

    Args:
        command: the name of a subcommand, for a script that is one subcommand.
        defaults: settings whose defaults differ in that script.
    """
    status = _run_command([*([command] if command else []), *sys.argv[1:]], defaults)
    if any(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate()):
        # A thread hangs, for example while it reads a file on a dead mount. Python would wait for it forever.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _run_command(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Run one command and return its exit status. An error that the user can fix is one line on stderr."""
    own_process()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may have letters that the output's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    status = FAILED
    console = Console(stderr=True)
    log_to(console)
    show_progress_on(console if is_main_process() else None)
    try:
        return _execute(arguments, defaults)
    except RecordsError as error:
        reasons = [f"{error.path}: {problem}" for problem in error.problems]
    except UnusedError as error:
        reasons, status = [str(error)], UNUSED
    except FlawmaskError as error:
        reasons = [str(error)]
    except BrokenPipeError:  # the program that read the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest when it ends
        return BROKEN_PIPE
    except OSError as error:
        reasons = [f"{error.filename or 'the disk'}: {error.strerror or error}"]
    except (RuntimeError, MemoryError) as error:
        if not _ran_out_of_memory(error):
            raise
        reasons = [f"memory ran out: {_memory_advice(arguments[0])}"]
    except KeyboardInterrupt:
        console.print("interrupted")
        return INTERRUPTED
    finally:
        show_progress_on(None)
    for reason in reasons:
        console.print(f"error: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    return status


def _ran_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    if isinstance(error, MemoryError) or "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from flawmask.runtime import is_out_of_memory

    # "exited unexpectedly": the system killed a data loader's process, which happens when memory runs out.
    return is_out_of_memory(error) or "exited unexpectedly" in str(error)


def _memory_advice(command: str) -> str:
    """Return advice on how a command can use less memory."""
    names = {field.name for field in fields(COMMANDS[command])}  # type: ignore[arg-type]
    flags = [f"--{name}" for name in MEMORY_SETTINGS if name in names]
    if not flags:
        return "close other programs"
    return f"lower {', then '.join(flags)}" + (", and try --workers 0" if "workers" in names else "")


def _execute(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Parse the arguments, run the command, flush its output, and return its exit status."""
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
    """Return the command's settings, and whether --verbose was given, which is no setting of the stage."""
    parsed = tyro.extras.subcommand_cli_from_dict(
        {name: _as_flags(kind, defaults) for name, kind in COMMANDS.items()},
        prog="flawmask",
        description=DESCRIPTION,
        args=list(arguments),
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    kind = COMMANDS[arguments[0]]
    settings = {field.name: getattr(parsed, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**settings), parsed.verbose


def _as_flags(kind: Callable[..., Any], defaults: Mapping[str, Any]) -> type:
    """Return a subclass of a command's settings: with the flags' options, other defaults, and a --verbose flag."""
    verbose = Annotated[
        bool, tyro.conf.arg(help="Log more details, such as which pretrained weights do not fit the network.")
    ]
    former_names = {name: former for former, name in getattr(kind, "FORMER_NAMES", {}).items()}
    options = FLAGS | {name: tyro.conf.arg(aliases=(f"--{former}",)) for name, former in former_names.items()}
    changed = [
        (field.name, Annotated[field.type, options.get(field.name)], defaults.get(field.name, field.default))
        for field in fields(kind)  # type: ignore[arg-type]
        if field.name in options.keys() | defaults
    ]
    flags = [("verbose", verbose, False), *changed]
    flag_class = make_dataclass(kind.__name__, flags, bases=(kind,), frozen=True, kw_only=True)  # type: ignore[arg-type]
    flag_class.__doc__ = kind.__doc__
    return flag_class


def _dispatch(config: Any) -> int:  # noqa: PLR0911, PLR0912 - a case for each command
    """Run the command whose settings these are, and return the exit status."""
    match config:
        case RunConfig():
            return _print_results(run(config))
        case DemoCommand():
            return _print_results(demo(config))
        case DownloadConfig() | ImportConfig():
            _print_lines([_fetch(config)])
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
        case ServeConfig():
            _serve(config)
        case ExportConfig():
            from flawmask.export.export import PAGE, export

            exported = export(config)
            _print_lines([f"look at {(exported.folder / PAGE).as_posix()}"] if exported.parity is not None else [])
        case CompareConfig():
            return _compare(config)
        case ReportConfig():
            from flawmask.report.side_by_side import report

            _print_lines(f"look at {page.as_posix()}" for page in report(config))
        case DoctorConfig():
            return _doctor(config)
    return OK


def _fetch(config: DownloadConfig | ImportConfig) -> str:
    """Download a category or import labels; return the folder and the next command."""
    if isinstance(config, DownloadConfig):
        return f"{download(config).as_posix()}: next: flawmask run --category {config.category}"
    folder = import_labels(config).dataset_dir.as_posix()
    return f"{folder}: next: {shlex.join(['flawmask', 'run', '--dataset_dir', folder])}"


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)  # noqa: T201


def _doctor(config: DoctorConfig) -> int:
    examined = examine(config)
    _print_report(examined, as_json=config.json)
    warn_of_unused(examined.tallies, config.name, strict=config.strict)
    return DEFECT_FOUND if any(problem.severity == "error" for problem in examined.problems) else OK


def _print_report(report: Report, *, as_json: bool) -> None:
    """Print the doctor's report: as tables, or as one JSON object and nothing else."""
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

    evaluated = evaluate(config)
    if is_main_process():
        _print_lines([summary(evaluated.metrics), f"look at {(evaluated.results_dir / 'report.html').as_posix()}"])


def _predict(config: PredictConfig) -> int:
    if config.records is not None:
        from flawmask.inference.archive import predict_records

        recorded = predict_records(config)
        if recorded.without_verdict:
            return FAILED
        return DEFECT_FOUND if config.fail_on_defect and recorded.defective else OK
    from flawmask.inference.predict import predict

    predicted = predict(config)
    if predicted.unreadable:
        return FAILED
    return DEFECT_FOUND if config.fail_on_defect and predicted.defective else OK


def _serve(config: ServeConfig) -> None:
    try:
        from flawmask.serve.server import serve
    except ImportError as error:
        raise FlawmaskError(f"the server needs {error.name}: pip install {SERVER_PACKAGES}") from None
    serve(config)


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


def _print_results(finished: list[Finished]) -> int:
    """Print the metrics of one category, or a table of several, and where the results are."""
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
