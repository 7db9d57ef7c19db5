"""Answers to a task's questions: zero-shot, or by an adapter that ppo.py or sft.py trained.

    bash scripts/inference.sh                                 the embedded model on MR
    bash scripts/inference.sh --task SST,RTE --answer_space score
    bash scripts/inference.sh --task MR --from_local True --train_model_name model/MR/<run>/best
    bash scripts/inference.sh --task GLUE --submission True --from_local True --train_model_name 'model/{task}/best'
    bash scripts/inference.sh --endpoint https://api.openai.com/v1 --train_model_name gpt-4o       (docs/endpoints.md)

    bash scripts/inference.sh --from_local True --train_model_name exported --text "a warm and funny film"

The run's folder holds predictions.jsonl (every prompt, answer, label and gold label) and summary.json; of several tasks
each has a folder of its own, and <suite>.json holds the suite's score. With `--split test` the leaderboard file lies
there too, and with `--submission True` the suite's zip. fewshot.py is the same with demonstrations in the prompts.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from itertools import islice
from pathlib import Path

import tasks
from evaluation import outcome
from evaluation.arguments import InferenceArguments, check, check_rows
from evaluation.asking import Classifier, check_texts, defaults, line, read_texts
from evaluation.jobs import Job, load_jobs
from machine import processes
from machine.errors import ArgumentError
from machine.files import write_json
from run import faults, prompt_record
from run.arguments import as_dict, parse
from run.folder import folder_of, lock, make_folder
from tasks import Task, splits


def no_shots(arguments: InferenceArguments, job: Job, tokenizer) -> list[list[dict]]:
    """For every row its demonstrations: none."""
    return [[]] * len(job.rows)


def run_job(arguments: InferenceArguments, job: Job, engine, folder: Path, method: str, show: Callable) -> dict:
    """Answer one task's rows, write its files and say what came out. Returns its summary; {} beside the main process.

    show: see `run`.
    """
    from engine.loading import check_vocabulary
    from evaluation import answer_spaces, answering, calibration

    started = time.perf_counter()
    task, rows = job.task, job.rows

    # 1. prompts
    # The majority label is looked for before hours of work: free answers can be invalid, and a leaderboard file has no
    # place for those.
    needs_majority = job.labelled or (arguments.answer_space == "free" and task.submission and job.whole_split)
    majority = splits.majority_label(task, rows, arguments.data_path) if needs_majority else (0, "")
    shots = show(arguments, job, engine.tokenizer)
    prompt_ids, shortened = answering.build_prompts(
        task, rows, engine.tokenizer, shots, arguments.use_CoT, arguments.max_prompt_length
    )
    check_vocabulary(engine, job.model, answer_spaces.largest_token(task, engine.tokenizer, prompt_ids))
    if notice := answer_spaces.spelling_notice(task, engine.tokenizer):
        print(notice)
    kept = prompt_record.record(engine.tokenizer, prompt_record.hash_of(prompt_ids))
    processes.broadcast_from_main(lambda: prompt_record.check_or_keep(folder, task.name, kept))

    # 2. answers
    answer_format = answer_spaces.AnswerFormat(
        task, arguments.use_CoT, arguments.strict_format, arguments.number_answer
    )
    prior = None
    if arguments.calibration != "none":
        asked = arguments.answer_space, arguments.max_prompt_length
        prior = calibration.prior_of(arguments.calibration, engine, answer_format, shots, *asked)
    answers = answering.answer(
        folder,
        answer_format,
        rows,
        prompt_ids,
        engine,
        arguments.batch_sentence_num,
        arguments.seed,
        prior,
        answer_space=arguments.answer_space,
        max_response_length=arguments.max_response_length,
        temperature=arguments.model_temperature if arguments.do_sample else 0.0,
    )

    # 3. scores, and the leaderboard's file
    details = {"shots": len(shots[0]), "shortened": shortened}
    return outcome.write_results(arguments, job, folder, method, answers, majority, started, details)


def run(arguments: InferenceArguments, program: str, method: str = "", show: Callable = no_shots) -> None:
    """Answer all tasks of `--task`. `show(arguments, job, tokenizer)` gives every row its demonstrations; the tokenizer
    is None if a server has it."""
    with faults.guard(program) as guard, contextlib.ExitStack() as held:
        jobs = load_jobs(arguments, check(arguments))
        check_rows(arguments, jobs)
        moment = prompt_record.prompts_time(arguments.resume)
        if arguments.endpoint:
            from evaluation import remote

            answer = remote.prepare(arguments, jobs, show, moment)
        else:
            answer = prepare(arguments, jobs, show, moment)
        several = arguments.task in tasks.SUITES or len(jobs) > 1
        name = arguments.task.replace(",", "+").replace(" ", "") if several else jobs[0].task
        top = guard.folder = processes.broadcast_from_main(lambda: open_folder(arguments, name, moment, held))
        guard.saved = "the answers so far are kept"
        summaries: dict[str, dict] = {}
        for job in jobs:
            folder = top / folder_of(job.task) if several else top
            folder.mkdir(exist_ok=True)
            stored = processes.broadcast_from_main(
                lambda path=folder / "summary.json": path.exists() and path.read_text(encoding="utf-8")
            )
            if stored:
                summaries[job.task.name] = json.loads(stored)
                print(f"{job.task.name} is already done.")
                continue
            summaries[job.task.name] = answer(job, folder, method)
        if processes.is_main():
            outcome.finish(arguments, jobs, top, summaries, several)


def prepare(
    arguments: InferenceArguments, jobs: list[Job], show: Callable, moment: datetime
) -> Callable[[Job, Path, str], dict]:
    """Load the first job's model. Returns `run_job` of a job, a folder and a method, with the job's own model."""
    # Not at the top: these import torch and transformers, which takes seconds, and bad input is refused without.
    import transformers

    from engine import models, templates
    from engine.loading import load_frozen_engine
    from evaluation import prompt_length

    lengths = prompt_length.of_jobs(arguments, jobs)
    how = arguments.model_options | {"longest": max(lengths) + arguments.max_response_length}
    how["tokens_per_micro_batch"] = arguments.tokens_per_micro_batch
    engine, loaded = load_frozen_engine(jobs[0].model, **how), jobs[0].model
    check_vocabularies(arguments, jobs, engine)
    print(models.device_line(arguments.dtype))

    def answer(job: Job, folder: Path, method: str) -> dict:
        nonlocal engine, loaded
        if job.model != loaded:
            engine, loaded = None, job.model  # the old one goes first: two may not fit
            engine = load_frozen_engine(job.model, **how)
        templates.set_time(engine.tokenizer, moment)
        transformers.set_seed(arguments.seed)
        trained = bool(models.adapter_chain(job.model, arguments.from_local)[1])
        length = lengths[jobs.index(job)]
        used = method or ("trained" if trained else "zero-shot")
        return run_job(replace(arguments, max_prompt_length=length), job, engine, folder, used, show)

    return answer


def check_vocabularies(arguments: InferenceArguments, jobs: list[Job], engine) -> None:
    """ModelError, before there is a folder, if the first model has no embeddings for tokens that its rows hold."""
    from engine.loading import check_vocabulary, may_lack_embeddings
    from evaluation import answer_spaces, answering, prompt_length

    if not may_lack_embeddings(engine):
        return
    how = arguments.use_CoT, arguments.max_prompt_length or prompt_length.WHOLE
    for job in jobs:
        if job.model == jobs[0].model:
            shots = no_shots(arguments, job, engine.tokenizer)
            prompt_ids, _ = answering.build_prompts(job.task, job.rows, engine.tokenizer, shots, *how)
            check_vocabulary(engine, job.model, answer_spaces.largest_token(job.task, engine.tokenizer, prompt_ids))


def open_folder(arguments: InferenceArguments, name: Task | str, moment: datetime, held: contextlib.ExitStack) -> Path:
    """The run's folder, a new one or that of `--resume`; closed to other runs for as long as `held` is open.

    moment: see prompt_record.prompts_time; run.json keeps it.
    """
    about = {prompt_record.TIME: moment.isoformat()}
    folder = Path(arguments.resume) if arguments.resume else make_folder(arguments, name, about=about)
    held.enter_context(lock(folder))
    if arguments.resume:
        write_json(folder / "run.json", about | prompt_record.read(folder))
    return folder


def ask(arguments: InferenceArguments) -> None:
    """Label the texts of `--text`, and print a line for each: label, probability and text."""
    with faults.guard("inference.py") as guard:
        guard.saved = "what is printed is all there is"
        check_texts(arguments)
        with contextlib.redirect_stdout(sys.stderr):  # the answers may go into a pipe
            classifier = Classifier(**as_dict(arguments))
        texts, first = read_texts(arguments.text), 1
        while batch := processes.broadcast_from_main(lambda: list(islice(texts, arguments.batch_sentence_num))):
            labels, probabilities = classifier.predict(batch, first)
            if processes.is_main():
                for text, label, chances in zip(batch, labels, probabilities):
                    print(line(classifier.task, text, label, chances), flush=True)
            first += len(batch)
        if first == 1:
            raise ArgumentError("--text -: there is no text on standard input; write one a line")


def main(argv: list[str] | None = None) -> None:
    arguments = parse(InferenceArguments, __doc__.splitlines()[0], argv, of_model=defaults)
    if arguments.text:
        ask(arguments)
    else:
        run(arguments, "inference.py")


if __name__ == "__main__":
    processes.run(main)
