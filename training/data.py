"""The labelled rows of a training run, by task. Imports nothing that takes long."""

from dataclasses import dataclass, field

from tasks import Task, splits
from training.arguments import TrainArguments


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
    return TaskData(task, train, held_out)
