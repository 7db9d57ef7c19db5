"""Which rows of a task are trained on, held out, or answered: the same for all scripts."""

from __future__ import annotations

import os
import random
from collections import Counter
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from machine.errors import DataError, MissingData
from tasks import loaders
from tasks.formats import has_splits
from tasks.labels import most_frequent_label, number_range
from tasks.table import TASKS, Task, get

if TYPE_CHECKING:
    import numpy as np

CHOICES = ("validation", "test", "all")  # of --split; all: every row of a --data_path that is a file
HELD_OUT = 0.1  # of the training rows, where there is no validation split


def task_path(task: Task, data_path: str, several: bool = False) -> str | None:
    """The data_path of `loaders.load` for a task, from `--data_path`; None if that is empty.

    The folder is the task's own, or it holds the tasks' folders as data/ (GLUE/RTE) or data/GLUE (RTE) does. With
    `several` tasks it cannot be the task's own.
    """
    if not data_path:
        return None
    folder = Path(data_path)
    for inside in (folder / task.folder, folder / Path(task.folder).name):
        if os.path.isdir(inside):
            return str(inside)
    return str(folder / task.folder if several else folder)


def usual_split(task: Task, data_path: str) -> str:
    """What is answered unless `--split` says so: all rows of a file that is given to a task, else held-out rows."""
    return "all" if os.path.isfile(data_path) and not has_splits(task, data_path) else "validation"


def choose(task: Task, rows: list[dict], size: int) -> list[dict]:
    """`size` of the rows (0: all), always the same ones, in file order.

    Rows that are scored as one stay together: whole units are drawn, each alike, until there are so many rows.
    """
    if not size or size >= len(rows):
        return rows
    unit = units(task, rows).tolist()
    members = Counter(unit)
    order = list(range(len(members)))
    random.Random(1).shuffle(order)
    before = accumulate((members[number] for number in order), initial=0)
    kept = {number for number, rows_before in zip(order, before) if rows_before < size}
    return [row for row, number in zip(rows, unit) if number in kept]


def labelled(task: Task, data_path: str | None) -> Task:
    """The task with its label set, which for some is read from the training data (see loaders.with_labels)."""
    if task.labels or task.number:
        return task
    return loaders.with_labels(task, loaders.load(task, "train", data_path=data_path))


def held_out(task: Task, data_path: str | None, size: int) -> list[dict]:
    """Labelled rows to evaluate on: `size` (0: all) of the validation split, or without one of what `hold_out` keeps
    of the training split or the file."""
    try:
        rows = _validation(task, data_path)
    except MissingData as missing:
        try:
            train = loaders.load(task, "train", data_path=data_path)
        except MissingData:
            raise missing from None
        rows = hold_out(task, train)[1]
    return choose(task, rows, size)


