"""What a table says about its task: which columns hold texts and labels, the labels or the range of numbers.

Columns are guessed where there is no doubt: by their usual names, or because there are only two. Whoever is in doubt
names them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from machine.errors import DataError
from tasks import wording
from tasks.labels import fold
from tasks.readers import short_repr
from tasks.table import NUMBER_METRICS, OWN_METRICS, TASKS, Task
from tasks.tables import Table, read_table, to_number

# The usual names, the surest first; of several in a table the first one of the list is taken.
TEXT = ("text", "sentence", "message", "review", "comment", "post", "tweet", "utterance", "content", "body", "document",
        "description", "question", "query", "input", "prompt", "statement", "headline", "title", "subject")  # fmt: skip
LABEL = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "emotion", "tag", "queue",
         "department", "priority", "status", "type", "score", "rating", "stars", "kind", "y")  # fmt: skip
SURE = ("text", "label")  # names that leave no doubt, whatever else the table has
# Names that a row, a prompt or a reward function gives another meaning.
RESERVED = {"id", "label", "words", "answers", "descriptions", "prompt", "prompt_ids", "completions", "ended", "task"}
MOST_LABELS = 500
SHOWN = 10  # labels that are named to people
STEPS = 50  # about so many numbers are the answers of a number task
NUMBER = re.compile(r"[-+]?(?:\d+(?:[.,]\d+)?|[.]\d+)(?:[eE][-+]?\d+)?")
THOUSANDS = re.compile(r"[-+]?\d{1,3},\d{3}")  # this comma may stand before thousands or before decimals
DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}(?:[T ]\d{1,2}:\d{2}\S*(?: ?[AP]M)?)?")


def task_of(path: str, text_columns: str = "", label_column: str = "") -> Task:
    """The task that a table is. The columns are named (texts with commas between), or guessed.

    Raises DataError if the table cannot be read, its columns are in doubt, or they hold no texts or labels.
    """
    table = read_table(path)
    columns = guess_columns(path, text_columns, label_column, table)
    name = Path(path).stem if Path(path).stem not in TASKS else Path(path).name
    task = Task(
        name=re.sub(r"[^\w.-]+", "-", name).strip("-") or "table",
        folder="",
        files={"train": (str(Path(path).absolute()),)},
        columns=columns,
        fields=tuple(field for field in columns if field != "label"),
        passage=tuple(field for field in columns if field != "label"),
        metrics=(),
        format="table",
    )
    task = with_answers(task, path, table)
    texts = {field: columns[field] for field in task.fields}
    said = wording.built(texts, columns["label"], task.words, task.number, {})
    return replace(task, metrics=NUMBER_METRICS if task.number else OWN_METRICS, wording=said)


# -------------------------------------------------------------------------------------------------------------- columns


def guess_columns(
    path: str, text_columns: str = "", label_column: str = "", table: Table | None = None
) -> dict[str, str]:
    """The columns of a table by field: those of its texts, and `label`. DataError if there is any doubt.

    table: what the path holds, if it was read already.
    """
    table = table or read_table(path)
    label = _named(path, table, label_column, "--label_column") if label_column else None
    texts = [_named(path, table, name, "--text_columns") for name in text_columns.split(",") if name.strip()]
    if label in texts:
        raise DataError(f"{path}: --label_column {label_column} is one of --text_columns {text_columns}; name another.")
    free = [column for column in table.columns if column not in (label, *texts)]
    if label is None:
        label = _guess_label(path, table, free, texts)
    if not texts:
        texts = [_guess_text(path, table, [column for column in free if column != label], label)]
    _check_texts(path, table, texts)
    return _fields(texts) | {"label": label}


def _named(path: str, table: Table, name: str, option: str) -> str:
    """The column of this name, whatever its case."""
    name = name.strip()
    found = [column for column in table.columns if column == name]
    found = found or [column for column in table.columns if column.casefold() == name.casefold()]
    if len(found) != 1:
        raise DataError(f"{path}: {option} {name} is no column; there are {_listed(table.columns)}.")
    return found[0]


def _usual(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns that bear one of the usual names, in the order of these."""
    by_name = {column.strip().casefold(): column for column in columns}
    return [by_name[name] for name in names if name in by_name]


