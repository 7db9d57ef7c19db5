"""Which rows of a task are trained on, and which are held out or answered. The same for all four scripts."""

import os
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import tasks
from machine.errors import DataError, MissingData
from tasks import Task, loaders


def task_path(task: Task, data_path: str, several: bool = False) -> str | None:
    """What `loaders.load` takes as data_path, from `--data_path`; None if that is empty.

    A folder is the task's own, or holds the tasks' folders as data/ (GLUE/RTE) or data/GLUE (RTE) do. With `several`
    tasks it cannot be one task's own.
    """
    if not data_path:
        return None
    folder = Path(data_path)
    for inside in (folder / task.folder, folder / Path(task.folder).name):
        if os.path.isdir(inside):
            return str(inside)
    return str(folder / task.folder if several else folder)


def choose(task: Task, rows: list[dict], size: int) -> list[dict]:
    """`size` of the rows (0: all), always the same ones, in their order. Rows that are scored as one stay together."""
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
    is_file = data_path is not None and os.path.isfile(data_path)
    try:
        rows = loaders.load(task, "train", data_path=None if is_file else data_path)
    except MissingData:
        if not is_file:
            raise
        rows = loaders.load(task, "train", data_path=data_path)
        print(f"No training split of {task.name} found: the labels are those of {data_path}.")
    return loaders.with_labels(task, rows)


def held_out(task: Task, data_path: str | None, size: int) -> tuple[list[dict], int]:
    """Labelled rows to evaluate on, `size` of the validation split (0: all), and how many rows at the end of the
    training split they are.

    That number is 0 where there is a validation split. Where there is none, the last rows of the training split (at
    most a fifth) are held out instead, and must not be trained on.
    """
    is_file = data_path is not None and os.path.isfile(data_path)
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
    """The labelled rows that the model that answers the task is trained on; a `--data_path` that is a file is left
    alone. Raises MissingData if there are none."""
    source = tasks.get(task.answered_by) if task.answered_by else task
    is_file = os.path.isfile(data_path or ".")
    return loaders.load(source, "train", data_path=None if is_file else task_path(source, data_path))


def majority_label(task: Task, rows: list[dict], data_path: str) -> tuple[int | float, str]:
    """The most frequent label and where it was counted: in the training split, else in the answered rows."""
    if task.candidates:  # of a question's many candidates most are wrong, in every split
        return 0, "no candidate"
    try:
        return most_frequent_label(task, training(task, data_path)), "training split"
    except MissingData:
        if any(row["label"] is None for row in rows):
            raise
    return most_frequent_label(task, rows), "these rows"


def train_and_held_out(task: Task, data_path: str | None, size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and rows to evaluate on (the same ones whatever the seed). DataError if one has no label.

    `data_path` a file of its own is trained on; the held-out rows are then the validation split, or the file's end.
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

    The folder is laid out as data/ (GLUE/RTE/train.tsv) or as data/GLUE (RTE/train.tsv). Tasks that share their
    training file (MNLI-m, MNLI-mm) are one.
    """
    places = {task.name: Path(task_path(task, str(root), several=True)) for task in tasks.TASKS.values()}
    found = [task for task in tasks.TASKS.values() if any(os.path.isfile(places[task.name] / f) for f in files(task))]
    return [(task, str(places[task.name])) for task in sharing_training_file(found)]


def files(task: Task) -> tuple[str, ...]:
    """The names that the task's training file may have; none for a task that another task's model answers."""
    return () if task.answered_by else task.files.get("train", ())


def sharing_training_file(several: list[Task]) -> list[Task]:
    """The first of the tasks that share a training file (MNLI-m, MNLI-mm), and none that has no training file."""
    first: dict = {}
    for task in several:
        if files(task) or task.wheel:
            first.setdefault((task.folder, files(task)), task)
    return list(first.values())


def most_frequent_label(task: Task, rows: Iterable[dict]) -> int | float:
    """The most frequent label of labelled rows (the lowest of equals); for a number task the mean."""
    labels = [row["label"] for row in rows if row["label"] is not None]
    if not labels:
        raise ValueError(f"{task.name}: no labelled rows to take the majority label from")
    if task.number:
        return float(np.mean(labels))
    return min(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[0]


def units(task: Task, rows: list[dict]) -> np.ndarray:
    """(rows,) number of the unit that each row is scored with, in order of first appearance.

    A unit is what was sampled when the data was made: MultiRC's question, ReCoRD's query, AX-g's pair, else the row.
    """
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
