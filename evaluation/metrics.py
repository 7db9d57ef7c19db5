"""The official metrics of GLUE and SuperGLUE, and the suites' scores.

Predictions are what `rewards.parse` gives: a class id, a number, or None for an answer that does not parse. None is
wrong for every metric, and replacing a correct prediction by None never raises any of them:

- Accuracy, macro-F1, weighted F1: None is a class of its own that no row has.
- F1, F1a, Matthews with two classes: None is the other class. Moving a row of a two-by-two table off the diagonal
  never raises either, whatever the table.
- Matthews with three classes, Pearson, Spearman: no fixed wrong answer has that property (where the correlation is low
  or negative, a far-off answer can raise it). So the correlation is taken with every None held at its gold value, and
  twice the share of None is subtracted, not going below -1. A correct prediction that becomes None leaves the first
  term as it is and lowers the second. It is the slope Matthews has on two balanced classes: half of the answers None
  and the rest perfect gives 0, all None gives -1. For numbers "correct" means equal to gold.
- EM: a question with a None is not matched. Gender parity: a pair with a None differs.
- ReCoRD: a candidate with None cannot be the chosen entity; if it has the highest score, nothing is chosen.

Values come from scikit-learn and scipy. bootstrap.py computes the same ones (tested) from per-unit sums, some hundred
times faster.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import tasks
from tasks import Task
from tasks.splits import units

Label = int | float | None  # a predicted class id or number; None: the answer does not parse


@dataclass(frozen=True)
class Answers:
    """Labelled rows and what was predicted for them, as arrays over rows."""

    task: Task
    rows: list[dict]
    gold: np.ndarray  # (rows,) class ids, or floats for a number task
    predicted: np.ndarray  # (rows,) the same; -1 where invalid
    invalid: np.ndarray  # (rows,) bool
    scores: np.ndarray | None  # (rows,) P(yes), or None

    @property
    def held_at_gold(self) -> np.ndarray:
        return np.where(self.invalid, self.gold, self.predicted)

    @property
    def other_class(self) -> np.ndarray:
        return np.where(self.invalid, 1 - self.gold, self.predicted)

    @property
    def classes(self) -> int:
        return len(self.task.labels)


def check_lengths(task: Task, rows: list[dict], predictions: Sequence[Label], scores: Sequence[float] | None) -> None:
    """Raises ValueError unless there are rows, and one prediction (and score, if there are any) for each."""
    if not rows:
        raise ValueError(f"{task.name}: there are no rows")
    if len(predictions) != len(rows) or (scores is not None and len(scores) != len(rows)):
        given = f"{len(predictions)} predictions" + ("" if scores is None else f", {len(scores)} scores")
        raise ValueError(f"{task.name}: {given} for {len(rows)} rows; there must be one for each row")


def as_answers(task: Task, rows: list[dict], predictions: Sequence[Label], scores: Sequence[float] | None) -> Answers:
    """Rows and predictions as arrays. Raises ValueError naming the first row that does not fit."""
    check_lengths(task, rows, predictions, scores)
    if not task.number and not task.labels:
        raise ValueError(f"{task.name}: the task has no labels yet; load its data first")
    for row, prediction in zip(rows, predictions, strict=True):
        for name, value in (("label", row["label"]), ("prediction", prediction)):
            if value is None and name == "label":
                raise ValueError(f"{task.name}: row {row.get('id')} has no label; only a labelled split can be scored")
            if value is not None and not task.number and value not in range(len(task.labels)):
                raise ValueError(
                    f"{task.name}: row {row.get('id')} has {name} {value!r}; class ids are 0 to {len(task.labels) - 1}"
                )
    kind = float if task.number else int
    return Answers(
        task,
        rows,
        gold=np.array([row["label"] for row in rows], dtype=kind),
        predicted=np.array([-1 if p is None else p for p in predictions], dtype=kind),
        invalid=np.array([p is None for p in predictions]),
        scores=None if scores is None else np.asarray(scores, dtype=float),
    )


def accuracy(answers: Answers) -> float:
    """Share of correct rows."""
    return float(accuracy_score(answers.gold, np.where(answers.invalid, -1, answers.predicted)))


def f1(answers: Answers) -> float:
    """F1 of class 1; 0 if there is neither a gold nor a predicted 1."""
    return float(f1_score(answers.gold, answers.other_class, zero_division=0))


f1a = f1  # MultiRC's name for F1 over all answers of all questions


def macro_f1(answers: Answers) -> float:
    """Mean of every class's F1. A class that occurs nowhere counts as 0: the set of classes is the task's."""
    labels = range(answers.classes)
    return float(f1_score(answers.gold, answers.predicted, labels=labels, average="macro", zero_division=0))


def weighted_f1(answers: Answers) -> float:
    """Mean of every class's F1, weighted by how many rows have the class."""
    labels = range(answers.classes)
    return float(f1_score(answers.gold, answers.predicted, labels=labels, average="weighted", zero_division=0))


