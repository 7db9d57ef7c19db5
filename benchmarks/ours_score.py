"""One measured run of this project's scoring: the label with the highest log-likelihood for every prompt of a file.

    .venv/bin/python -m benchmarks.ours_score --prompts FILE --choices negative,positive

Seconds run from texts to scored answers: tokenization is included, model loading is not.
"""

from benchmarks import common  # first: its clock starts here  # isort: skip

import argparse
import contextlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import tasks
from engine import models
from engine.loading import load_frozen_engine
from evaluation import predict, scores
from evaluation.answer_spaces import AnswerFormat
from evaluation.arguments import InferenceArguments
from evaluation.predictions import Prediction

WARM_UP = 2  # prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with prompt and label")
    parser.add_argument("--choices", required=True, help="the labels' spellings, separated by commas")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.prompts.read_text(encoding="utf-8").splitlines()]
    task = replace(tasks.get("MR"), words=tuple(arguments.choices.split(",")))
    at_once = InferenceArguments().batch_sentence_num
    with contextlib.redirect_stdout(sys.stderr):
        engine = load_frozen_engine(models.EMBEDDED, **InferenceArguments().model_options)

    def answer(rows: list[dict]) -> tuple[list[Prediction], list[int]]:
        ids = engine.tokenizer([row["prompt"] for row in rows], add_special_tokens=False).input_ids
        found: list[Prediction] = []
        for start in range(0, len(ids), at_once):
            found += predict.predict(engine, AnswerFormat(task), ids[start : start + at_once], "score", 1)
        return found, [len(prompt) for prompt in ids]

    answer(lines[:WARM_UP])
    began = time.perf_counter()
    found, lengths = answer(lines)
    score = scores.score(task, lines, found)["score"]
    seconds = time.perf_counter() - began
    figures = {
        "samples": len(lines),
        "seconds": seconds,
        "samples_per_second": len(lines) / seconds,
        "prompt_tokens": sum(lengths) / len(lengths),
        "score": score,
        "answers": "".join(str(prediction.label) for prediction in found),
    }
    common.emit(figures, ("torch", "transformers"))


if __name__ == "__main__":
    main()