def _guess_label(path: str, table: Table, free: list[str], texts: list[str]) -> str:
    usual = _usual(free, LABEL)
    if usual and (len(usual) == 1 or usual[0].casefold() in SURE):
        return usual[0]
    if len(free) == 1 and texts:
        return free[0]
    if len(free) == 2 and not usual:  # the label is the one that repeats itself
        text = _usual(free, TEXT)[:1]
        if not text:
            text = [column for column in free if _repeats(table, column) < 2]
        if len(text) == 1:
            return next(column for column in free if column not in text)
    doubt = f"{_listed(usual)} may hold the labels" if usual else "no column is known to hold the labels"
    raise DataError(f"{path}: {doubt}; name it with --label_column. The columns are {_listed(table.columns)}.")


def _guess_text(path: str, table: Table, free: list[str], label: str) -> str:
    usual = _usual(free, TEXT)
    if usual and (len(usual) == 1 or usual[0].casefold() in SURE):
        return usual[0]
    if len(free) == 1:
        return free[0]
    doubt = f"{_listed(usual)} may hold the texts" if usual else "no column is known to hold the texts"
    raise DataError(
        f"{path}: {doubt}; name one or more with --text_columns, such as --text_columns "
        f"{','.join((usual or free or ['text'])[:2])}. The columns are {_listed(table.columns)}."
    )


def _repeats(table: Table, column: str) -> float:
    """How often a value of the column stands in it, on average."""
    values = table.values(column)
    return len(values) / max(1, len(set(values)))


def _check_texts(path: str, table: Table, columns: list[str]) -> None:
    """DataError if the columns hold nothing to read: dates or numbers alone, or nothing."""
    for column in columns:
        values = table.values(column)
        if not values:
            raise DataError(f"{path}: the column {column!r} is empty; name another with --text_columns.")
        if column not in table.dates and not all(DATE.fullmatch(v.strip()) or _is_number(v) for v in values):
            return
    column = columns[0]
    what = "dates" if column in table.dates or DATE.fullmatch(table.values(column)[0].strip()) else "numbers"
    raise DataError(
        f"{path}: the column {column!r} holds {what} ({short_repr(table.values(column)[0])}), not texts; name the "
        f"texts with --text_columns. The columns are {_listed(table.columns)}."
    )


def _fields(columns: list[str]) -> dict[str, str]:
    """A name for every column that can stand in braces: `Message text` -> `message_text`."""
    fields: dict[str, str] = {}
    for column in columns:
        name = re.sub(r"\W+", "_", column.strip().lower()).strip("_") or "text"
        name = f"text_{name}" if name in RESERVED or not name.isidentifier() else name
        while name in fields:
            name += "_"
        fields[name] = column
    return fields


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(map(repr, columns[:20]))
    return f"{shown} and {len(columns) - 20} more" if len(columns) > 20 else shown


# --------------------------------------------------------------------------------------------------- labels and numbers


def with_answers(task: Task, path: str, table: Table | None = None) -> Task:
    """The task with the labels and words of its training file, or its numbers if the labels have decimals.

    Raises DataError for labels that are missing, cannot be told apart, or are no labels.
    """
    table = table or read_table(path)
    column = task.columns["label"]
    if column not in table.columns:
        raise DataError(f"{path}: has no column {column!r} for the label; there are {_listed(table.columns)}.")
    empty = [number for number, record in table.records if not (record[column] or "").strip()]
    if empty:
        raise DataError(
            f"{path}, row {empty[0]}: the label ({column}) is empty, as in {len(empty)} of {len(table.records)} rows; "
            "fill it in, or take the rows out."
        )
    found = Counter(value.strip() for value in table.values(column))
    if column in table.dates or all(DATE.fullmatch(value) for value in found):
        raise DataError(f"{path}: the label ({column}) holds dates; name another column with --label_column.")
    if all(_is_number(value) for value in found) and any(not _is_whole(value) for value in found):
        return replace(task, number=True, words=_numbers_of(path, column, [to_number(value) for value in found]))
    if len(found) > MOST_LABELS:
        raise DataError(
            f"{path}: the label ({column}) has {len(found)} distinct values, at most {MOST_LABELS} can be told apart; "
            "name another column with --label_column, or give a YAML file with `range` if they are numbers."
        )
    once = sorted(value for value, count in found.items() if count < 2)
    problem = label_problem(list(found))
    if not problem and once:
        problem = f"has only one row of {_listed(once)}; one is trained on and one held out, so add rows or rename it"
    if problem:
        raise DataError(f"{path}: the label ({column}) {problem}.")
    labels = tuple(sorted(found, key=lambda value: (to_number(value) if _is_number(value) else math.inf, value)))
    return replace(task, labels=labels, words=tuple(label.lower() for label in labels))


