"""Methods measured against each other: means over seeds with bootstrap intervals, paired tests, rows that changed."""

from dataclasses import dataclass

import numpy as np

from evaluation.bootstrap import bootstrap_values, intervals
from evaluation.significance import TINY, two_sided_p
from reporting.results import PPO, Group, Result, TaskKey
from tasks import Task

SAMPLES = 10_000  # resamples of a comparison, so that p is no smaller than 0.0002


@dataclass
class Cell:
    """One metric of one method on one task, over its runs."""

    mean: float
    least: float
    most: float
    seeds: list[int]
    interval: tuple[float, float] | None  # 95% bootstrap, over the rows, of the mean over the runs


@dataclass
class Comparison:
    """PPO minus a baseline, on the same rows; or the reason why there is no such figure."""

    method: str
    baseline: str
    key: TaskKey
    metric: str = ""
    difference: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)
    p: float = 1.0
    rows: int = 0
    reason: str = ""


@dataclass
class Changes:
    """Rows that one run answers correctly and another does not, and the other way round."""

    result: Result
    baseline: Result
    fixed: list[tuple[dict, dict]]  # lines of (baseline, result), those that changed most first
    broken: list[tuple[dict, dict]]
    rows: int


def cells(group: Group) -> dict[str, Cell]:
    """Every official metric, the score and the invalid rate of a group."""
    found = {}
    names = [*group.first.task.metrics, "score", "invalid_rate"]
    bounds = (len(group.results) == 1 and group.first.details.get("intervals")) or {}
    if not bounds and not different_rows(group.results):
        bounds = intervals(bootstrap(group.results, samples=1000))
    for name in names:
        each = [result.metrics[name] for result in group.results if name in result.metrics]
        if each:
            interval = tuple(float(bound) for bound in bounds[name]) if name in bounds else None
            seeds = [result.seed for result in group.results]
            found[name] = Cell(float(np.mean(each)), min(each), max(each), seeds, interval)
    return found


def different_rows(results: list[Result]) -> str:
    """Why results cannot be compared row by row; empty if they can: all answer the same rows of the same data."""
    first = results[0]
    for result in results:
        try:
            result.scored_rows()
        except ValueError as error:
            return str(error)
        if result.version != first.version:
            return f"{result.run} has version {result.version} of the task, {first.run} version {first.version}"
        if result.split != first.split:
            return f"{result.run} answers the {result.split} split, {first.run} the {first.split} split"
        own, others = result.row_keys(), first.row_keys()
        if set(own) != set(others):
            common = len(set(own) & set(others))
            return f"{result.run} answers {len(own)} rows, {first.run} {len(others)}; they share {common}"
        gold = dict(zip(own, result.answers))
        odd = next((key for key, line in zip(others, first.answers) if gold[key]["gold"] != line["gold"]), None)
        if odd:
            return f"{result.run} and {first.run} have different gold labels for row {odd[0]}"
    return ""


def bootstrap(results: list[Result], samples: int, order: Result | None = None) -> dict[str, np.ndarray]:
    """Every metric and the score, (samples,) each, as the mean over results with the same rows, in the order of
    `order`'s."""
    keys = (order or results[0]).row_keys()
    total: dict[str, np.ndarray] = {}
    for result in results:
        rows, labels, probabilities = result.scored_rows()
        index = {key: i for i, key in enumerate(result.row_keys())}
        order_of_rows = [index[key] for key in keys]
        rows, labels = [rows[i] for i in order_of_rows], [labels[i] for i in order_of_rows]
        probabilities = None if probabilities is None else [probabilities[i] for i in order_of_rows]
        values = bootstrap_values(result.task, rows, labels, probabilities, samples)
        for name, value in values.items():
            total[name] = total.get(name, 0.0) + value / len(results)
    return total


def compare_all(groups: list[Group]) -> list[Comparison]:
    """Every PPO group against every baseline on its task."""
    drawn: dict[tuple, dict[str, np.ndarray]] = {}  # by rows and group: a full validation set takes seconds
    return [found for method, baseline in pairs(groups) for found in compare(method, baseline, drawn)]


def compare(method: Group, baseline: Group, drawn: dict | None = None) -> list[Comparison]:
    """The paired bootstrap of every official metric's difference between the means over the runs.

    Where the rows differ, it is one comparison with the reason.
    """
    names = dict(method=method.method, baseline=baseline.method, key=method.key)
    reason = different_rows([*method.results, *baseline.results])
    if reason:
        return [Comparison(**names, reason=reason)]
    drawn, order, found = {} if drawn is None else drawn, str(method.first.row_keys()), []
    for group in (method, baseline):
        if (order, id(group)) not in drawn:
            drawn[order, id(group)] = bootstrap(group.results, SAMPLES, method.first)
    for metric in method.first.task.metrics:
        differences = drawn[order, id(method)][metric] - drawn[order, id(baseline)][metric]
        means = [np.mean([result.metrics[metric] for result in group.results]) for group in (method, baseline)]
        low, high = (float(q) for q in np.quantile(differences, [0.025, 0.975]))
        p = two_sided_p(differences)
        difference = float(means[0] - means[1])
        rows = len(method.first.answers)
        found.append(Comparison(**names, metric=metric, difference=difference, interval=(low, high), p=p, rows=rows))
    return found


def is_ppo(group: Group) -> bool:
    """Whether PPO was the last to train the group's model."""
    return PPO in group.first.kind.rsplit("+", 1)[-1]


def pairs(groups: list[Group]) -> list[tuple[Group, Group]]:
    """Every PPO group with every baseline on the same task."""
    return [(a, b) for a in groups if is_ppo(a) for b in groups if a.key == b.key and not is_ppo(b)]


def changes(method: Group, baseline: Group) -> Changes | None:
    """Rows that one run of `method` fixed or broke against one of `baseline`; None where the rows differ.

    The runs are those with the lowest seed that both have, else the first of each. For numbers, `fixed` are the rows
    that came closer to gold, and `broken` those that moved away.
    """
    seeds = {result.seed: result for result in reversed(baseline.results)}
    ours = next((result for result in method.results if result.seed in seeds), method.first)
    theirs = seeds.get(ours.seed, baseline.first)
    if different_rows([ours, theirs]):
        return None
    lines = dict(zip(theirs.row_keys(), theirs.answers))
    both = [(lines[key], line) for key, line in zip(ours.row_keys(), ours.answers)]
    gains = [mistake(before, ours.task) - mistake(after, ours.task) for before, after in both]
    order = sorted(range(len(both)), key=lambda i: -abs(gains[i]))
    fixed, broken = ([both[i] for i in order if sign * gains[i] > TINY] for sign in (1, -1))
    return Changes(ours, theirs, fixed, broken, len(both))


def mistake(line: dict, task: Task) -> float:
    """How wrong an answer is: 0 or 1, or a number's distance to gold (1e9 for an invalid answer)."""
    if not task.number:
        return float(line["label"] != line["gold"])
    return abs(line["label"] - line["gold"]) if line["label"] is not None else 1e9
