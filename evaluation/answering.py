"""Prompts built for many rows, and answered in batches that are saved as they come."""

import os
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

import prompts
from engine.batches import common_prefix
from engine.engine import Engine, LastingPrefix
from evaluation import calibration, predict, predictions
from evaluation.answer_spaces import AnswerFormat
from evaluation.predictions import Prediction
from machine import processes
from machine.files import write_atomically
from machine.terminal import Progress
from tasks import Task

PROMPTS_AT_ONCE = 1000
TOKENS_AT_ONCE = 8192  # of prompts that one process answers before they are saved


def build_prompts(
    task: Task, rows: list[dict], tokenizer, shots: list[list[dict]], use_CoT: bool, max_prompt_length: int
) -> tuple[list[array], int]:
    """Every row's prompt with its demonstrations, and how many prompts lost text. PromptError if one cannot fit.

    The token ids are arrays: as Python integers those of some 400,000 rows would take gigabytes.
    """
    prompt_ids: list[array] = []
    shortened = 0
    while len(prompt_ids) < len(rows):
        start = end = len(prompt_ids)
        while end < min(start + PROMPTS_AT_ONCE, len(rows)) and shots[end] is shots[start]:
            end += 1
        built, cut = prompts.build_all(task, rows[start:end], tokenizer, use_CoT, max_prompt_length, shots[start])
        prompt_ids += [array("i", ids) for ids in built]
        shortened += cut
    return prompt_ids, shortened


def batches(lengths: list[int], batch: int) -> list[slice]:
    """The rows that are answered and saved at a time, in order: at most `batch`, and on a CPU so few tokens that
    progress shows every few seconds. They depend on the prompts alone, so that a resume has the same ones.

    lengths: of the prompts, without the prefix that all share.
    """
    most = float("inf") if torch.cuda.is_available() else TOKENS_AT_ONCE * processes.count()
    starts, tokens = [], 0
    for row, length in enumerate(lengths):
        if not starts or row - starts[-1] >= batch or tokens + length > most:
            starts, tokens = [*starts, row], 0
        tokens += length
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(lengths)])]


def answer(
    folder: Path,
    answer_format: AnswerFormat,
    rows: list[dict],
    prompt_ids: list[array],
    engine: Engine,
    batch: int,
    seed: int,
    prior: Callable[[np.ndarray], np.ndarray] | None = None,
    **how,
) -> list[Prediction]:
    """The answers to all prompts, also written to predictions.jsonl, which appears only when it is complete.

    What an interrupted run left is kept, in whole batches of at most `batch` rows, and not computed again; each batch
    has a random stream of its own. `how` goes to `predict`. ArgumentError if the folder's answers are to other rows.
    prior: what the labels' probabilities are corrected by once all rows are answered (calibration.prior_of).
    """
    task = answer_format.task
    final, unfinished = folder / predictions.FILE, folder / predictions.UNFINISHED
    if processes.broadcast_from_main(final.exists):
        return predictions.read(final, task, rows)
    answers = processes.broadcast_from_main(
        lambda: predictions.read(unfinished, task, rows) if unfinished.exists() else []
    )
    shared = common_prefix(prompt_ids)
    parts = batches([len(ids) - shared for ids in prompt_ids], batch)
    if len(answers) < len(rows):
        answers = answers[: max(part.start for part in parts if part.start <= len(answers))]
    engine.lasting_prefix = LastingPrefix(shared)
    main = processes.is_main()
    with (
        Progress(task.name, "row", len(rows), len(answers), show=main) as progress,
        open(unfinished, "ab") if main else tempfile.TemporaryFile() as file,
    ):
        if main:
            kept = unfinished.read_bytes().split(b"\n")[: len(answers)]
            file.truncate(sum(len(line) + 1 for line in kept))
        for part in (part for part in parts if part.start >= len(answers)):
            ids = [list(prompt) for prompt in prompt_ids[part]]
            found = predict.predict(engine, answer_format, ids, seed=seed + part.start, **how)
            texts = engine.tokenizer.batch_decode(ids)
            file.writelines(predictions.encoded_lines(task, rows[part], texts, found, prior is not None))
            file.flush()
            os.fsync(file.fileno())
            answers += found
            progress.advance(len(found))
    if prior is None:
        if main:
            os.replace(unfinished, final)
        return answers
    answers = calibration.corrected_predictions(answer_format, answers, prior)
    if main:
        write_atomically(final, lambda file: write_lines(file, task, rows, prompt_ids, engine.tokenizer, answers))
        unfinished.unlink()
    return answers


def write_lines(
    file: BinaryIO, task: Task, rows: list[dict], prompt_ids: list[array], tokenizer, answers: list[Prediction]
) -> None:
    """The lines of predictions.jsonl, with a thousand prompts as text at a time."""
    for start in range(0, len(rows), PROMPTS_AT_ONCE):
        part = slice(start, start + PROMPTS_AT_ONCE)
        texts = tokenizer.batch_decode([list(prompt) for prompt in prompt_ids[part]])
        file.writelines(predictions.encoded_lines(task, rows[part], texts, answers[part]))
