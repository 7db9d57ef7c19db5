"""The rows that inference.py, fewshot.py and classify.py answer: a job for each task of `--task`.

`arguments` are those scripts': beside the common ones these functions read `split` and `submission`.
"""

from dataclasses import dataclass
from pathlib import Path

import tasks
from engine.folders import check_folder
from machine.errors import ArgumentError, MissingData
from run.arguments import Arguments
from tasks import Task, guessing, loaders, splits
from tasks.unlabelled import unlabelled_rows

EVALUATED = 400  # labelled rows per task, unless --eval_size says otherwise


@dataclass(frozen=True)
class Job:
    """One task's rows to answer."""

    task: Task
    rows: list[dict]
    whole_split: bool
    model: str

    @property
    def labelled(self) -> bool:
        return all(row["label"] is not None for row in self.rows)


def suites_named(arguments: Arguments) -> list[str]:
    """The suites that `--task` names."""
    return [name.strip() for name in arguments.task.split(",") if name.strip() in tasks.SUITES]


def load_jobs(arguments: Arguments, chosen: list[Task]) -> list[Job]:
    """Every task's rows. MissingData names all tasks whose data is missing; a diagnostic set may be left out."""
    jobs, missing = [], []
    for task in chosen:
        path = splits.task_path(task, arguments.data_path, several=len(chosen) > 1)
        try:
            task = splits.labelled(task, path)
            rows, whole_split = load_rows(arguments, task, path)
        except MissingData as error:
            if len(chosen) > 1 and not task.in_suite_score and not arguments.submission:
                print(f"Left out: {error}")
            else:
                missing.append((task, error))
            continue
        model_task = task.answered_by or next(
            (t.name for t in tasks.TASKS.values() if t.folder == task.folder), task.name
        )
        model = arguments.train_model_name.replace("{task}", model_task.replace("/", "-"))
        check_folder(model, arguments.from_local)  # before hours of work on the tasks ahead of it
        if task.format == "table":
            print(guessing.description(task, [], rows))
        jobs.append(Job(task, rows, whole_split, model))
    if missing:
        others = f" (missing: {', '.join(task.name for task, _ in missing)})" if len(missing) > 1 else ""
        raise MissingData(f"{missing[0][1]}{others}")
    return jobs


def load_rows(arguments: Arguments, task: Task, path: str | None) -> tuple[list[dict], bool]:
    """The rows to answer, and whether they are the whole test split. Raises DataError."""
    size = EVALUATED if arguments.eval_size is None else arguments.eval_size
    if arguments.split == "validation":
        return splits.held_out(task, path, size), False
    if arguments.split == "all" and not Path(path or ".").is_file():
        raise ArgumentError("--split all answers every row of a file; name one with --data_path, or leave --split out")
    new = unlabelled_rows(task, path) if arguments.split == "all" else None
    everything = loaders.load(task, "test", data_path=path) if new is None else new
    unlabelled = any(row["label"] is None for row in everything)
    keep_all = arguments.submission or (unlabelled and arguments.eval_size is None)
    rows = splits.choose(task, everything, 0 if keep_all else size)
    return rows, arguments.split == "test" and len(rows) == len(everything)
