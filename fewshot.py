"""Few-shot prompting: solved rows of the training split precede every question, and nothing is trained.

    bash scripts/fewshot.sh                                   8 demonstrations, the embedded model on MR
    bash scripts/fewshot.sh --task RTE --num_shots 4 --train_model_name Qwen/Qwen2.5-1.5B-Instruct

Everything else, and everything that is written, is as in inference.py.
"""

import random
from dataclasses import dataclass

import inference
import prompts
from evaluation.arguments import InferenceArguments
from evaluation.jobs import Job
from machine import processes
from machine.errors import ArgumentError, clear_errors
from run.arguments import parse
from run.parser import fixed, option
from tasks import Task, loaders, splits
from tasks.labels import to_units


@dataclass
class FewshotArguments(InferenceArguments):
    """What few-shot prompting takes beside inference.py's arguments."""

    max_prompt_length: int = option(
        1536, "answers", "tokens in a prompt with its demonstrations; a long passage is truncated"
    )
    text: list[str] | None = fixed(None)
    num_shots: int = option(8, "prompting", "demonstrations before each question, from the training split")
    same_shots: bool = option(True, "prompting", "True: the same demonstrations for all rows; False: drawn for each")


def draw(task: Task, rows: list[dict], number: int, random_: random.Random) -> list[dict]:
    """So many demonstrations in random order, balanced over the classes.

    The classes of a number task are six parts of its range. Where a class has too few rows, the others fill up.
    """
    classes: dict = {}
    for row in rows:
        classes.setdefault(round(to_units(task, row["label"])) if task.number else row["label"], []).append(row)
    order = sorted(classes)
    random_.shuffle(order)
    # In turns one of each class that has more.
    pools = [random_.sample(classes[label], min(number, len(classes[label]))) for label in order]
    drawn = [pool[turn] for turn in range(number) for pool in pools if turn < len(pool)][:number]
    random_.shuffle(drawn)
    return drawn


def that_fit(
    task: Task, drawn: list[dict], longest: dict, tokenizer, use_CoT: bool, max_prompt_length: int
) -> list[dict]:
    """The demonstrations that fit beside the longest row, whose passage may be truncated to half of the prompt.

    A demonstration is shown whole or not at all.
    """

    def length(shots: list[dict]) -> int:
        return len(prompts.build(task, longest, tokenizer, use_CoT, 10**9, shots)[0])

    own = length([])
    over = max(0, own - max_prompt_length // 2) if task.passage else 0  # tokens that the passage may lose
    kept: list[dict] = []
    for shot in drawn:
        if length([*kept, shot]) - over <= max_prompt_length:
            kept.append(shot)
    return kept


def show(arguments: FewshotArguments, job: Job, tokenizer) -> list[list[dict]]:
    """Every row's demonstrations, from the training split; no row that is itself answered is among them.

    tokenizer: None shows all that are drawn, as nobody knows their length.
    """
    task = job.task
    train = loaders.training_rows(task, splits.training(task, arguments.data_path, arguments.split), arguments.seed)
    answered = {tuple(row[name] for name in task.fields) for row in job.rows}
    train = [row for row in train if tuple(row[name] for name in task.fields) not in answered]
    longest = max(job.rows, key=lambda row: sum(len(row[name]) for name in task.fields))
    random_ = random.Random(arguments.seed)
    shots, left_out = [], 0
    for _ in [None] if arguments.same_shots else job.rows:
        drawn = draw(task, train, arguments.num_shots, random_)
        how = arguments.use_CoT, arguments.max_prompt_length
        shots.append(drawn if tokenizer is None else that_fit(task, drawn, longest, tokenizer, *how))
        left_out += len(drawn) - len(shots[-1])
    if len(train) < arguments.num_shots:
        print(f"{task.name}: only {len(train)} training rows can be shown, not {arguments.num_shots}.")
    if left_out:
        print(
            f"{task.name}: {left_out} of {len(drawn) * len(shots)} demonstrations do not fit into --max_prompt_length "
            f"{arguments.max_prompt_length} and are left out."
        )
    return shots * len(job.rows) if arguments.same_shots else shots


def main(argv: list[str] | None = None) -> None:
    arguments = parse(FewshotArguments, __doc__.splitlines()[0], argv)
    with clear_errors("fewshot.py"):
        if arguments.num_shots < 1:
            raise ArgumentError(f"--num_shots {arguments.num_shots} must be at least 1; inference.py shows none")
    inference.run(arguments, "fewshot.py", "few-shot", show)


if __name__ == "__main__":
    processes.run(main)
