"""Writes the inputs of all programs of a benchmark, so that they see the same rows, prompts, tokens and model.

    .venv/bin/python -m benchmarks.prepare training FILE --seed 0 --rows 512 --held_out 400
    .venv/bin/python -m benchmarks.prepare scoring FOLDER --rows 400 --shots 16
    .venv/bin/python -m benchmarks.prepare long FOLDER --tokens 256

Several can be written at once, with a `+` between them.

training: MR rows in the order in which ppo.py takes them, with their prompts' token ids, and held-out rows.
scoring: MR prompts as text, a JSON line each (`prompt`, `label`), in this project's wording and in the short wording of
lm-evaluation-harness's SST-2 task. long: training data in SST's format whose prompts have about `--tokens` tokens.
"""

import argparse
import json
import random
import sys
from itertools import groupby, islice
from pathlib import Path

import torch

import fewshot
import prompts
import tasks
from benchmarks.common import label_logits
from engine import models
from machine.files import write_json
from tasks import splits
from training.sampler import StratifiedSampler

CHECKED = 4  # prompts on which every program's logits are compared
LONG_ROWS = 160
SHORT_QUESTION = "\nQuestion: Is this sentence positive or negative?\nAnswer:"


def training(path: Path, seed: int, rows: int, held_out: int) -> None:
    """The inputs of the PPO benchmarks, as one JSON file."""
    task = tasks.get("MR")
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    train, evaluated = splits.train_and_held_out(task, None, held_out, seed)
    # Only as many as are read: a file of all rows would cost every baseline seconds and memory.
    chosen = [train[i] for i in islice(StratifiedSampler([row["label"] for row in train], seed), rows)]

    def with_ids(some: list[dict]) -> list[dict]:
        ids, _ = prompts.build_all(task, some, tokenizer)
        return [{"id": row["id"], "label": row["label"], "ids": prompt} for row, prompt in zip(some, ids)]

    shown = with_ids(evaluated)
    label_tokens = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in task.words]
    model = models.load_model(models.EMBEDDED, dtype=torch.float32)
    write_json(
        path,
        {
            "model": models.EMBEDDED,
            "model_folder": str(models.embedded_folder()),
            "eos_token": tokenizer.eos_token,
            # Not the end-of-sequence token, which ends the prompts' turns: TRL masks every padding token.
            "pad_token": tokenizer.unk_token,
            "label_tokens": label_tokens,
            "train": with_ids(chosen),
            "held_out": shown,
            "check_logits": label_logits(model, [row["ids"] for row in shown[:CHECKED]], label_tokens).tolist(),
        },
    )


def scoring(folder: Path, rows: int, shots: int, seed: int) -> None:
    """`own.jsonl` and `short.jsonl`: the same rows and demonstrations in two wordings."""
    task = tasks.get("MR")
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    train, evaluated = splits.train_and_held_out(task, None, rows, seed)
    shown = fewshot.draw(task, train, shots, random.Random(seed)) if shots else []
    own, _ = prompts.build_all(task, evaluated, tokenizer, max_prompt_length=10**9, demonstrations=shown)
    before = "".join(f"{row['sentence']}{SHORT_QUESTION} {task.words[row['label']]}\n\n" for row in shown)
    texts = {
        "own": tokenizer.batch_decode(own, clean_up_tokenization_spaces=False),
        "short": [before + row["sentence"] + SHORT_QUESTION for row in evaluated],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompt_texts in texts.items():
        lines = [json.dumps({"prompt": p, "label": row["label"]}) for p, row in zip(prompt_texts, evaluated)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def long_prompts(folder: Path, tokens: int) -> None:
    """train.tsv and dev.tsv, in which a sentence is several of MR's with one label, joined up to the length."""
    task = tasks.get("SST")
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    train, _ = splits.train_and_held_out(tasks.get("MR"), None, 0, 0)
    around = len(prompts.build(task, {"sentence": "", "label": 0}, tokenizer)[0])
    lines: list[str] = []
    queues = [iter([row["sentence"] for row in train if row["label"] == label]) for label in (0, 1)]
    while len(lines) < LONG_ROWS:
        label = len(lines) % 2
        text = ""
        for sentence in queues[label]:
            longer = f"{text} {' '.join(sentence.split())}".strip()
            if text and around + len(tokenizer(longer).input_ids) > tokens:
                break
            text = longer
        if not text:
            break
        lines.append(f"{text} \t{label}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train.tsv", lines[:-4]), ("dev.tsv", lines[-4:])):
        (folder / name).write_text("\n".join(["sentence\tlabel", *part]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("training", "scoring", "long"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--held_out", type=int, default=400)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=256)
    for is_separator, words in groupby(sys.argv[1:], key=lambda word: word == "+"):
        if is_separator:
            continue
        arguments = parser.parse_args(list(words))
        arguments.path.parent.mkdir(parents=True, exist_ok=True)
        if arguments.what == "training":
            training(arguments.path, arguments.seed, arguments.rows, arguments.held_out)
        elif arguments.what == "scoring":
            scoring(arguments.path, arguments.rows, arguments.shots, arguments.seed)
        else:
            long_prompts(arguments.path, arguments.tokens)


if __name__ == "__main__":
    main()