def train_and_held_out(task: Task, data_path: str | None, size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and rows to evaluate on, which depend neither on the seed nor on what is trained on.

    Whoever names a file gets that file and nothing else. DataError if a row has no label.
    """
    train = loaders.load(task, "train", data_path=data_path)
    try:
        evaluated = _validation(task, data_path)
    except MissingData:
        train, evaluated = hold_out(task, train)
        if task.format != "table":  # of which more is said (see `described`)
            print(f"No validation split of {task.name} found: {len(evaluated)} of its training rows are held out.")
    unlabelled = next((row for row in [*train, *evaluated] if row["label"] is None), None)
    if unlabelled is not None:
        raise DataError(f"row {unlabelled['id']} of {task.name} has no label; training and evaluation need labels")
    return loaders.training_rows(task, train, seed), choose(task, evaluated, size)


def hold_out(task: Task, rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(rows to train on, rows that are held out), each in file order: a tenth of every label's rows, at least one.

    Rows with the same texts, but for case and spaces, stay together, as do rows that are scored as one. What is held
    out depends on the texts alone, not on a seed or the order of the rows. DataError if nothing can be held out.
    """
    unit = units(task, rows).tolist()
    alone = len(unit) == len(set(unit))
    groups: dict = {}
    for i, row in enumerate(rows):
        texts = tuple(" ".join(row[name].split()).casefold() for name in task.fields)
        groups.setdefault(texts if alone else unit[i], []).append(i)
    strata: dict = {}
    for key, members in groups.items():
        digest = sha256(repr(key).encode()).digest()
        strata.setdefault(_stratum(task, rows[members[0]]) if alone else 0, []).append((digest, members))
    kept = {i for stratum in strata.values() for i in _tenth([members for _, members in sorted(stratum)])}
    if not kept:
        raise DataError(f"{task.name} has no validation split, and {len(rows)} training rows are too few to hold out")
    return [row for i, row in enumerate(rows) if i not in kept], [rows[i] for i in sorted(kept)]


def _stratum(task: Task, row: dict) -> int:
    """The row's label; of a number its tenth of the range."""
    if not task.number:
        return row["label"]
    low, high = number_range(task)
    return int((row["label"] - low) / (high - low) * 9.999)


def _tenth(groups: list[list[int]]) -> list[int]:
    """The members of the first groups that make up a tenth of all, or of the smallest one; none if there is but one."""
    wanted = max(1, round(sum(map(len, groups)) * HELD_OUT))
    kept: list[int] = []
    for group in groups:
        if len(kept) + len(group) <= wanted:
            kept += group
    return kept if kept or len(groups) < 2 else min(groups, key=len)


def _validation(task: Task, data_path: str | None, hub: bool = True) -> list[dict]:
    """The rows of the validation split. MissingData without one; a file has one only if its format says so (MR's)."""
    if os.path.isfile(data_path or "") and not has_splits(task, data_path):
        raise MissingData(f"{data_path}: the file has no validation split of its own.")
    return loaders.load(task, "validation", data_path=data_path, hub=hub)


def training(task: Task, data_path: str, split: str = "", hub: bool = True) -> list[dict]:
    """The labelled training rows of the model that answers the task, without those that are held out.

    A `--data_path` that is a file holds them if its `validation` split is asked for; else it holds the rows to answer,
    and the training rows are the task's own. hub: whether a hub may be asked for them. Raises MissingData.
    """
    source = get(task.answered_by) if task.answered_by else task
    is_file = os.path.isfile(data_path)
    path = (data_path if split == "validation" else None) if is_file else task_path(source, data_path)
    rows = loaders.load(source, "train", data_path=path, hub=hub)
    try:
        _validation(source, path, hub)
    except MissingData:
        return hold_out(source, rows)[0]
    return rows


def majority_label(task: Task, rows: list[dict], data_path: str) -> tuple[int | float, str]:
    """The most frequent label, and what it was counted in: the training split, else the answered rows.

    Of a `--data_path` that is a file these rows count. No hub is waited for, unless they have no labels.
    """
    if task.candidates:  # of a question's many candidates most are wrong, in every split
        return 0, "no candidate"
    known = all(row["label"] is not None for row in rows)
    if not (known and os.path.isfile(data_path)):
        try:
            return most_frequent_label(task, training(task, data_path, hub=not known)), "training split"
        except MissingData:
            if not known:
                raise
    return most_frequent_label(task, rows), "these rows"


def found_below(root: str | Path) -> list[tuple[Task, str]]:
    """Every task whose training file lies below a folder, with the folder of its files.

    The folder is laid out as data/ (GLUE/RTE/train.tsv) or as data/GLUE (RTE/train.tsv). Of tasks that share their
    training file (MNLI-m, MNLI-mm) only the first is returned.
    """
    folders = {name: Path(task_path(task, str(root), several=True)) for name, task in TASKS.items()}
    found = [
        task
        for name, task in TASKS.items()
        if any(os.path.isfile(folders[name] / file) for file in training_files(task))
    ]
    return [(task, str(folders[task.name])) for task in one_per_training_file(found)]


def training_files(task: Task) -> tuple[str, ...]:
    """The names that the task's training file may have; none for a task that another task's model answers."""
    return () if task.answered_by else task.files.get("train", ())


def one_per_training_file(several: list[Task]) -> list[Task]:
    """The first task of each training file (MNLI-m and MNLI-mm share one); those without such a file are left out."""
    first: dict = {}
    for task in several:
        if training_files(task) or task.wheel:
            first.setdefault((task.folder, training_files(task)), task)
    return list(first.values())


def units(task: Task, rows: list[dict]) -> np.ndarray:
    """(rows,) number of the unit that each row is scored with, in order of first appearance.

    A unit is what was sampled when the data was made: MultiRC's question, ReCoRD's query, AX-g's pair, else the row.
    """
    import numpy as np

    if "gender_parity" in task.metrics:
        return np.arange(len(rows)) // 2
    if "em" in task.metrics:
        keys = [tuple(row["id"][:2]) for row in rows]
    elif "exact_match" in task.metrics:
        keys = [row["id"] for row in rows]
    else:
        return np.arange(len(rows))
    numbers: dict = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])
