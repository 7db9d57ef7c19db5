"""Original TSV, TXT, CSV and JSONL files, or the hub, to rows: plain dicts, one per answer the model has to give.

A row holds `id` as in the file (its position where the file has none), the task's text fields, its extras, and `label`:
a class id, a float (STS-B), or None where it is not known. Every reader turns its source into flat records with the
hub's column names (a dict per row), so that files and hub share one way from there on.

Nothing is skipped, repaired or trimmed silently. What cannot be read raises `DataError` with file, line and value.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from machine.errors import DataError, MissingData
from tasks import tables
from tasks.formats import FORMATS
from tasks.labels import fold, number_range
from tasks.readers import Record, find_column, read_records, short_repr
from tasks.table import Task

DATA_ROOT = Path(__file__).resolve().parents[1] / "data"
SPLITS = ("train", "validation", "test")
HUB_SECONDS = 5  # to wait for the hub's first answer
MAX_CHARACTERS = 50_000  # a longer field is not a text but a broken quote or line end that swallowed the next rows


def load(
    task: Task,
    split: str,
    data_root: str | Path = DATA_ROOT,
    data_path: str | Path | None = None,
    hub: bool = True,
) -> list[dict]:
    """The rows of a task's split, in file order.

    data_path: a file in one of the task's formats, or a folder with the task's files. It replaces
    `data_root/<task.folder>`, and nothing else is tried. Without it, an installed package or (with `hub`) the hub is
    the second source. Rows of train and validation are labelled. The labels of a task without a label set stay names
    until `with_labels` has given it one.

    Raises ValueError for an unknown split, and DataError.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; the splits are {', '.join(SPLITS)}.")
    given = Path(data_path) if data_path is not None else None
    if given is not None and not os.path.isdir(given):  # Path.is_dir raises for some odd paths
        if not os.path.isfile(given):
            raise MissingData(f"{given}: no such file or folder (data_path for {task.name}); check the path.")
        return _from_file(task, split, given)
    folder = given if given is not None else Path(data_root) / task.folder
    # A task of one's own names its files by their whole paths; in a folder that is given they bear the same names.
    names = task.files.get(split, ())
    candidates = [folder / (Path(name).name if given is not None else name) for name in names]
    for path in candidates:
        if os.path.isfile(path):
            return _from_file(task, split, path)
    tried = " or ".join(str(path) for path in candidates) or f"a {split} file (there is none for {task.name})"
    if given is not None or task.format == "table":
        raise MissingData(f"{task.name} {split}: cannot find {tried}; put the file there or give another data_path.")
    if task.wheel:
        return _from_wheel(task, split, tried)
    if not hub:
        raise MissingData(f"{task.name} {split}: cannot find {tried}.")
    return _from_hub(task, split, tried)


def with_labels(task: Task, rows_or_file: Iterable[dict] | str | Path) -> Task:
    """The task with its label set: itself if it has one, else a copy with the sorted labels of training rows.

    rows_or_file: rows that `load` returned for the task without labels, or the training file. Load the rows once more
    with the new task to get class ids. The words are the labels in lower case; labels that no answer could tell apart
    (they differ in case, or "_", "-" and " ", alone) raise DataError, as does a single label.
    """
    if task.labels or task.number:
        return task
    rows = load(task, "train", data_path=rows_or_file) if isinstance(rows_or_file, str | Path) else rows_or_file
    labels = tuple(sorted({row["label"] for row in rows}))
    words = tuple(label.lower() for label in labels)
    if len({fold(word) for word in words}) != len(words) or len(words) < 2:
        raise DataError(f"{task.name}: the labels {short_repr(', '.join(labels))} are not two or more distinct words.")
    return replace(task, labels=labels, words=words, submission_words=labels)


def training_rows(task: Task, rows: list[dict], seed: int) -> list[dict]:
    """The rows to train on: all of them; for a task with candidates, one right and one wrong row per id.

    The choice depends on the seed and the row order alone. An id without a right or a wrong candidate gives one row.
    """
    if not task.candidates:
        return rows
    groups: dict = {}
    for row in rows:
        groups.setdefault(row["id"], ([], []))[row["label"]].append(row)
    choose = random.Random(seed).choice
    return [choose(side) for wrong, right in groups.values() for side in (right, wrong) if side]


def _from_file(task: Task, split: str, path: Path) -> list[dict]:
    if task.format == "table":
        return _to_rows(task, split, iter(tables.read_table(path).records), str(path), "row")
    return _to_rows(task, split, read_records(task, path), str(path), "line")


def _from_wheel(task: Task, split: str, tried: str) -> list[dict]:
    """A file inside an installed package. The package is located and never imported, so it need not even work."""
    package, _, inside = task.wheel.partition("/")
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if os.path.isfile(Path(location) / inside):
            return _from_file(task, split, Path(location) / inside)
    raise MissingData(
        f"{task.name} {split}: cannot find {tried}, nor {task.wheel} in an installed package; run scripts/setup.sh, "
        f"which installs {package}, or put the file there."
    )


