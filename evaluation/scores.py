"""Metrics of predictions, their intervals, and both as text."""

from evaluation import bootstrap, metrics
from evaluation.predict import Prediction
from tasks import Task


def score(task: Task, rows: list[dict], predictions: list[Prediction]) -> dict[str, float]:
    """Every official metric of the task, their mean and the invalid rate, as `metrics.score` gives them."""
    return metrics.score(task, rows, [p.label for p in predictions], last_label_probabilities(predictions))


def details(task: Task, rows: list[dict], predictions: list[Prediction], majority: int | float) -> dict:
    """For summary.json, of labelled rows: every metric's interval, the metrics of answering always with the majority's
    label, and with classes their names and the counts of gold by predicted ones."""
    labels = [p.label for p in predictions]
    found = {
        "intervals": bootstrap.bootstrap_interval(task, rows, labels, last_label_probabilities(predictions)),
        "majority": metrics.score(task, rows, [majority] * len(rows)),
    }
    if not task.number:
        found |= {"labels": task.labels, "confusion": metrics.confusion_counts(task, rows, labels).tolist()}
    return found


def last_label_probabilities(predictions: list[Prediction]) -> list[float] | None:
    """P(the last label) of every row, by which ReCoRD's entity is chosen; None where generation did not yield it."""
    scores = [p.last_label_probability for p in predictions]
    return None if None in scores else scores


def results_text(task: Task, figures: dict[str, float], more: dict, counted_in: str) -> str:
    """A table of every metric with its interval and the majority class's, and of gold labels by predicted ones.

    more: `intervals`, `majority` and, with classes, `confusion`, as the functions of metrics.py give them.
    """
    lines = [f"{'':14}{'':>8}  95% interval     majority class ({counted_in})"]
    for name, value in figures.items():
        low, high = more["intervals"].get(name, (None, None))
        interval = "" if low is None else f"{low:.3f} to {high:.3f}"
        lines.append(f"{name:14}{value:8.3f}  {interval:15}  {more['majority'][name]:.3f}")
    if "confusion" in more:
        columns = [*task.labels, "invalid"]
        width, first = max(map(len, columns)) + 2, max(map(len, (*columns, "gold \\ answer")))
        lines += ["", "gold \\ answer".ljust(first) + "".join(name.rjust(width) for name in columns)]
        for name, counts in zip(task.labels, more["confusion"]):
            lines.append(name.ljust(first) + "".join(str(count).rjust(width) for count in counts))
    return "\n".join(lines)
