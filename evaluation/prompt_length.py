"""How long a prompt may be where --max_prompt_length does not say it: as long as the task's data need."""

import math
import random
from collections.abc import Callable

import prompts
from engine import loading, models
from evaluation.jobs import Job
from prompts import MAX_PROMPT_LENGTH
from run.arguments import Arguments
from tasks import Task

SAMPLE = 2000  # rows of a task that are measured
# Of these prompts stay whole. Not more: 0.7% of BoolQ's have over 512 tokens, and of a few hundred rows 1% may have, so
# that runs on other rows of one task would have different limits.
WHOLE_SHARE = 0.98
STEP = 256  # so coarse that a task's splits, whose lengths differ a little, come to the same length
WHOLE = 10**9  # tokens: no prompt is longer


def of_task(task: Task, rows: list[dict], measure: Callable[[list[dict]], list[int]], limit: float) -> int:
    """The tokens that 98% of a task's prompts have at most, rounded up to a multiple of 256; at least 512.

    measure: the tokens of each row's whole prompt. limit: what the model can read beside an answer; no more than that.
    Says so, if it is not 512.
    """
    if len(rows) > SAMPLE:
        rows = random.Random(0).sample(rows, SAMPLE)
    lengths = sorted(measure(rows))
    enough = lengths[math.ceil(WHOLE_SHARE * len(lengths)) - 1]
    length = max(1, int(min(max(MAX_PROMPT_LENGTH, STEP * math.ceil(enough / STEP)), limit)))
    if length != MAX_PROMPT_LENGTH:
        print(
            f"{task.name}: --max_prompt_length is {length}, as 98% of its prompts have at most {enough} tokens (the "
            f"longest {lengths[-1]})" + (" and the model reads no more." if length == limit else ".")
        )
    return length


def for_prompts(arguments: Arguments, task: Task, rows: list[dict], tokenizer, limit: float) -> int:
    """`of_task` for prompts to a language model. Raises PromptError."""

    def measure(rows: list[dict]) -> list[int]:
        return list(map(len, prompts.build_all(task, rows, tokenizer, arguments.use_CoT, WHOLE)[0]))

    return of_task(task, rows, measure, limit)


def limit_of(arguments: Arguments, model: str) -> float:
    """The tokens that a language model can read before an answer; infinity if it does not say. Raises ModelError."""
    limit = loading.length_limit(models.load_config(model, arguments.from_local, arguments.trust_remote_code))
    return (limit or math.inf) - arguments.max_response_length


def of_jobs(arguments: Arguments, jobs: list[Job]) -> list[int]:
    """--max_prompt_length of every job, in their order. Raises ModelError, PromptError."""
    if arguments.max_prompt_length is not None:
        return [arguments.max_prompt_length] * len(jobs)
    known: dict[str, tuple] = {}
    for model in dict.fromkeys(job.model for job in jobs):
        tokenizer = models.load_tokenizer(model, arguments.from_local, arguments.trust_remote_code)
        known[model] = tokenizer, limit_of(arguments, model)
    return [for_prompts(arguments, job.task, job.rows, *known[job.model]) for job in jobs]
