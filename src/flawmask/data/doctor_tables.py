"""The doctor's report as tables for a terminal."""

from itertools import groupby

from rich.table import Table
from rich.text import Text

from flawmask.data.doctor import Report

SHOWN = 5
"""How many sizes, and examples of each kind of problem, are shown."""


def tables(report: Report) -> list[Table]:
    """Return the report as tables for a terminal: counts, sizes, and problems if there are any."""
    return [_counts_table(report), _sizes_table(report), *([_problems_table(report)] if report.problems else [])]


def _counts_table(report: Report) -> Table:
    table = Table("split", "type", title=Text(f"{report.name}: images"))
    for heading in ("images", "defective", "instances"):
        table.add_column(heading, justify="right")
    for count in report.counts:
        numbers = (count.images, count.defective, count.instances)
        table.add_row(Text(count.split), Text(count.type), *map(str, numbers))
    return table


def _sizes_table(report: Report) -> Table:
    """Return a table of the most frequent sizes. (Parts cropped by hand have nearly as many sizes as images.)"""
    table = Table(title=Text(f"{report.name}: sizes in pixels"))
    for heading in ("width", "height", "images"):
        table.add_column(heading, justify="right")
    for size in report.sizes[:SHOWN]:
        table.add_row(str(size.width), str(size.height), str(size.images))
    if others := report.sizes[SHOWN:]:
        widths, heights = [size.width for size in others], [size.height for size in others]
        spans = [f"{min(sides)} to {max(sides)}" for sides in (widths, heights)]
        table.add_row(*spans, str(sum(size.images for size in others)))
    return table


def _problems_table(report: Report) -> Table:
    """Return a table with one row for each kind of problem, with its first examples."""
    table = Table(title=Text(f"{report.name}: problems"), show_lines=True)
    table.add_column("kind")
    table.add_column("count", justify="right")
    table.add_column("examples", overflow="fold")
    for (severity, kind), group in groupby(report.problems, key=lambda problem: (problem.severity, problem.kind)):
        found = list(group)
        examples = [f"{problem.where} {problem.message}" for problem in found[:SHOWN]]
        examples += [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        # `Text`, because rich would read [brackets] in a file name as markup.
        style = "red" if severity == "error" else "yellow"
        table.add_row(Text(f"{severity}: {kind}", style), str(len(found)), Text("\n".join(examples)))
    return table
