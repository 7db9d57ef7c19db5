"""report.html: one file with its pictures inside, for light and dark screens, wide and narrow; no script in it."""

import base64
import html
import re

from reporting import comparison, figures, tables
from reporting.comparison import Changes
from reporting.results import Collection, Group, row_name
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
    "confusion": "Gold labels (lines) by answers (columns): share of the gold label's rows, and the count.",
    "reliability": "Reliability: accuracy of the answers given with a probability, in ten bins; a larger point has "
    "more rows, and on the dotted line a probability is what it says. The calibration error is the mean distance from "
    "that line.",
}


def file_name(text: str) -> str:
    """What of a text may stand in a file's name."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", text)


def pictures(found: Collection) -> dict[str, tuple[tuple | str | None, str, bytes]]:
    """Every figure that the runs give, by file name: its line of the table, its caption and its PNG.

    What shows all tasks of a model has the model's name in place of a line, what shows all runs None.
    """
    made: dict[str, tuple[tuple | str | None, str, bytes]] = {}
    for model in tables.models_of(found.groups):
        picture = figures.scores([group for group in found.groups if group.row[0] == model])
        if picture:
            name = f"figure-00-{file_name(model)}-scores.png"
            made[name] = (model, f"Scores of {model} with 95% bootstrap intervals.", picture)
    rows = list(dict.fromkeys(group.row for group in found.groups))
    for number, row in enumerate(rows, 1):
        groups = [group for group in found.groups if group.row == row]
        kinds = {"curves": figures.learning_curves, "confusion": figures.confusion, "reliability": figures.reliability}
        for kind, make in kinds.items():
            picture = make(groups)
            if picture:
                name = f"figure-{number:02}-{file_name(row[1])}-{kind}.png"
                made[name] = (row, CAPTIONS[kind], picture)
    fallen = [(name, history) for name, history in found.training if figures.collapsed(history)]
    picture = figures.label_share_plot(fallen)
    if picture:
        made["figure-collapsed-runs.png"] = (None, "Share of each label among the answers in training.", picture)
    return made


def page(found: Collection, shown: list[Table], made: dict[str, tuple]) -> str:
    """The whole page. shown: the tables at its head; made: what `pictures` gives."""
    groups = found.groups
    rows = list(dict.fromkeys(group.row for group in groups))
    head = f"{count(found.finished, 'finished run')}, {count(len(found.unfinished), 'unfinished run')}"
    parts = [f"<h1>Results</h1><p>{head}, {count(len(rows), 'task')} with scores.</p>"]
    parts.append(f"<p class=note>{html.escape(tables.READING)}</p>")
    if not groups:
        parts.append("<p>No finished run has a score yet.</p>")
    parts += [figure(caption, picture) for row, caption, picture in made.values() if isinstance(row, str)]
    for table in shown:
        parts.append(f"<h2>{html.escape(table.title)}</h2>{tables.to_html(table)}")
    for row in rows:
        here = [group for group in groups if group.row == row]
        model = f", {row[0]}" if len({r[0] for r in rows}) > 1 else ""
        parts.append(f"<h2>{html.escape(row_name(row, rows) + model)}</h2>")
        if here[0].first.task.note:
            parts.append(f"<p class=note>{html.escape(here[0].first.task.note)}</p>")
        parts += [figure(*made[name][1:]) for name in made if made[name][0] == row]
        parts += changed(here)
    parts.append("<h2>Collapse</h2>")
    fallen = [figure(caption, picture) for row, caption, picture in made.values() if row is None]
    rule = f"one label with at least {figures.COLLAPSED:.0%} of the answers in two training steps one after the other"
    parts += fallen or [f"<p>In no training run had {rule}.</p>"]
    if fallen:
        parts.append(f"<p class=note>A run is shown here where it had {rule}.</p>")
    runs = tables.run_table(found)
    parts.append(f"<h2>{html.escape(runs.title)}</h2>{tables.to_html(runs)}")
    parts += listed("Unfinished runs", [f"{place}: {left}" for place, left in found.unfinished])
    parts += listed("Left out", found.skipped)
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Results</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def listed(title: str, lines: list[str]) -> list[str]:
    """A heading and a list, if there is anything to list."""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return [f"<h2>{title}</h2><ul>{items}</ul>"] if lines else []


def figure(caption: str, picture: bytes) -> str:
    """A PNG inside the page, in its own size: what is too wide for a phone is moved sideways."""
    data, width = base64.b64encode(picture).decode(), int.from_bytes(picture[16:20], "big") * 7 // 10
    text = html.escape(caption)
    return (
        f'<figure><img width="{width}" alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption>'
        "</figure>"
    )


def changed(groups: list[Group]) -> list[str]:
    """Which rows PPO fixed and which it broke, against zero-shot and against SFT, in parts that can be unfolded."""
    parts = []
    for method, baseline in comparison.pairs(groups):
        if not baseline.first.kind.startswith(("zero-shot", "SFT")):
            continue
        found = comparison.changes(method, baseline)
        if found is None:
            continue
        number = found.result.task.number
        words = ("came closer", "went farther away") if number else ("fixed", "broken")
        parts.append(f"<h3>{html.escape(f'{method.method} against {baseline.method}')}</h3>")
        parts.append(
            f"<p>Of {found.rows} rows {len(found.fixed)} {words[0]}, {len(found.broken)} {words[1]} "
            f"({html.escape(found.result.place)} against {html.escape(found.baseline.place)}).</p>"
        )
        parts += [changed_rows(word, lines, found) for word, lines in zip(words, (found.fixed, found.broken)) if lines]
    return parts


def changed_rows(word: str, lines: list[tuple[dict, dict]], found: Changes) -> str:
    """The first of the changed rows, as a table that is folded up."""
    header = ["prompt, its end", "gold", f"answer, {found.baseline.kind}", f"answer, {found.result.kind}"]
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
    """An answer's text, and its label where the text is another."""
    label = "invalid" if line["label"] is None else str(line["label"])
    return line["answer"] if line["answer"].strip() == label else f"{line['answer']}\n({label})"
