"""The report's tables as plain text, and their four forms: Markdown, CSV, LaTeX and HTML. All figures are times 100."""

import csv
import html
import io
import re
from dataclasses import dataclass

import numpy as np

import tasks
from reporting.comparison import Cell, Comparison, cells, suite_means
from reporting.results import START, Collection, Group, rank, row_name

NONE = "–"
READING = (
    "All figures are times 100. Of each method: the mean over its runs, in brackets the 95% bootstrap interval over "
    "the rows, and of several runs (seeds) in parentheses the lowest and the highest and how many there are. They "
    "belong to the last evaluation of a run; where best/ is asked again, the rows that chose it flatter it. Where a "
    "task has no line for the invalid rate, every answer of every method was valid."
)
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "–": "--", "−": "$-$", "·": r"$\cdot$",
}  # fmt: skip


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def cell_text(cell: Cell | None) -> str:
    """`89.2 [86.0, 92.1]`, over several runs `89.1 [86.0, 92.1] (89.0–89.2, n=3)`."""
    if cell is None:
        return NONE
    text = f"{100 * cell.mean:.1f}"
    if cell.interval:
        text += f" [{100 * cell.interval[0]:.1f}, {100 * cell.interval[1]:.1f}]"
    if len(cell.seeds) > 1:
        text += f" ({100 * cell.least:.1f}–{100 * cell.most:.1f}, n={len(cell.seeds)})"
    return text


def majority(groups: list[Group], metric: str) -> float | None:
    """A metric of answering always with the majority's label, from the first run of the row that knows it."""
    known = (result.details.get("majority", {}).get(metric) for group in groups for result in group.results)
    return next((value for value in known if value is not None), None)


def models_of(groups: list[Group]) -> list[str]:
    return list(dict.fromkeys(group.row[0] for group in groups))


def results_tables(groups: list[Group]) -> list[Table]:
    """For each model the official metrics of every task (and their mean, where there are several) by method."""
    tables = []
    for model in models_of(groups):
        own = [group for group in groups if group.row[0] == model]
        methods = [method for _, method in sorted({(rank(group), group.method) for group in own})]
        rows = list(dict.fromkeys(group.row for group in own))
        table = Table(f"Results of {model}", ["task", "metric", "majority class", *methods], [])
        for row in rows:
            here = {group.method: group for group in own if group.row == row}
            found = {method: cells(group) for method, group in here.items()}
            metrics = [*next(iter(here.values())).first.task.metrics]
            for metric in [*metrics, *(["score"] if len(metrics) > 1 else []), "invalid_rate"]:
                own_cells = [found[m].get(metric) if m in found else None for m in methods]
                if metric == "invalid_rate" and not any(cell and cell.most for cell in own_cells):
                    continue  # among the labels alone every answer is valid
                often = None if metric == "invalid_rate" else majority(list(here.values()), metric)
                table.rows.append(
                    [row_name(row, rows), metric.replace("_", " "), NONE if often is None else f"{100 * often:.1f}"]
                    + [cell_text(cell) for cell in own_cells]
                )
        for suite in tasks.SUITES:
            table.rows += suite_row(suite, own, methods)
        tables.append(table)
    return tables


def suite_row(suite: str, groups: list[Group], methods: list[str]) -> list[list[str]]:
    """The line of a suite: each method's score, or its mean over the tasks that are there; none if none is."""
    counted = [task for task in tasks.suite(suite) if task.in_suite_score]
    names = {task.name for task in counted}
    line = [suite, "suite score", NONE]
    for method in methods:
        found: dict[str, dict[str, float]] = {}
        for group in groups:
            if group.method == method and group.row[1] in names and group.row[2] == "validation":
                each = [result.metrics for result in group.results]
                found[group.row[1]] = {m: float(np.mean([r[m] for r in each])) for m in group.first.task.metrics}
        if not found:
            line.append(NONE)
            continue
        score, missing = suite_means(found, suite, counted)
        share = f" (mean of {len(found)} of {len(counted)} tasks)" if missing else ""
        line.append(f"{100 * score:.1f}{share}")
    return [line] if any(cell != NONE for cell in line[3:]) else []


def comparison_table(comparisons: list[Comparison]) -> Table:
    """PPO less each baseline, with p."""
    rows = [c.row for c in comparisons]
    several = len({row[0] for row in rows}) > 1
    header = [*(["model"] if several else []), "task", "metric", "method", "baseline", "difference", "p", "rows"]
    table = Table(
        "PPO against each baseline, on the same rows", header, [],
        "Paired bootstrap over the rows, of the means over the runs; two-sided p, not corrected for how many "
        "comparisons there are. Which seeds would have been drawn is not part of the interval.",
    )  # fmt: skip
    for c in comparisons:
        start = [*([c.row[0]] if several else []), row_name(c.row, rows), c.metric.replace("_", " ") or "all"]
        start += [c.method, c.baseline]
        if c.reason:
            table.rows.append([*start, f"not comparable: {c.reason}", NONE, NONE])
        else:
            low, high = (f"{100 * value:+.1f}" for value in c.interval)
            table.rows.append([*start, f"{100 * c.difference:+.1f} [{low}, {high}]", f"{c.p:.4f}", str(c.rows)])
    return table