def label_problem(labels: Sequence[str]) -> str:
    """Why no answer could tell these labels apart, or could be one; empty if they are in order."""
    if len(labels) < 2:
        return f"has only {_listed(labels) or 'nothing'}; a task needs two labels or more"
    known: dict[str, str] = {}
    for label in labels:
        if not label.strip() or label != label.strip() or not label.isprintable() or "<" in label:
            return f"has {short_repr(label)}, which is no word that a model can answer; rename it (no '<', one line)"
        other = known.setdefault(fold(label), label)
        if other != label or labels.count(label) > 1:
            return f"has {other!r} and {label!r}, which no answer tells apart; spell them alike, or rename one"
    return ""


def _is_number(text: str) -> bool:
    text = text.strip()
    return bool(NUMBER.fullmatch(text)) and not THOUSANDS.fullmatch(text) and math.isfinite(to_number(text))


def _is_whole(text: str) -> bool:
    return text.strip().lstrip("+-").isdecimal()


def _numbers_of(path: str, column: str, values: list[float]) -> tuple[str, ...]:
    """The numbers to answer with: from the lowest value to the highest, in even steps."""
    low, high = min(values), max(values)
    if low == high:
        raise DataError(f"{path}: the label ({column}) is always {low:g}; there is nothing to learn.")
    step = step_for(low, high)
    first, last = math.floor(Decimal(repr(low)) / step), math.ceil(Decimal(repr(high)) / step)
    return numbers(first * step, last * step, step)


def step_for(low: float, high: float) -> Decimal:
    """1, 2 or 5 times a power of ten that divides the range into about STEPS steps."""
    rough = Decimal(repr(high - low)) / STEPS
    power = Decimal(1).scaleb(rough.adjusted())
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)


def numbers(low: Decimal, high: Decimal, step: Decimal) -> tuple[str, ...]:
    """Every number from low to high, all with the same decimals."""
    places = max(0, *(-value.normalize().as_tuple().exponent for value in (low, high, step)))
    return tuple(f"{low + i * step:.{places}f}" for i in range(int((high - low) / step) + 1))


# ----------------------------------------------------------------------------------------------------- what was guessed


def description(task: Task, train: Sequence[dict], held_out: Sequence[dict]) -> str:
    """Four lines about a table's task, for people. train: its training rows, none if nothing is trained."""
    files = ", ".join(Path(name).name for names in task.files.values() for name in names)
    rows = f"{len(train)} rows to train on, " if train else ""
    tenth = "" if "validation" in task.files else " (of the tenth that is held out, the same in every run)"
    if task.number:
        step = Decimal(task.words[1]) - Decimal(task.words[0])
        answers = f"numbers from {task.words[0]} to {task.words[-1]}, answered in steps of {step}"
    else:
        counts = Counter(row["label"] for row in [*train, *held_out])
        listed = [f"{label} ({counts[i]})" for i, label in enumerate(task.labels)]
        more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
        answers = f"{len(listed)} labels (with their rows): {', '.join(listed[:SHOWN])}{more}"
    texts, words = (", ".join(names) for names in ([task.columns[name] for name in task.fields], task.words[:SHOWN]))
    said = task.wording.instruction if task.wording else "as in prompts.py"
    said = short(said.replace("{answers}", words).replace("{words}", words))
    return "\n".join(
        [
            f"{files} is the task {task.name}: {rows}{len(held_out)} to evaluate on{tenth}.",
            f"Text: {texts}. Label: {task.columns['label']}; {answers}.",
            f"Asked: {said}",
            "Otherwise: --text_columns and --label_column name other columns, a YAML file as --task has all the rest.",
        ]
    )


def short(text: str) -> str:
    """A text's beginning."""
    return text if len(text) <= 100 else f"{text[:97]}..."
