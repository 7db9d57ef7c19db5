"""report.html: one file that embeds its pictures, for light and dark, wide and narrow screens; it has no script."""

import base64
import html
import re

from reporting import comparison, figures, tables
from reporting.comparison import Changes
from reporting.results import HEAD, SFT, ZERO_SHOT, Collection, Group, TaskKey, task_title
from reporting.tables import Table

SHOWN = 20  # changed rows of each kind that are listed
PROMPT_SHOWN = 400  # characters of a prompt's end
STYLE = """
:root { color-scheme: light dark; --ink: #1c1d1f; --soft: #5d6066; --line: #d8dade; --back: #ffffff; --tint: #f3f4f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7ea; --soft: #a3a7ae; --line: #3a3d43; --back: #15171a; --tint: #1f2226; }
}
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--back); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin-top: 1.6rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } td { white-space: nowrap; } tbody tr:hover { background: var(--tint); }
.rows td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 5rem; } .rows td:first-child { min-width: 18rem; }
figure { margin: .8rem 0; overflow-x: auto; } figure img { max-width: none; height: auto; }
figcaption, .note { color: var(--soft); font-size: .85rem; max-width: 50rem; }
summary { cursor: pointer; } ul { padding-left: 1.2rem; } li { overflow-wrap: anywhere; }
"""
CAPTIONS = {
    "curves": "Learning curves: the line is the mean over the runs, the band goes from the lowest to the highest run.",
    "confusion": "Gold labels (rows) by answers (columns): share of the gold label's rows, and the count.",
    "reliability": "Reliability: accuracy of the answers by their probability, in ten bins; a larger point has more "
    "rows, and the dotted line is perfect calibration. The calibration error is the mean distance from that line.",
}