def _from_hub(task: Task, split: str, tried: str) -> list[dict]:
    name = "/".join(part for part in task.hub if part)
    failed, way_out = f"{task.name} {split}: cannot find {tried}, and", "data/README.md says where the file goes."
    if not name:
        raise MissingData(f"{failed} the hub does not have this task; {way_out}")
    if split not in task.hub_splits:
        raise MissingData(f"{failed} hub {name} has no such split; {way_out}")
    unreached = ""
    try:
        import datasets  # takes seconds, and only this function needs it

        unreached = _reach_hub(task.hub[0])
        table = datasets.load_dataset(*task.hub, split=task.hub_splits[split])
    except Exception as error:  # whatever the hub client raises, the user needs both sources in one message
        reason = unreached or _in_short(error)
        raise MissingData(f"{failed} hub {name} did not answer ({reason}); {way_out}") from error
    return _to_rows(task, split, enumerate(table, 1), f"hub {name} {task.hub_splits[split]}", "row")


def _in_short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@functools.cache
def _reach_hub(name: str) -> str:
    """One quick try: a hub that cannot be reached would be asked again and again. From then on only what was
    downloaded before is looked for. Returns why it was not reached."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return ""
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_SECONDS)
    except HfHubHTTPError:
        pass  # it answers; load_dataset says what is wrong
    except Exception as error:  # no network, no such host, no answer in time: whatever the client makes of it
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return _in_short(error)
    return ""


def _to_rows(task: Task, split: str, records: Iterable[Record], source: str, unit: str) -> list[dict]:
    """Checked rows from records. `source` and `unit` ("line", or "row" of a table or the hub) say in an error where."""
    rows: list[dict] = []
    columns: dict[str, str] = {}
    number = 0  # of the current record, for errors: a format may read ahead

    def counted() -> Iterator[Record]:
        nonlocal number
        for entry in records:
            number = entry[0]
            yield entry

    unfold = FORMATS.get(task.format)
    ids = _label_ids(task)
    try:
        for entry in unfold(task, split, counted(), source) if unfold else counted():
            number, record = entry
            columns = columns or _find_columns(task, split, record)
            row = {"id": None} | {name: record[column] if column else None for name, column in columns.items()}
            row["id"] = _checked_id(task, len(rows) if row["id"] is None else row["id"])
            for name in task.fields:
                row[name] = _checked_text(name, row[name], task.trim)
            if columns["label"]:
                # How a test split says that its labels are secret: nothing, and on the hub -1.
                secret = split == "test" and row["label"] in ((None, -1) if source.startswith("hub ") else (None,))
                row["label"] = None if secret else _label(task, ids, row["label"])
            rows.append(row)
    except DataError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        problem = f"the key or column {error} is missing" if isinstance(error, KeyError) else str(error)[:300]
        raise DataError(f"{source}, {unit} {number}: {problem}; correct it, or compare with data/README.md.") from error
    if not rows:
        raise DataError(f"{source}: no {split} rows; the file is cut off, or it is not {task.name}'s file.")
    return rows


def _find_columns(task: Task, split: str, record: dict) -> dict[str, str]:
    """The source's column for every field of a row, "" for an optional one that it lacks. KeyError for any other."""
    columns = {name: find_column(record, key) for name, key in task.columns.items()}
    for name in task.fields if split == "test" else (*task.fields, "label"):
        if not columns[name]:
            there = ", ".join(map(str, record))
            raise ValueError(f"the key or column {task.columns[name]!r} is missing; there are {there[:200]}")
    return columns


def _checked_id(task: Task, value):
    """The id as it is. ValueError if it, or a part of MultiRC's, is neither a whole number nor a word."""
    for part in value if task.format == "multirc" and isinstance(value, list) else [value]:
        if isinstance(part, bool) or not isinstance(part, int) and not _is_word(part):
            raise ValueError(f"id {short_repr(part)} is neither a whole number nor a word")
    return value


def _checked_text(name: str, text, trim: bool) -> str:
    """The text, with `trim` without the space at its end. ValueError if it is not a text, or too long for one."""
    if not isinstance(text, str):
        raise ValueError(f"{name} {short_repr(text)} is not a text")
    if len(text) >= MAX_CHARACTERS:
        cause = "a line break or quotation mark before it is probably broken"
        raise ValueError(f"{name} {text[:40]!r}... has {len(text)} characters (limit {MAX_CHARACTERS}): {cause}")
    return text.removesuffix(" ") if trim else text


def _label_ids(task: Task) -> dict[str, int]:
    """The class id of everything that a file may write for a label, in lower case."""
    ids = {label.lower(): index for index, label in enumerate(task.labels)}
    if task.format == "table" or any(name.isdecimal() for name in ids):  # then a number is a name
        return ids
    return ids | {str(index): index for index in range(len(ids))}


def _label(task: Task, ids: dict[str, int], value) -> int | float | str:
    """The class id of a label written as word, number or JSON boolean; the float; the name if there is no label set."""
    if task.number:
        low, high = number_range(task)
        number = tables.to_number(value) if task.format == "table" and value else float(value)
        if isinstance(value, bool) or not low <= number <= high:
            raise ValueError(f"label {short_repr(value)} is not in [{low:g}, {high:g}]")
        return number
    if not task.labels:
        if not value or not _is_word(value) or "<" in value:  # the tag after an answer begins with it
            raise ValueError(f"label {short_repr(value)} is not a word")
        return value
    label = ids.get(str(value).lower()) if isinstance(value, str | int | float) else None
    if label is None:
        raise ValueError(f"label {short_repr(value)} is none of {', '.join(ids)}")
    return label


def _is_word(value) -> bool:
    """Whether it is text on one line, with nothing around it that an answer or a leaderboard file would lose."""
    return isinstance(value, str) and value.isprintable() and value == value.strip()
