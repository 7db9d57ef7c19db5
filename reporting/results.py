"""What runs have to say: a result for each task, and groups of one method's results that differ in their seeds only."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import tasks
from evaluation import predictions
from tasks import Task
from tasks.labels import label_from_name

START = " (before training)"  # at the end of the name of a run's first evaluation
# The methods in the order of every table.
ZERO_SHOT, FEW_SHOT, HEAD, SFT = "zero-shot", "few-shot", "classification head", "SFT"
TRL_GRPO, PPO = "TRL GRPO", "PPO"
ORDER = ZERO_SHOT, FEW_SHOT, HEAD, SFT, TRL_GRPO, PPO
TRAINED = HEAD, SFT, TRL_GRPO, PPO
ADAPTER = "adapter"
# By what summary.json calls a method.
METHODS = {
    "zero-shot": ZERO_SHOT,
    "few-shot": FEW_SHOT,
    "head": HEAD,
    "sft": SFT,
    "trl-grpo": TRL_GRPO,  # benchmarks/trl_grpo.py
    "ppo": PPO,
    "trained": ADAPTER,
}


class TaskKey(NamedTuple):
    """What stands together in the tables: one model on one split of one version of a task."""

    model: str
    task: str
    split: str
    version: int | None


@dataclass
class Result:
    """What one run gives for one task."""

    run: str  # the run's folder, relative to --runs
    folder: Path
    kind: str  # one of ORDER, or how an adapter was trained: SFT + PPO
    method: str  # the kind with its settings, as the tables call it
    model: str
    task: Task
    version: int | None
    split: str
    seed: int
    settings: dict
    metrics: dict[str, float]  # of the last evaluation
    best: float | None = None  # score of the best evaluation
    before: float | None = None  # score of the first one
    details: dict = field(default_factory=dict)  # intervals, majority, labels, confusion
    samples: int = 0
    seconds: float | None = None
    memory: int | None = None  # bytes
    tokens: dict[str, int] | None = None  # `input` and `output`, as a server counted them
    cost: float | None = None  # of these tokens, in the currency of --price_in
    answers: list[dict] | None = None  # the lines of predictions.jsonl
    history: list[dict] = field(default_factory=list)
    samples_per_step: float = 0.0
    together: tuple[str, ...] = ()  # the tasks that the run is of

    @property
    def key(self) -> TaskKey:
        return TaskKey(self.model, self.task.name, self.split, self.version)

    @property
    def scored(self) -> bool:
        return {*self.task.metrics, "score"} <= set(self.metrics)

    def scored_rows(self) -> tuple[list[dict], list, list[float] | None]:
        """Rows, predicted labels and P(the last label) as metrics.score takes them. ValueError if not known."""
        rows, labels, probabilities = self.answered_rows()
        if self.task.candidates and any(row["entity"] is None for row in rows):
            raise ValueError(f"{predictions.FILE} in {self.run} names no candidates")
        return rows, labels, probabilities

    def answered_rows(self) -> tuple[list[dict], list, list[float] | None]:
        """The same, even if ReCoRD's rows lack what its metrics need. ValueError if there are no predictions."""
        if self.answers is None:
            raise ValueError(f"{self.run} has no usable {predictions.FILE}")
        rows = [
            {
                "id": line["id"],
                "label": label_from_name(self.task, line["gold"]),
                "hypothesis": None,  # AX-g's were checked when the run was scored
                "entity": line.get("entity"),
                "answers": line.get("answers"),
            }
            for line in self.answers
        ]
        labels = [label_from_name(self.task, line["label"]) for line in self.answers]
        probabilities = [line.get("probability_of_last_label") for line in self.answers]
        return rows, labels, None if None in probabilities else probabilities

    def row_keys(self) -> list[tuple[str, int]]:
        """What identifies each row: its id, and its number among the rows of this id (as ReCoRD's candidates)."""
        seen: dict[str, int] = {}
        keys = []
        for line in self.answers or []:
            name = json.dumps(line["id"])
            seen[name] = seen.get(name, -1) + 1
            keys.append((name, seen[name]))
        return keys

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(samples seen, value) of a figure of history.jsonl, such as eval/score, in order."""
        of_task = name.replace("/", f"/{self.task.name}/", 1)
        points = {line["step"]: line.get(of_task, line.get(name)) for line in self.history if {name, of_task} & {*line}}
        return [(step * self.samples_per_step, value) for step, value in sorted(points.items())]


@dataclass
class Group:
    """The results of one method on one task, which differ in their seeds only."""

    method: str
    results: list[Result]

    @property
    def first(self) -> Result:
        return self.results[0]

    @property
    def key(self) -> TaskKey:
        return self.first.key


@dataclass
class Collection:
    """All that was found below a folder."""

    results: list[Result]
    unfinished: list[tuple[str, str]]  # runs and how far they came
    skipped: list[str]  # what could not be read, and why
    training: list[tuple[str, list[dict]]]  # the name and the history of every run, unfinished ones too

    @property
    def finished(self) -> int:
        """How many runs are finished; one of several tasks counts once."""
        return len({result.run.removesuffix(START) for result in self.results})

    @property
    def groups(self) -> list[Group]:
        """Scored results by method, in the order of the table of tasks and of ORDER."""
        return grouped([result for result in self.results if result.scored])


def task_title(key: TaskKey, keys: list[TaskKey]) -> str:
    """A task as the tables call it: with a split other than validation, with its version if `keys` have several."""
    more = [key.split] if key.split != "validation" else []
    more += [f"version {key.version}"] if len({other.version for other in keys if other[:3] == key[:3]}) > 1 else []
    return f"{key.task} ({', '.join(more)})" if more else key.task


def setup(result: Result) -> tuple:
    """What a result answers and how, regardless of the seed."""
    return result.key, result.method, json.dumps(result.settings, sort_keys=True)


def rank(group: Group) -> int:
    """The position of a group's kind in ORDER; adapters that were trained further, or asked again, come last."""
    return next((i for i, kind in enumerate(ORDER) if re.fullmatch(rf"{kind}( \d+)?", group.first.kind)), len(ORDER))


def grouped(results: list[Result]) -> list[Group]:
    """Results by task and method; where one method's results differ in their settings, these are added to its name."""
    order = [*tasks.TASKS]
    by_method: dict[tuple, list[Result]] = {}
    for result in results:
        by_method.setdefault((result.key, result.method), []).append(result)
    groups = []
    for (_, method), same in by_method.items():
        names = sorted({name for result in same for name in result.settings})
        differing = [n for n in names if len({json.dumps(r.settings.get(n), sort_keys=True) for r in same}) > 1]
        parts: dict[str, list[Result]] = {}
        for result in same:
            more = "; ".join(f"{name} {result.settings.get(name)}" for name in differing)
            parts.setdefault(f"{method[:-1]}; {more})" if more else method, []).append(result)
        groups += [Group(name, sorted(part, key=lambda r: (r.seed, r.run))) for name, part in parts.items()]

    def position(group: Group) -> tuple:
        model, task, split, version = group.key
        place = order.index(task) if task in order else len(order)
        return model, place, task, split != "validation", version or 0, rank(group), group.method

    return sorted(groups, key=position)