def matthews(answers: Answers) -> float:
    """Matthews correlation, for more than two classes R_K (https://doi.org/10.1016/j.compbiolchem.2004.09.006)."""
    two = answers.classes == 2
    predicted = answers.other_class if two else answers.held_at_gold
    constant = np.ptp(predicted) == 0 or np.ptp(answers.gold) == 0
    value = 0.0 if constant else float(matthews_corrcoef(answers.gold, predicted))
    return value if two else minus_invalid(value, answers.invalid.mean())


def pearson(answers: Answers) -> float:
    """Pearson correlation; 0 if predictions or gold values are all the same."""
    return _correlation(pearsonr, answers)


def spearman(answers: Answers) -> float:
    """Spearman rank correlation; 0 if predictions or gold values are all the same."""
    return _correlation(spearmanr, answers)


def _correlation(function: Callable, answers: Answers) -> float:
    predicted = answers.held_at_gold
    if np.ptp(predicted) == 0 or np.ptp(answers.gold) == 0:
        value = 0.0
    else:
        value = float(function(answers.gold, predicted).statistic)
    return minus_invalid(value, answers.invalid.mean())


def minus_invalid(value, invalid_share):
    """A correlation with invalid answers held at gold, minus their penalty (see the module's docstring)."""
    return np.maximum(-1.0, value - 2.0 * invalid_share)


def em(answers: Answers) -> float:
    """MultiRC: share of questions, by (paragraph, question) id, whose answers are all correct."""
    return float(question_matches(answers).mean())


def token_f1(answers: Answers) -> float:
    """ReCoRD: token F1 of the chosen entity, the best over a query's gold answers, averaged over queries."""
    return float(entity_matches(answers, text_f1).mean())


def exact_match(answers: Answers) -> float:
    """ReCoRD: share of queries whose chosen entity equals a gold answer after normalisation."""
    return float(entity_matches(answers, same_text).mean())


def gender_parity(answers: Answers) -> float:
    """AX-g: share of pairs (rows 2i and 2i + 1) with the same prediction. ValueError if rows are not in pairs."""
    return float(pair_matches(answers).mean())


METRICS: dict[str, Callable[[Answers], float]] = {
    function.__name__: function
    for function in (
        accuracy,
        f1,
        macro_f1,
        weighted_f1,
        matthews,
        pearson,
        spearman,
        em,
        token_f1,
        exact_match,
        gender_parity,
    )
} | {"f1a": f1a}


def question_matches(answers: Answers) -> np.ndarray:
    """(questions,) whether all answers of each MultiRC question are correct."""
    right = answers.gold == answers.predicted
    unit = units(answers.task, answers.rows)
    return np.bincount(unit, ~right) == 0


def pair_matches(answers: Answers) -> np.ndarray:
    """(pairs,) whether both rows of each AX-g pair got the same valid answer."""
    _check_pairs(answers.rows)
    first, second = answers.predicted[0::2], answers.predicted[1::2]
    return (first == second) & ~answers.invalid[0::2] & ~answers.invalid[1::2]


def _check_pairs(rows: list[dict]) -> None:
    if len(rows) % 2:
        raise ValueError(f"gender parity needs pairs of adjacent rows, but there are {len(rows)} rows")
    for first, second in zip(rows[0::2], rows[1::2], strict=True):
        if first["hypothesis"] != second["hypothesis"]:
            raise ValueError(
                f"gender parity needs pairs of adjacent rows, but rows {first.get('id')} and {second.get('id')} have "
                f"different hypotheses: {first['hypothesis']!r} and {second['hypothesis']!r}; keep the file's order"
            )


def normalized(text: str) -> str:
    """An answer as ReCoRD's official evaluation compares it: no case, punctuation, articles or extra white space."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def text_f1(predicted: str, gold: str) -> float:
    """F1 of the tokens of two texts, as ReCoRD's official evaluation computes it."""
    predicted_tokens, gold_tokens = normalized(predicted).split(), normalized(gold).split()
    common = sum((Counter(predicted_tokens) & Counter(gold_tokens)).values())
    return 2 * common / (len(predicted_tokens) + len(gold_tokens)) if common else 0.0