def cost_table(groups: list[Group]) -> Table:
    """Time, samples and peak memory of every method, means over the runs."""
    rows = [group.row for group in groups]
    table = Table(
        "Cost of each method, means over its runs", ["model", "task", "method", "runs", "seeds", "samples", "time",
                                                     "peak memory"], [],
        "Samples are training samples. The time of PPO and SFT is that of training; of the others, that of answering.",
    )  # fmt: skip
    for group in groups:
        each = group.results
        seconds = [r.seconds for r in each if r.seconds is not None]
        memory = [r.memory for r in each if r.memory]
        table.rows.append([
            group.row[0], row_name(group.row, rows), group.method, str(len(each)),
            ", ".join(str(r.seed) for r in each), f"{np.mean([r.samples for r in each]):.0f}",
            time_text(float(np.mean(seconds))) if seconds else NONE,
            f"{np.mean(memory) / 1e9:.2f} GB" if memory else NONE,
        ])  # fmt: skip
    return table


def time_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{seconds:.1f} s" if seconds < 60 else f"{minutes} min {rest} s"


def run_table(found: Collection) -> Table:
    """Every finished run, one line for each of its tasks."""
    table = Table(
        "All finished runs", ["run", "task", "method", "seed", "score before", "score after", "best score"], [],
        "After: the last evaluation, which is what all tables show. Best: the best of several evaluations on the same "
        "rows, and so better than it would be on others.",
    )  # fmt: skip
    for r in found.results:
        if r.place.endswith(START):
            continue
        moments = (r.before, r.metrics.get("score"), r.best)
        texts = [NONE if value is None else f"{100 * value:.1f}" for value in moments]
        table.rows.append([r.place, row_name((r.model, r.task.name, r.split, r.version), []), r.method, str(r.seed)])
        table.rows[-1] += texts
    return table


# ------------------------------------------------------------------------------------------------------- the forms


def markdown(text: str) -> str:
    """Text for Markdown: what means something to it stands behind a backslash, white space is one space."""
    return re.sub(r"([\\|<>*_`\[\]#])", r"\\\1", " ".join(text.split()))


def to_markdown(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(map(markdown, cells)) + " |"

    lines = [line(table.header), "|" + "---|" * len(table.header), *(line(row) for row in table.rows)]
    note = f"\n{table.note}\n" if table.note else ""
    return f"## {markdown(table.title)}\n\n" + "\n".join(lines) + "\n" + note


def latex(text: str) -> str:
    """Text for LaTeX: every character that means something to it is spelled out, white space is one space."""
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))


def to_latex(table: Table) -> str:
    """A table for a paper; needs \\usepackage{booktabs} and, for the braces, nothing else."""
    lines = [r"\begin{table*}", r"\centering\small", rf"\caption{{{latex(table.title)}}}"]
    lines += [rf"\begin{{tabular}}{{{'l' * len(table.header)}}}", r"\toprule"]
    rows = [" & ".join(latex(cell) for cell in row).replace("[", "{[}").replace("]", "{]}") + r" \\"
            for row in [table.header, *table.rows]]  # fmt: skip
    return "\n".join([*lines, rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""])


def to_html(table: Table) -> str:
    def cells(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = "\n".join(cells(row, "td") for row in table.rows)
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    head = f"<thead>{cells(table.header, 'th')}</thead>"
    return f'<div class="scroll"><table>{head}\n<tbody>{body}</tbody></table></div>{note}'


def to_csv(groups: list[Group]) -> str:
    """A line per model, task, metric and method, with what the tables show of it, unrounded but for the last digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "task", "split", "version", "metric", "method", "mean", "interval_low", "interval_high",
                     "lowest", "highest", "runs", "seeds", "majority_class"])  # fmt: skip
    for group in groups:
        same_row = [other for other in groups if other.row == group.row]
        for metric, cell in cells(group).items():
            often = None if metric == "invalid_rate" else majority(same_row, metric)
            values = [cell.mean, *(cell.interval or (None, None)), cell.least, cell.most]
            model, task, split, version = group.row
            writer.writerow(
                [model, task, split, version, metric, group.method, *map(hundredfold, values), len(cell.seeds),
                 " ".join(map(str, cell.seeds)), hundredfold(often)]
            )  # fmt: skip
    return text.getvalue()


def hundredfold(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.4f}"
