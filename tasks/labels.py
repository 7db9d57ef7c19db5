"""A label as a class id, as its name, and as text that is compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tasks.table import Task


def label_name(task: Task, label: int | float | None) -> str | float | None:
    """A label as people read it: the class's name, the number, or None."""
    return label if label is None or task.number else task.labels[label]


def label_from_name(task: Task, name: str | float | None) -> int | float | None:
    """What `label_name` was given: the class id, the number, or None. ValueError if no label has this name."""
    if name is None or task.number:
        return name
    if name not in task.labels:
        raise ValueError(f"{name!r} is not a label of {task.name}")
    return task.labels.index(name)


def most_frequent_label(task: Task, rows: Iterable[dict]) -> int | float:
    """The most frequent label of labelled rows (the lowest one of a tie); for a number task the mean."""
    labels = [row["label"] for row in rows if row["label"] is not None]
    if not labels:
        raise ValueError(f"{task.name}: no labelled rows to take the majority label from")
    if task.number:
        import numpy as np

        return float(np.mean(labels))
    return min(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[0]


def fold(text: str) -> str:
    """Lower case and one separator, character by character: positions stay, and a prefix folds to a prefix."""
    # str.lower turns U+0130 into two characters and looks at the neighbours of a Greek sigma
    lower = text.lower() if text.isascii() else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    return lower.replace("_", " ").replace("-", " ")
