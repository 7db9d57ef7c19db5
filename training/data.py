"""The labelled rows of a training run, by task. Imports nothing that takes long."""

from dataclasses import dataclass, field
from pathlib import Path

import tasks
from machine.errors import ArgumentError
from run.arguments import get_tasks
from tasks import Task, guessing, splits
from training.arguments import PolicyArguments, TrainArguments


@dataclass
class TaskData:
    """One task's training and held-out rows; once a tokenizer has built their prompts also the held-out rows' prompts,
    and of all prompts a hash and the largest token id in them or in the task's labels."""

    task: Task
    train: list[dict]
    held_out: list[dict]
    held_out_prompts: list[list[int]] = field(default_factory=list)
    prompts_hash: str = ""
    largest_token: int = 0


def load_rows(arguments: TrainArguments, task: Task, path: str | None) -> TaskData:
    """The rows of one task from its own files (`path` None) or from a file or folder. Raises DataError."""
    task = splits.labelled(task, path)
    train, held_out = splits.train_and_held_out(task, path, arguments.eval_size, arguments.seed)
    if task.format == "table":
        print(guessing.description(task, train, held_out))
    return TaskData(task, train, held_out)


def find_tasks(arguments: PolicyArguments) -> list[tuple[Task, str | None]]:
    """The tasks to learn, and where their files are (None: below data/). Raises ArgumentError."""
    if arguments.datafolder_path:
        chosen = splits.found_below(arguments.datafolder_path)
        if not chosen:
            raise ArgumentError(
                f"--datafolder_path {arguments.datafolder_path} holds no task's training file; give a folder such as "
                "data/GLUE with RTE/train.tsv in it"
            )
        return chosen
    named = get_tasks(arguments)
    check_trainable(arguments.task, named)
    named = splits.one_per_training_file(named)
    if len(named) > 1 and Path(arguments.data_path or ".").is_file():
        raise ArgumentError(f"--data_path {arguments.data_path} is one file, but --task names {len(named)} tasks")
    return [(task, splits.task_path(task, arguments.data_path, len(named) > 1)) for task in named]


def check_trainable(given: str, named: list[Task]) -> None:
    """ArgumentError for a task of `--task` that another task's model answers. A suite's diagnostic sets are not meant:
    they are left out."""
    suites = {name.strip() for name in given.split(",")} & set(tasks.SUITES)
    other = next((task for task in named if task.answered_by and task.suite not in suites), None)
    if other is not None:
        instead = f"name {other.answered_by} in its place" if len(named) == 1 else "leave it out"
        raise ArgumentError(
            f"--task {given}: {other.name} has no training data, as the model of {other.answered_by} answers it; "
            f"{instead}"
        )


def name_of(arguments: PolicyArguments, data: list[TaskData]) -> str:
    """What a run is of: a folder's or a suite's name, a task, or several."""
    if arguments.datafolder_path:
        return Path(arguments.datafolder_path).resolve().name
    given = [name.strip() for name in arguments.task.split(",")]
    return ",".join(given if set(given) & set(tasks.SUITES) else [part.task.name for part in data])
