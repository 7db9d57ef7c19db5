"""The report's tables as plain text, and their four forms: Markdown, CSV, LaTeX and HTML. All figures are times 100."""

import csv
import html
import io
import re
from dataclasses import dataclass

import numpy as np

import tasks
from evaluation import metrics
from reporting.comparison import Cell, Comparison, cells
from reporting.results import START, Collection, Group, Result, rank, task_title

NONE = "–"
READING = (
    "All figures are times 100. Each method has its mean over the runs, in brackets the 95% bootstrap interval over "
    "the rows, and for several runs (seeds) in parentheses the lowest, the highest and their number. All are of a "
    "run's last evaluation; best/ asked again on the rows that it was chosen by is biased upwards. If a task has no "
    "line for the invalid rate, every answer of every method was valid. Among labels, STS-B is answered "
    "with the mean of the numbers, unless a method says `likeliest number`."
)
LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "−": "$-$",
    "·": r"$\cdot$",
}


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


def majority_score(groups: list[Group], metric: str) -> float | None:
    """A metric of always answering the majority label, from the first result that knows it."""
    known = (result.details.get("majority", {}).get(metric) for group in groups for result in group.results)
    return next((value for value in known if value is not None), None)


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def models_of(groups: list[Group]) -> list[str]:
    return list(dict.fromkeys(group.key.model for group in groups))


def score_tables(groups: list[Group]) -> list[Table]:
    """For each model the official metrics of every task (and their mean, if there are several) by method."""
    tables = []
    for model in models_of(groups):
        own = [group for group in groups if group.key.model == model]
        methods = [method for _, method in sorted({(rank(group), group.method) for group in own})]
        keys = list(dict.fromkeys(group.key for group in own))
        table = Table(f"Results of {model}", ["task", "metric", "majority class", *methods], [])
        for key in keys:
            by_method = {group.method: group for group in own if group.key == key}
            table.rows += task_rows(task_title(key, keys), by_method, methods)
        for suite in tasks.SUITES:
            table.rows += suite_row(suite, own, methods)
        for names in dict.fromkeys(result.together for group in own for result in group.results):
            table.rows += mean_row(names, own, methods)
        tables.append(table)
    return tables


def task_rows(title: str, by_method: dict[str, Group], methods: list[str]) -> list[list[str]]:
    """A table row for every metric of one task."""
    groups = list(by_method.values())
    found = {method: cells(group) for method, group in by_method.items()}
    names = groups[0].first.task.metrics
    rows = []
    for metric in [*names, *(["score"] if len(names) > 1 else []), "invalid_rate"]:
        own_cells = [found[method].get(metric) if method in found else None for method in methods]
        if metric == "invalid_rate" and not any(cell and cell.most for cell in own_cells):
            continue  # among the labels alone every answer is valid
        often = None if metric == "invalid_rate" else majority_score(groups, metric)
        rows.append([title, metric.replace("_", " "), percent(often), *map(cell_text, own_cells)])
    return rows


def suite_row(suite: str, groups: list[Group], methods: list[str]) -> list[list[str]]:
    """The row of a suite: each method's score, or its mean over the tasks that are there; none without any."""
    counted = [task.name for task in tasks.suite(suite) if task.in_suite_score]
    row = [suite, "suite score", NONE]
    for method in methods:
        found: dict[str, dict[str, float]] = {}
        for group in groups:
            if group.method == method and group.key.task in counted and group.key.split == "validation":
                each = [result.metrics for result in group.results]
                found[group.key.task] = {m: float(np.mean([r[m] for r in each])) for m in group.first.task.metrics}
        score, missing = metrics.suite_mean(suite, found)
        share = f" (mean of {len(counted) - len(missing)} of {len(counted)} tasks)" if missing else ""
        row.append(f"{percent(score)}{share}" if found else NONE)
    return [row] if any(cell != NONE for cell in row[3:]) else []


def mean_row(names: tuple[str, ...], groups: list[Group], methods: list[str]) -> list[list[str]]:
    """The row of several tasks that one run learned: each method's mean of their scores; none for a single task."""
    if len(names) < 2:
        return []
    row = [f"mean of {', '.join(names)}", "score", NONE]
    for method in methods:
        found = {
            group.key.task: float(np.mean([result.metrics["score"] for result in group.results]))
            for group in groups
            if group.method == method and group.key.task in names and group.key.split == "validation"
        }
        row.append(percent(sum(found.values()) / len(names)) if len(found) == len(names) else NONE)
    return [row]


def comparison_table(comparisons: list[Comparison]) -> Table:
    """PPO minus each baseline, with p."""
    keys = [c.key for c in comparisons]
    several = len({key.model for key in keys}) > 1
    header = [*(["model"] if several else []), "task", "metric", "method", "baseline", "difference", "p", "rows"]
    note = (
        "Paired bootstrap over the rows, of the means over the runs; two-sided p, not corrected for the number of "
        "comparisons. The interval does not include the variance between seeds."
    )
    table = Table("PPO against each baseline, on the same rows", header, [], note)
    for c in comparisons:
        start = [*([c.key.model] if several else []), task_title(c.key, keys), c.metric.replace("_", " ") or "all"]
        start += [c.method, c.baseline]
        if c.reason:
            table.rows.append([*start, f"not comparable: {c.reason}", NONE, NONE])
        else:
            low, high = (f"{100 * value:+.1f}" for value in c.interval)
            table.rows.append([*start, f"{100 * c.difference:+.1f} [{low}, {high}]", f"{c.p:.4f}", str(c.rows)])
    return table


