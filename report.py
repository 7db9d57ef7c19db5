"""A report of all runs below a folder: tables with intervals and tests, learning curves, and the rows that changed.

    python report.py                                   the runs below model/, the report in report/
    python report.py --runs model/RTE --output_dir rte

report.html is a single file that can be passed on (no server, no network, no script). report.md is for a README,
report.csv for further computation, report.tex for a paper; the figures are PNG files beside them. Nothing is run again:
all of it comes from the runs' summary.json, history.jsonl and predictions.jsonl, and belongs to their last evaluation.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from machine.errors import ArgumentError, clear_errors
from run.parser import Parser, option

if TYPE_CHECKING:
    from reporting.results import Collection

FILES = ("report.html", "report.md", "report.csv", "report.tex")


@dataclass
class ReportArguments:
    """What report.py takes."""

    runs: str = option("model", "run", "folder with the runs, at any depth below it")
    output_dir: str = option("report", "run", "folder of the report; an older report in it is replaced")


def contents(found: Collection) -> dict[str, bytes]:
    """Every file of the report by its name."""
    from reporting import comparison, page, tables

    groups = found.groups
    shown = tables.score_tables(groups)
    compared = comparison.compare_all(groups)
    shown += [tables.comparison_table(compared)] if compared else []
    shown += [tables.cost_table(groups)] if groups else []
    made = page.pictures(found)
    left = [f"- {tables.markdown(f'{run}: {text}')}" for run, text in found.unfinished]
    markdown = [tables.to_markdown(table) for table in shown]
    markdown += ["## Unfinished runs\n\n" + "\n".join(left) + "\n"] if left else []
    texts = {
        "report.html": page.page(found, shown, made),
        "report.md": tables.READING + "\n\n" + "\n".join(markdown),
        "report.csv": tables.to_csv(groups),
        "report.tex": "% Needs \\usepackage{booktabs}.\n" + "\n".join(tables.to_latex(table) for table in shown),
    }
    files = {name: text.encode("utf-8", errors="replace") for name, text in texts.items()}
    return files | {name: picture for name, (_, _, picture) in made.items()}


def check_output(folder: Path) -> None:
    """Raises ArgumentError unless the folder is new, empty, or holds a report and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"--output_dir {folder} is a file; give a folder")
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    other = sorted(n for n in names if n not in FILES and not (n.startswith("figure-") and n.endswith(".png")))
    if other:
        raise ArgumentError(
            f"--output_dir {folder} holds {other[0]}, which is not part of a report; give another folder"
        )


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Replace the folder by one with these files, by two renames: no reader sees a part of either."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        new = aside / "new"
        new.mkdir()
        for name, data in files.items():
            (new / name).write_bytes(data)
        if folder.exists():
            folder.rename(aside / "old")
        try:
            new.rename(folder)
        except OSError:
            if (aside / "old").exists():
                (aside / "old").rename(folder)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(ReportArguments, __doc__.splitlines()[0], prog="report.py")
    arguments = ReportArguments(**vars(parser.parse_args(argv)))
    with clear_errors("report.py"):
        root, folder = Path(arguments.runs), Path(arguments.output_dir)
        if not root.is_dir():
            raise ArgumentError(f"--runs {root} is not a folder; give the one that the runs lie below, such as model/")
        check_output(folder)
        # Not at the top of the file: they take seconds to import, and bad input is refused without them.
        from reporting import page
        from reporting.collect import collect

        found = collect(root)
        if not (found.results or found.unfinished or found.skipped):
            raise ArgumentError(
                f"--runs {root} holds no run (no summary.json below it); train or answer something first"
            )
        for line in found.skipped:
            print(f"report.py: warning: {line}", file=sys.stderr)
        try:
            write(folder, contents(found))
        except OSError as error:
            raise ArgumentError(
                f"--output_dir {folder} cannot be written ({error.strerror}); choose a folder that you may write to"
            ) from error
    unfinished = page.count(len(found.unfinished), "unfinished run")
    print(f"{page.count(found.finished, 'finished run')} of {root}, {unfinished}.")
    print(f"The report is {folder / 'report.html'}; beside it lie {', '.join(FILES[1:])} and the figures.")


if __name__ == "__main__":
    main()
