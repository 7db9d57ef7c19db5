"""What runs have to say: a result for each task, and groups of one method's runs that differ in their seeds only."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import tasks
from evaluation import predictions
from tasks import Task

START = " (before training)"  # at the end of the name of a run's first evaluation
ORDER = ("zero-shot", "few-shot", "SFT", "PPO")  # of the methods in every table


@dataclass
class Result:
    """What one run gives for one task."""

    place: str  # the run's folder, relative to --runs
    folder: Path
    kind: str  # zero-shot, few-shot, SFT, PPO, or what an adapter went through: SFT + PPO
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
    answers: list[dict] | None = None  # the lines of predictions.jsonl
    history: list[dict] = field(default_factory=list)
    samples_per_step: float = 0.0

    @property
    def scored(self) -> bool:
        return {*self.task.metrics, "score"} <= set(self.metrics)

    def scored_rows(self) -> tuple[list[dict], list, list[float] | None]:
        """Rows, predicted labels and P(the last label) as metrics.score takes them. ValueError if not known."""
        rows, labels, yes = self.answered()
        if self.task.candidates and any(row["entity"] is None for row in rows):
            raise ValueError(f"{predictions.FILE} in {self.place} names no candidates")
        return rows, labels, yes

    def answered(self) -> tuple[list[dict], list, list[float] | None]:
        """The same, also where ReCoRD's rows lack what its metrics need. ValueError if there are no predictions."""
        if self.answers is None:
            raise ValueError(f"{self.place} holds no usable {predictions.FILE}")
        # What AX-g's rows say of their hypotheses was checked when the run was scored.
        rows = [
            {"id": line["id"], "label": self._label(line["gold"]), "hypothesis": None, "entity": line.get("entity"),
             "answers": line.get("answers")} for line in self.answers
        ]  # fmt: skip
        yes = [line.get("probability_of_last_label") for line in self.answers]
        return rows, [self._label(line["label"]) for line in self.answers], None if None in yes else yes

    def _label(self, name: str | float | None) -> int | float | None:
        if name is None or self.task.number:
            return name
        if name not in self.task.labels:
            raise ValueError(f"{name!r} is no label of {self.task.name}")
        return self.task.labels.index(name)

    def keys(self) -> list[tuple[str, int]]:
        """What tells the rows apart: the id, and which of the rows of this id it is (ReCoRD's candidates share one)."""
        seen: dict[str, int] = {}
        keys = []
        for line in self.answers or []:
            name = json.dumps(line["id"])
            seen[name] = seen.get(name, -1) + 1
            keys.append((name, seen[name]))
        return keys

    def figures(self, name: str) -> list[tuple[float, float]]:
        """(samples seen, value) of a figure of history.jsonl, such as eval/score, in order."""
        of_task = name.replace("eval/", f"eval/{self.task.name}/")
        points = {line["step"]: line.get(of_task, line.get(name)) for line in self.history if {name, of_task} & {*line}}
        return [(step * self.samples_per_step, value) for step, value in sorted(points.items())]


@dataclass
class Group:
    """The runs of one method on one task, which differ in their seeds only."""

    method: str
    results: list[Result]

    @property
    def first(self) -> Result:
        return self.results[0]

    @property
    def row(self) -> tuple:
        """The line of the table that the group stands in: model, task, split and the task's version."""
        return row_of(self.first)


@dataclass
class Collection:
    results: list[Result]
    unfinished: list[tuple[str, str]]  # folder and how far it came
    skipped: list[str]  # what could not be read, and why
    training: list[tuple[str, list[dict]]]  # of every run, unfinished ones too, its name and its history

    @property
    def finished(self) -> int:
        """How many runs are finished; one of several tasks counts once."""
        return len({result.place.removesuffix(START) for result in self.results})

    @property
    def groups(self) -> list[Group]:
        """Scored results by method, in the order of tasks.py and ORDER."""
        return grouped([result for result in self.results if result.scored])


def row_of(result: Result) -> tuple:
    return result.model, result.task.name, result.split, result.version


def row_name(row: tuple, rows: list[tuple]) -> str:
    """A task as the tables call it: with its split if that is not validation, with its version if there are several."""
    model, task, split, version = row
    more = [split] if split != "validation" else []
    more += [f"version {version}"] if len({r[3] for r in rows if r[:3] == row[:3]}) > 1 else []
    return f"{task} ({', '.join(more)})" if more else task


def asked(result: Result) -> tuple:
    """What a result answers and how, whatever the seed."""
    return row_of(result), result.method, json.dumps(result.settings, sort_keys=True)


def rank(group: Group) -> int:
    """The place of a group's kind in ORDER; adapters that were trained further, or asked anew, come last."""
    return next((i for i, kind in enumerate(ORDER) if re.fullmatch(rf"{kind}( \d+)?", group.first.kind)), len(ORDER))


def grouped(results: list[Result]) -> list[Group]:
    """Results by row and method; settings in which a row's runs of one method differ are added to the name."""
    order = [*tasks.TASKS]
    by_method: dict[tuple, list[Result]] = {}
    for result in results:
        by_method.setdefault((*row_of(result), result.method), []).append(result)
    groups = []
    for (*_, method), same in by_method.items():
        names = sorted({name for result in same for name in result.settings})
        differing = [n for n in names if len({json.dumps(r.settings.get(n), sort_keys=True) for r in same}) > 1]
        parts: dict[str, list[Result]] = {}
        for result in same:
            more = "; ".join(f"{name} {result.settings.get(name)}" for name in differing)
            parts.setdefault(f"{method[:-1]}; {more})" if more else method, []).append(result)
        groups += [Group(name, sorted(part, key=lambda r: (r.seed, r.place))) for name, part in parts.items()]

    def place(group: Group) -> tuple:
        model, task, split, version = group.row
        return model, order.index(task), split != "validation", version or 0, rank(group), group.method

    return sorted(groups, key=place)