def file_name(text: str) -> str:
    """A text with what a file's name must not contain replaced."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", text)


def pictures(found: Collection) -> dict[str, tuple[TaskKey | str | None, str, bytes]]:
    """Every figure that the runs give, by file name: what it shows, its caption and its PNG.

    It shows one task (its key), all tasks of a model (the model's name), or all runs (None).
    """
    made: dict[str, tuple[TaskKey | str | None, str, bytes]] = {}
    for model in tables.models_of(found.groups):
        picture = figures.scores([group for group in found.groups if group.key.model == model])
        if picture:
            name = f"figure-00-{file_name(model)}-scores.png"
            made[name] = (model, f"Scores of {model} with 95% bootstrap intervals.", picture)
    kinds = {"curves": figures.learning_curves, "confusion": figures.confusion, "reliability": figures.reliability}
    for number, key in enumerate(dict.fromkeys(group.key for group in found.groups), 1):
        groups = [group for group in found.groups if group.key == key]
        for kind, make in kinds.items():
            picture = make(groups)
            if picture:
                made[f"figure-{number:02}-{file_name(key.task)}-{kind}.png"] = (key, CAPTIONS[kind], picture)
    picture = figures.label_share_plot([(name, lines) for name, lines in found.training if figures.collapsed(lines)])
    if picture:
        made["figure-collapsed-runs.png"] = (None, "Share of each label among the answers in training.", picture)
    return made


def page(found: Collection, shown: list[Table], made: dict[str, tuple]) -> str:
    """The whole page. shown: the tables at its head; made: what `pictures` gives."""
    groups = found.groups
    keys = list(dict.fromkeys(group.key for group in groups))
    head = f"{count(found.finished, 'finished run')}, {count(len(found.unfinished), 'unfinished run')}"
    parts = [f"<h1>Results</h1><p>{head}, {count(len(keys), 'task')} with scores.</p>"]
    parts.append(f"<p class=note>{html.escape(tables.READING)}</p>")
    if not groups:
        parts.append("<p>No finished run has a score yet.</p>")
    parts += [figure(caption, picture) for about, caption, picture in made.values() if isinstance(about, str)]
    parts += [section(table) for table in shown]
    for key in keys:
        parts += task_section(key, keys, [group for group in groups if group.key == key], made)
    parts += collapse_section([(caption, picture) for about, caption, picture in made.values() if about is None])
    parts.append(section(tables.run_table(found)))
    parts += listed("Unfinished runs", [f"{run}: {left}" for run, left in found.unfinished])
    parts += listed("Left out", found.skipped)
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Results</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def section(table: Table) -> str:
    return f"<h2>{html.escape(table.title)}</h2>{tables.to_html(table)}"


def task_section(key: TaskKey, keys: list[TaskKey], groups: list[Group], made: dict[str, tuple]) -> list[str]:
    """One task's figures and the rows that changed."""
    model = f", {key.model}" if len({other.model for other in keys}) > 1 else ""
    parts = [f"<h2>{html.escape(task_title(key, keys) + model)}</h2>"]
    if groups[0].first.task.note:
        parts.append(f"<p class=note>{html.escape(groups[0].first.task.note)}</p>")
    parts += [figure(caption, picture) for about, caption, picture in made.values() if about == key]
    return parts + changed(groups)


def collapse_section(collapsed: list[tuple[str, bytes]]) -> list[str]:
    """Figures, with their captions, of the runs that collapsed."""
    rule = f"one label with at least {figures.COLLAPSED:.0%} of the answers in two consecutive training steps"
    if not collapsed:
        return ["<h2>Collapse</h2>", f"<p>No training run had {rule}.</p>"]
    shown = [figure(caption, picture) for caption, picture in collapsed]
    return ["<h2>Collapse</h2>", *shown, f"<p class=note>A run is shown here if it had {rule}.</p>"]


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def listed(title: str, lines: list[str]) -> list[str]:
    """A heading and a list, if there is anything to list."""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return [f"<h2>{title}</h2><ul>{items}</ul>"] if lines else []


def figure(caption: str, picture: bytes) -> str:
    """A PNG inside the page, in its own size: what is too wide for a phone scrolls sideways."""
    data, width = base64.b64encode(picture).decode(), int.from_bytes(picture[16:20], "big") * 7 // 10
    text = html.escape(caption)
    return (
        f'<figure><img width="{width}" alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption>'
        "</figure>"
    )


def changed(groups: list[Group]) -> list[str]:
    """Which rows PPO fixed and which it broke against zero-shot, a head and SFT, in parts that unfold."""
    parts = []
    for method, baseline in comparison.pairs(groups):
        if not baseline.first.kind.startswith((ZERO_SHOT, HEAD, SFT)):
            continue
        found = comparison.changes(method, baseline)
        if found is None:
            continue
        number = found.result.task.number
        words = ("came closer", "moved away") if number else ("fixed", "broken")
        parts.append(f"<h3>{html.escape(f'{method.method} against {baseline.method}')}</h3>")
        parts.append(
            f"<p>Of {found.rows} rows {len(found.fixed)} {words[0]}, {len(found.broken)} {words[1]} "
            f"({html.escape(found.result.run)} against {html.escape(found.baseline.run)}).</p>"
        )
        parts += [changed_rows(word, lines, found) for word, lines in zip(words, (found.fixed, found.broken)) if lines]
    return parts


def changed_rows(word: str, lines: list[tuple[dict, dict]], found: Changes) -> str:
    """The first of the changed rows, as a folded table."""
    header = ["prompt (its end)", "gold", f"answer, {found.baseline.kind}", f"answer, {found.result.kind}"]
    rows = []
    for before, after in lines[:SHOWN]:
        prompt = after["prompt"] if len(after["prompt"]) <= PROMPT_SHOWN else "…" + after["prompt"][-PROMPT_SHOWN:]
        rows.append([prompt, str(after["gold"]), said(before), said(after)])
    some = f" (the first {SHOWN} of {len(lines)})" if len(lines) > SHOWN else f" ({len(lines)})"
    return (
        f"<details><summary>{word}{some}</summary>"
        f"<div class=rows>{tables.to_html(Table('', header, rows))}</div></details>"
    )


def said(line: dict) -> str:
    """An answer's text, and its label if that differs from the text."""
    label = "invalid" if line["label"] is None else str(line["label"])
    return line["answer"] if line["answer"].strip() == label else f"{line['answer']}\n({label})"