def cost_table(groups: list[Group]) -> Table:
    """Time, samples and peak memory of every method, means over the runs."""
    keys = [group.key for group in groups]
    header = ["model", "task", "method", "runs", "seeds", "samples", "time", "peak memory"]
    note = (
        "Samples are training samples. Time is that of training for heads, SFT and PPO, and that of answering for the "
        "others."
    )
    served = any(r.tokens for group in groups for r in group.results)
    if served:
        header += ["tokens in prompts", "tokens in answers", "price"]
        note += " Tokens are those that a server counted, and the price is theirs by --price_in and --price_out."
    table = Table("Cost of each method, means over its runs", header, [], note)
    for group in groups:
        each = group.results
        seconds = [r.seconds for r in each if r.seconds is not None]
        memory = [r.memory for r in each if r.memory]
        row = [group.key.model, task_title(group.key, keys), group.method, str(len(each))]
        row += [", ".join(str(r.seed) for r in each), f"{np.mean([r.samples for r in each]):.0f}"]
        row += [time_text(float(np.mean(seconds))) if seconds else NONE]
        row += [f"{np.mean(memory) / 1e9:.2f} GB" if memory else NONE]
        table.rows.append([*row, *(paid(each) if served else [])])
    return table


def paid(results: list[Result]) -> list[str]:
    """The cells for tokens in prompts, tokens in answers and their price, means over the results that have them."""
    tokens, costs = [r.tokens for r in results if r.tokens], [r.cost for r in results if r.cost is not None]
    cells = [f"{np.mean([t[name] for t in tokens]):.0f}" if tokens else NONE for name in ("input", "output")]
    return [*cells, f"{np.mean(costs):.4f}" if costs else NONE]


def time_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{seconds:.1f} s" if seconds < 60 else f"{minutes} min {rest} s"


def run_table(found: Collection) -> Table:
    """Every finished run, a row for each of its tasks."""
    header = ["run", "task", "method", "seed", "score before", "score after", "best score"]
    note = (
        "After: the last evaluation, which is what all tables show. Best: the best of several evaluations on the same "
        "rows, so biased upwards."
    )
    table = Table("All finished runs", header, [], note)
    for r in found.results:
        if not r.run.endswith(START):
            texts = map(percent, (r.before, r.metrics.get("score"), r.best))
            table.rows.append([r.run, task_title(r.key, []), r.method, str(r.seed), *texts])
    return table


def markdown(text: str) -> str:
    """Text for Markdown: special characters are escaped, white space is one space."""
    return re.sub(r"([\\|<>*_`\[\]#])", r"\\\1", " ".join(text.split()))


def to_markdown(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(map(markdown, cells)) + " |"

    lines = [line(table.header), "|" + "---|" * len(table.header), *(line(row) for row in table.rows)]
    note = f"\n{table.note}\n" if table.note else ""
    return f"## {markdown(table.title)}\n\n" + "\n".join(lines) + "\n" + note


def latex(text: str) -> str:
    """Text for LaTeX: special characters are spelled out, white space is one space."""
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))


def to_latex(table: Table) -> str:
    """A table for a paper; needs \\usepackage{booktabs} and, for the braces, nothing else."""
    lines = [r"\begin{table*}", r"\centering\small", rf"\caption{{{latex(table.title)}}}"]
    lines += [rf"\begin{{tabular}}{{{'l' * len(table.header)}}}", r"\toprule"]
    rows = [" & ".join(map(latex, row)).replace("[", "{[}").replace("]", "{]}") for row in [table.header, *table.rows]]
    rows = [rf"{row} \\" for row in rows]
    return "\n".join([*lines, rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""])


def to_html(table: Table) -> str:
    def cells(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = "\n".join(cells(row, "td") for row in table.rows)
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    head = f"<thead>{cells(table.header, 'th')}</thead>"
    return f'<div class="scroll"><table>{head}\n<tbody>{body}</tbody></table></div>{note}'


def to_csv(groups: list[Group]) -> str:
    """A line per model, task, metric and method with what the tables show, to four decimals."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = "model task split version metric method mean interval_low interval_high lowest highest runs seeds"
    writer.writerow([*columns.split(), "majority_class"])
    for group in groups:
        same_task = [other for other in groups if other.key == group.key]
        for metric, cell in cells(group).items():
            often = None if metric == "invalid_rate" else majority_score(same_task, metric)
            values = [cell.mean, *(cell.interval or (None, None)), cell.least, cell.most]
            seeds = " ".join(map(str, cell.seeds))
            about = [*group.key, metric, group.method, *map(hundredfold, values)]
            writer.writerow([*about, len(cell.seeds), seeds, hundredfold(often)])
    return text.getvalue()


def hundredfold(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.4f}"
