"""Metrics of predictions, their intervals, and both as text."""

from pathlib import Path

from evaluation import bootstrap, metrics, predictions
from evaluation.predictions import Prediction
from machine.errors import ArgumentError
from tasks import Task, splits

MOST_IN_TABLE = 12  # classes in the table of gold and predicted labels; of more the most frequent mistakes are shown
SHOWN = 10


def score(task: Task, rows: list[dict], found: list[Prediction]) -> dict[str, float]:
    """Every official metric of the task, their mean and the invalid rate, as `metrics.score` gives them."""
    return metrics.score(task, rows, [p.label for p in found], last_label_probabilities(found))


def details(task: Task, rows: list[dict], found: list[Prediction], majority: int | float) -> dict:
    """What summary.json holds of labelled rows beside their metrics.

    That is the interval of every metric (`intervals`), the metrics of always answering the majority label (`majority`)
    and, for a task with classes, their names (`labels`) and the counts of gold by predicted label (`confusion`).
    """
    labels = [p.label for p in found]
    values = bootstrap.bootstrap_values(task, rows, labels, last_label_probabilities(found))
    about = {
        "intervals": bootstrap.intervals(values),
        "majority": metrics.score(task, rows, [majority] * len(rows)),
    }
    if not task.number:
        about |= {"labels": task.labels, "confusion": metrics.confusion_counts(task, rows, labels).tolist()}
    return about


def details_from_file(folder: Path, task: Task, rows: list[dict], data_path: str) -> dict:
    """`details` of the answers in predictions.jsonl; empty if there are none to these rows."""
    try:
        found = predictions.read(folder / predictions.FILE, task, rows)
    except (FileNotFoundError, ArgumentError) as error:
        print(f"No intervals in summary.json: {error}")
        return {}
    return details(task, rows, found, splits.majority_label(task, rows, data_path)[0])


def last_label_probabilities(found: list[Prediction]) -> list[float] | None:
    """P(the last label) of every row, by which ReCoRD's entity is chosen; None where generation did not yield it."""
    scores = [p.last_label_probability for p in found]
    return None if None in scores else scores


def metrics_text(task: Task, figures: dict[str, float], about: dict, counted_in: str) -> str:
    """A table of every metric with its interval and the majority class's, and of gold labels by predicted ones.

    about: what `details` gives. counted_in: where the majority label was counted.
    """
    lines = [f"{'':14}{'':>8}  95% interval     majority class ({counted_in})"]
    for name, value in figures.items():
        low, high = about["intervals"].get(name, (None, None))
        interval = "" if low is None else f"{low:.3f} to {high:.3f}"
        lines.append(f"{name:14}{value:8.3f}  {interval:15}  {about['majority'][name]:.3f}")
    if "confusion" in about and len(task.labels) <= MOST_IN_TABLE:
        columns = [*task.labels, "invalid"]
        width, first = max(map(len, columns)) + 2, max(map(len, (*columns, "gold \\ answer")))
        lines += ["", "gold \\ answer".ljust(first) + "".join(name.rjust(width) for name in columns)]
        for name, counts in zip(task.labels, about["confusion"]):
            lines.append(name.ljust(first) + "".join(str(count).rjust(width) for count in counts))
    elif "confusion" in about:
        lines += ["", "most frequent mistakes:", *mistakes(task, about["confusion"])]
    return "\n".join(lines)


def mistakes(task: Task, confusion: list[list[int]]) -> list[str]:
    """The most frequent pairs of a gold label and another answer, a line each."""
    answers = [*task.labels, "invalid"]
    pairs = [
        (count, gold, answer)
        for i, (gold, counts) in enumerate(zip(task.labels, confusion))
        for j, (answer, count) in enumerate(zip(answers, counts))
        if i != j and count
    ]
    return [f"{count:6} {gold} answered {answer}" for count, gold, answer in sorted(pairs, reverse=True)[:SHOWN]]
