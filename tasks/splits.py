"""Which rows of a task are trained on, held out, or answered: the same for all four scripts."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

from machine.errors import DataError, MissingData
from tasks import loaders
from tasks.labels import most_frequent_label
from tasks.table import TASKS, Task, get

if TYPE_CHECKING:
    import numpy as np


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


def choose(task: Task, rows: list[dict], size: int) -> list[dict]:
    """`size` of the rows (0: all), always the same ones, in file order. Rows that are scored as one stay together."""
    if not size or size >= len(rows):
        return rows
    order = list(range(len(rows)))
    random.Random(1).shuffle(order)
    unit = units(task, rows)
    kept = {unit[i] for i in order[:size]}
    return [row for row, number in zip(rows, unit) if number in kept]


def labelled(task: Task, data_path: str | None) -> Task:
    """The task with its label set, which for some is read from the training data (see loaders.with_labels)."""
    if task.labels or task.number:
        return task
    is_file = os.path.isfile(data_path or "")
    try:
        rows = loaders.load(task, "train", data_path=None if is_file else data_path)
    except MissingData:
        if not is_file:
            raise
        rows = loaders.load(task, "train", data_path=data_path)
        print(f"No training split of {task.name} found: the labels are those of {data_path}.")
    return loaders.with_labels(task, rows)


def held_out(task: Task, data_path: str | None, size: int) -> tuple[list[dict], int]:
    """Labelled rows to evaluate on, and how many of the training split's last rows they are.

    They are `size` rows of the validation split (0: all), and the number is 0. Without a validation split they are the
    last rows of the training split, at most a fifth of it, which must not be trained on.
    """
    is_file = os.path.isfile(data_path or "")
    try:
        rows = loaders.load(task, "validation", data_path=None if is_file else data_path)
        return choose(task, rows, size), 0
    except MissingData as error:
        try:
            train = loaders.load(task, "train", data_path=data_path)
        except MissingData:
            raise error from None
    end = min(size or len(train), len(train) // 5)
    if not end:
        raise DataError(f"{task.name} has no validation split, and {len(train)} training rows are too few to hold out")
    print(f"No validation split of {task.name} found: the last {end} training rows are held out instead.")
    return train[-end:], end


def training(task: Task, data_path: str) -> list[dict]:
    """The labelled training rows of the model that answers the task; a `--data_path` that is a file is ignored.

    Raises MissingData if there are none.
    """
    source = get(task.answered_by) if task.answered_by else task
    is_file = os.path.isfile(data_path)
    return loaders.load(source, "train", data_path=None if is_file else task_path(source, data_path))


def majority_label(task: Task, rows: list[dict], data_path: str) -> tuple[int | float, str]:
    """The most frequent label, and what it was counted in: the training split, else the answered rows."""
    if task.candidates:  # of a question's many candidates most are wrong, in every split
        return 0, "no candidate"
    try:
        return most_frequent_label(task, training(task, data_path)), "training split"
    except MissingData:
        if any(row["label"] is None for row in rows):
            raise
    return most_frequent_label(task, rows), "these rows"


def train_and_held_out(task: Task, data_path: str | None, size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and rows to evaluate on, which do not depend on the seed. DataError if one has no label.

    A `data_path` that is a file is trained on; the held-out rows are then the validation split, or the file's end.
    """
    train = loaders.load(task, "train", data_path=data_path)
    evaluated, end = held_out(task, data_path, size)
    train = train[: len(train) - end]
    unlabelled = next((row for row in [*train, *evaluated] if row["label"] is None), None)
    if unlabelled is not None:
        raise DataError(f"row {unlabelled['id']} of {task.name} has no label; training and evaluation need labels")
    return loaders.training_rows(task, train, seed), evaluated


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
