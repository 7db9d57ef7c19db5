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


def number_range(task: Task) -> tuple[float, float]:
    """The lowest and the highest number of a number task."""
    return float(task.words[0]), float(task.words[-1])


def decimals(task: Task) -> int:
    """How many decimals a number task's words have."""
    return len(task.words[0].partition(".")[2])


def number_text(task: Task, number: float) -> str:
    """A number as the task's words are written."""
    return f"{round(number, decimals(task)) + 0.0:.{decimals(task)}f}"  # no -0.0


def exact_text(task: Task, number: float) -> str:
    """A number that need not be one of the task's words: with three decimals, as on leaderboards, or as many as they
    have."""
    return f"{number:.{max(3, decimals(task))}f}"


def unit_of_number(task: Task) -> float:
    """A fifth of a number task's range: what rewards, class bins and heads take as 1, whatever the range (STS-B's is
    0 to 5)."""
    low, high = number_range(task)
    return (high - low) / 5


def to_units(task: Task, number: float) -> float:
    """A number task's label on a scale from 0 to 5."""
    return (number - number_range(task)[0]) / unit_of_number(task)


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
