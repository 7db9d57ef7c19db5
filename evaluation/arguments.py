"""The options that inference.py and fewshot.py share."""

import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from engine.folders import EMBEDDED
from evaluation.jobs import Job, suites_named
from machine import processes
from machine.errors import ArgumentError
from run.answer_options import check_calibration, fill_in_number_answer
from run.arguments import (
    ANSWER_SPACES,
    ANSWER_SPACES_HELP,
    TASKS_HELP,
    Arguments,
    as_dict,
    check_not_negative,
    check_positive,
    get_tasks,
    one_of,
)
from run.parser import option
from tasks import Task, splits

SAME_ON_RESUME = {  # what may differ when a run goes on
    "resume", "output_dir", "report_to", "concurrency", "price_in", "price_out"
}  # fmt: skip


@dataclass
class InferenceArguments(Arguments):
    """What prompting takes beside the common arguments."""

    task: str = option("", "run", TASKS_HELP)
    train_model_name: str = option(
        EMBEDDED, "model", "model name or folder; {task} in it becomes the task whose model answers"
    )
    batch_sentence_num: int = option(256, "prompting", "rows answered and saved at a time")
    answer_space: str = option("", "answers", ANSWER_SPACES_HELP)
    eval_size: int | None = option(
        None, "prompting", "rows per task; 0: all; default: 400, or all where they are unlabelled"
    )
    split: str = option("", "prompting", "validation, test, or all: every row of a file (default of --data_path FILE)")
    submission: bool = option(False, "prompting", "True: answer all of test and write the suite's leaderboard zip")
    calibration: str = option("none", "answers", "none, contextual, batch or (with score) pmi: see docs/prompting.md")
    do_sample: bool = option(False, "answers", "True: sample at --model_temperature; False: greedy")
    strict_format: bool = option(False, "answers", "True: only the closing tag ends a free answer")
    text: list[str] | None = option(
        None, "prompting", "a text to label, may be repeated; -: every line of standard input"
    )
    resume: str = option("", "run", "folder of an interrupted run to finish")
    endpoint: str = option("", "endpoint", "base URL of an OpenAI-compatible server that answers, as a rule .../v1")
    concurrency: int = option(8, "endpoint", "requests to the server at a time")
    price_in: float = option(0.0, "endpoint", "price of a million prompt tokens, for the cost in summaries and reports")
    price_out: float = option(0.0, "endpoint", "price of a million tokens of answers")


def check(arguments: InferenceArguments) -> list[Task]:
    """The tasks; refuses what cannot be run and fills in defaults. Raises ArgumentError."""
    chosen = get_tasks(arguments)
    if arguments.endpoint:
        check_endpoint(arguments)
    arguments.answer_space = arguments.answer_space or "labels"
    one_of("answer_space", arguments.answer_space, ANSWER_SPACES)
    fill_in_number_answer(arguments)
    check_calibration(arguments)
    if arguments.answer_space == "score" and (arguments.use_CoT or arguments.do_sample):
        raise ArgumentError(
            "--answer_space score compares the labels' likelihoods: it needs no analysis and samples nothing; leave "
            "--use_CoT and --do_sample at False, or use --answer_space labels"
        )
    of_data = splits.usual_split(chosen[0], arguments.data_path)
    arguments.split = arguments.split or ("test" if arguments.submission else of_data)
    one_of("split", arguments.split, splits.CHOICES)
    if arguments.submission:
        if arguments.split != "test" or arguments.eval_size:
            raise ArgumentError("--submission True answers the whole test split; leave out --split and --eval_size")
        if not suites_named(arguments):
            raise ArgumentError(f"--submission True makes a suite's zip, and --task {arguments.task} names no suite")
    if len(chosen) > 1 and Path(arguments.data_path or ".").is_file():
        raise ArgumentError(f"--data_path {arguments.data_path} is one file, but --task names {len(chosen)} tasks")
    if arguments.resume:
        stored = json.loads((Path(arguments.resume) / "arguments.json").read_text(encoding="utf-8"))
        for name, value in as_dict(arguments).items():
            if name not in SAME_ON_RESUME and value != stored.get(name):
                raise ArgumentError(
                    f"--resume {arguments.resume} has --{name} {stored.get(name)}, not {value}; leave --{name} out"
                )
    return chosen


def check_rows(arguments: InferenceArguments, jobs: list[Job]) -> None:
    """ArgumentError for the mean over a single row, which is that row."""
    single = next((job.task.name for job in jobs if len(job.rows) == 1), "")
    if arguments.calibration == "batch" and single:
        raise ArgumentError(
            f"--calibration batch takes the mean over the answered rows, and of {single} there is one; use "
            "--calibration contextual, or answer more rows"
        )


def check_endpoint(arguments: InferenceArguments) -> None:
    """Refuse what no server can be asked for, and fill in the answer space. Raises ArgumentError."""
    if arguments.text:
        raise ArgumentError(
            "--text asks a model here; an --endpoint answers the rows of a --data_path, labelled or not"
        )
    check_positive(arguments, ("concurrency",))
    check_not_negative(arguments, ("price_in", "price_out"))
    try:
        url = urlsplit(arguments.endpoint)
        usable = url.scheme in ("http", "https") and url.hostname and (url.port or True)
    except ValueError:
        usable = False
    if not usable:
        raise ArgumentError(f"--endpoint {arguments.endpoint} is no URL; give one such as http://localhost:8000/v1")
    if url.username or url.password or url.query:  # not repeated: it may be a key
        raise ArgumentError(
            "--endpoint has a user, a password or a query, and would be written into the run's folder; give the bare "
            "URL, and the key as OPENAI_API_KEY in the environment"
        )
    arguments.answer_space = arguments.answer_space or "free"
    if arguments.answer_space != "free":
        raise ArgumentError(
            f"--answer_space {arguments.answer_space} needs the model itself, and an --endpoint answers freely; leave "
            "it out"
        )
    if processes.count() > 1:
        raise ArgumentError(f"--endpoint takes one process, not {processes.count()}; raise --concurrency instead")