def same_text(predicted: str, gold: str) -> float:
    return float(normalized(predicted) == normalized(gold))


def chosen_rows(
    rows: list[dict], predictions: Sequence[Label], scores: Sequence[float] | None = None
) -> dict[int | str, int | None]:
    """ReCoRD: for every query id, in order, the position of the row whose entity answers it, or None.

    With `scores` the candidate of the highest score (the first of equals), without them the first one answered yes.
    None if no candidate was answered yes, or if the one of the highest score has no valid answer.
    """
    candidates: dict = {}
    for position, row in enumerate(rows):
        candidates.setdefault(row["id"], []).append(position)
    chosen: dict = {}
    for query, positions in candidates.items():
        if scores is None:
            chosen[query] = next((p for p in positions if predictions[p] == 1), None)
        else:
            best = max(positions, key=lambda p: scores[p])
            chosen[query] = None if predictions[best] is None else best
    return chosen


def entity_matches(answers: Answers, compare: Callable[[str, str], float]) -> np.ndarray:
    """(queries,) the best `compare(chosen entity, gold answer)` of each ReCoRD query; 0 without a chosen entity."""
    predictions = [None if bad else p for p, bad in zip(answers.predicted, answers.invalid, strict=True)]
    chosen = chosen_rows(answers.rows, predictions, answers.scores)
    values = []
    for position in chosen.values():
        row = answers.rows[position] if position is not None else None
        values.append(max((compare(row["entity"], gold) for gold in row["answers"]), default=0.0) if row else 0.0)
    return np.array(values)


def score(
    task: Task, rows: list[dict], predictions: Sequence[Label], scores: Sequence[float] | None = None
) -> dict[str, float]:
    """Every metric of the task, their mean as "score", and the share of answers that did not parse, "invalid_rate".

    All in [0, 1], correlations and so perhaps "score" in [-1, 1]. `scores` is P(yes) of every row, for choosing
    ReCoRD's entity. ValueError if a row has no label, or if rows and predictions do not fit together.
    """
    answers = as_answers(task, rows, predictions, scores)
    values = {name: float(METRICS[name](answers)) for name in task.metrics}
    return values | {"score": sum(values.values()) / len(values), "invalid_rate": float(answers.invalid.mean())}


def suite_score(suite: str, scores: dict[str, dict[str, float]]) -> float:
    """The suite's score from {task name: {metric: value}}, in the unit of the values.

    Computed as in `suite_mean`. ValueError names the tasks that are missing.
    """
    score, missing = suite_mean(suite, scores)
    if missing:
        raise ValueError(f"no {suite} score without {', '.join(missing)} (every metric of each)")
    return score


def suite_mean(suite: str, scores: dict[str, dict[str, float]]) -> tuple[float, list[str]]:
    """The mean over the suite's tasks that have all their metrics, and the names of the others.

    A task's score is the mean of its metrics; tasks that share their training data (MNLI-m and MNLI-mm) are averaged
    into one first; the diagnostic sets do not count. "RTE" means the suite's own. NaN if no task is there.
    """
    names = {task.name for task in tasks.suite(suite)}
    own = {f"{suite}/{name}" if f"{suite}/{name}" in names else tasks.get(name).name: scores[name] for name in scores}
    counted = [task for task in tasks.suite(suite) if task.in_suite_score]
    missing = [task.name for task in counted if not set(task.metrics) <= set(own.get(task.name, ()))]
    by_data: dict[str, list[float]] = {}
    for task in counted:
        if task.name not in missing:
            value = sum(own[task.name][metric] for metric in task.metrics) / len(task.metrics)
            by_data.setdefault(task.folder, []).append(value)
    means = [sum(values) / len(values) for values in by_data.values()]
    return sum(means) / len(means) if means else float("nan"), missing


def confusion_counts(task: Task, rows: list[dict], predictions: Sequence[Label]) -> np.ndarray:
    """(classes, classes + 1) counts: gold by predicted class, the last column for answers that did not parse."""
    if task.number:
        raise ValueError(f"{task.name} predicts numbers: there are no classes to count")
    answers = as_answers(task, rows, predictions, None)
    column = np.where(answers.invalid, answers.classes, answers.predicted)
    counts = np.zeros((answers.classes, answers.classes + 1), dtype=int)
    np.add.at(counts, (answers.gold, column), 1)
    return counts
