"""A task's rows answered by a server (`--endpoint`): the same prompts, parser, scores and files as of a model here.

By default a prompt is sent as the turns of a chat, which the server's own template renders. With `--from_local True`
the folder's tokenizer renders it here, `<Judgement>` included, and the server continues the text: it then answers what
inference.py answers with `--answer_space free`. The first way imports neither torch nor transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import prompts
from evaluation import outcome, predictions, responses
from evaluation.endpoint import Endpoint, Prompt, Reply
from evaluation.responses import Reader, Response
from machine.files import write_atomically
from run import prompt_record
from tasks import splits

if TYPE_CHECKING:
    from evaluation.arguments import InferenceArguments
    from evaluation.jobs import Job

TAGS = 16  # tokens that the tags around a chat's answer may take beside the answer


@dataclass(frozen=True)
class Questions:
    """A job's prompts as they are sent, and what is said about them."""

    prompts: list[Prompt]
    record: dict[str, str]  # see prompt_record.record
    shots: int
    shortened: int
    length: int | None = None  # tokens that a prompt may have, where they are known
    trained: bool = False  # whether an adapter answers, as far as is known here


def prepare(
    arguments: InferenceArguments, jobs: list[Job], show: Callable, moment: datetime
) -> Callable[[Job, Path, str], dict]:
    """The function that answers a job's rows into its folder and returns its summary.

    Of a new run the first question is asked right here, before there is a folder. Raises EndpointError.
    show: see inference.run. moment: see prompt_record.prompts_time.
    """
    build = text_questions if arguments.from_local else chat_questions
    first = build(arguments, jobs[0], show, moment)
    server, opening = connect(arguments, jobs[0]), None
    if not arguments.resume:
        opening = server.ask(first.prompts[0], f"row {jobs[0].rows[0]['id']} of {jobs[0].task.name}")
    print(f"{arguments.train_model_name} answers at {arguments.endpoint}.")

    def answer(job: Job, folder: Path, method: str) -> dict:
        if job is jobs[0]:
            return run_job(arguments, job, folder, method, first, server, opening)
        return run_job(arguments, job, folder, method, build(arguments, job, show, moment), connect(arguments, job))

    return answer


def connect(arguments: InferenceArguments, job: Job) -> Endpoint:
    """The server, with the parameters of a job's answers."""
    return Endpoint(
        arguments.endpoint,
        job.model,
        arguments.max_response_length + (0 if arguments.from_local else TAGS),
        arguments.model_temperature if arguments.do_sample else 0.0,
        arguments.seed if arguments.do_sample else None,
        reader_of(arguments, job).wants_probabilities,
    )


def reader_of(arguments: InferenceArguments, job: Job) -> Reader:
    return Reader(job.task, not arguments.from_local, arguments.use_CoT, arguments.strict_format)


def chat_questions(arguments: InferenceArguments, job: Job, show: Callable, moment: datetime) -> Questions:
    """Every row's prompt as turns of a chat."""
    shots = show(arguments, job, None)
    chats = [prompts.chat(job.task, row, arguments.use_CoT, shown) for row, shown in zip(job.rows, shots)]
    kept = prompt_record.record(None, prompt_record.hash_of([as_text(chat)] for chat in chats))
    return Questions(chats, kept, len(shots[0]), 0)


def text_questions(arguments: InferenceArguments, job: Job, show: Callable, moment: datetime) -> Questions:
    """Every row's prompt as the text that the folder's tokenizer renders; long passages are truncated."""
    from engine import models, templates
    from evaluation import answering, prompt_length

    tokenizer = models.load_tokenizer(job.model, True, arguments.trust_remote_code)
    templates.set_time(tokenizer, moment)
    (length,) = prompt_length.of_jobs(arguments, [job])
    arguments = replace(arguments, max_prompt_length=length)
    shots = show(arguments, job, tokenizer)
    prompt_ids, shortened = answering.build_prompts(job.task, job.rows, tokenizer, shots, arguments.use_CoT, length)
    texts = [tokenizer.decode(list(ids), clean_up_tokenization_spaces=False) for ids in prompt_ids]
    begin = tokenizer.bos_token
    if begin and tokenizer(texts[0]).input_ids[:2] == [tokenizer.bos_token_id] * 2:
        texts = [text.removeprefix(begin) for text in texts]  # the server's tokenizer writes it again
    trained = bool(models.adapter_chain(job.model, True)[1])
    kept = prompt_record.record(tokenizer, prompt_record.hash_of(prompt_ids))
    return Questions(texts, kept, len(shots[0]), shortened, length, trained)


def run_job(
    arguments: InferenceArguments,
    job: Job,
    folder: Path,
    method: str,
    questions: Questions,
    server: Endpoint,
    opening: Reply | None = None,
) -> dict:
    """Have one task's rows answered, write its files and say what came out. Returns its summary."""
    started = time.perf_counter()
    task, rows = job.task, job.rows
    needs_majority = job.labelled or (task.submission and job.whole_split)
    majority = splits.majority_label(task, rows, arguments.data_path) if needs_majority else (0, "")
    prompt_record.check_or_keep(folder, task.name, questions.record)
    reader = reader_of(arguments, job)
    path = folder / responses.FILE
    found = responses.ask_all(server, reader, rows, questions.prompts, path, arguments.concurrency, opening)
    answers = [reader.prediction(response) for response in found]
    data = b"".join(predictions.encoded_lines(task, rows, [as_text(p) for p in questions.prompts], answers))
    write_atomically(folder / predictions.FILE, lambda file: file.write(data))
    details = {"shots": questions.shots, "shortened": questions.shortened, **spent(arguments, found)}
    cut_off = [a.label is None and r.finish == "length" for a, r in zip(answers, found)].count(True)
    if cut_off:
        print(
            f"{cut_off} of {len(found)} answers were cut off before they were valid; raise --max_response_length, "
            "which also counts the thoughts of a model that reasons."
        )
    method = method or ("trained" if questions.trained else "zero-shot")
    arguments = replace(arguments, max_prompt_length=questions.length or arguments.max_prompt_length)
    return outcome.write_results(arguments, job, folder, method, answers, majority, started, details)


def spent(arguments: InferenceArguments, found: list[Response]) -> dict:
    """What summary.json holds of the server, the tokens and their cost; says the latter two."""
    tokens = {name: sum(getattr(response, f"{name}_tokens") or 0 for response in found) for name in ("input", "output")}
    uncounted = sum(None in (response.input_tokens, response.output_tokens) for response in found)
    cost = (tokens["input"] * arguments.price_in + tokens["output"] * arguments.price_out) / 1e6
    print(
        f"\n{tokens['input']} tokens in prompts and {tokens['output']} in answers"
        + (f", cost {cost:.4f}" if arguments.price_in or arguments.price_out else "")
        + (f"; the server did not count those of {uncounted} rows" if uncounted else "")
    )
    return {
        "answered_by": sorted({response.model for response in found}),
        "tokens": tokens,
        "cost": cost if arguments.price_in or arguments.price_out else None,
        "peak_memory_bytes": None,
    }


def as_text(prompt: Prompt) -> str:
    """A prompt as people read it."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
