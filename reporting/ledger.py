"""The ledger of measured runs: one line of a CSV file for each task that a run answered.

    .venv/bin/python -m reporting.ledger FOLDER --csv docs/results/runs.csv

A line holds what a table needs once the run's folder is gone: the figures, what they cost, the command, and the
predicted label of every evaluated row. It holds no text and no gold label, which are other people's data; together with
the tasks' files (reporting/claims.py) the labels give every metric again. A line replaces the one of the same task,
method, seed, rows and settings.
"""

import csv
import importlib
import io
import json
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import tasks
from machine import hardware
from machine.errors import ArgumentError, clear_errors
from machine.files import write_atomically
from run.parser import Parser, option
from tasks import Task

LEDGER = "docs/results/runs.csv"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # class ids
INVALID = "-"
LONGEST_FIELD = 10_000_000  # characters: the labels of a large validation split take more than csv's 131,072
LOCATION = ("output_dir", "resume", "config", "report_to")  # of no interest to who repeats a command
PROGRAMS = {  # by what summary.json calls a method: the program, and the class of its arguments
    "ppo": ("ppo", "PPOArguments"),
    "sft": ("sft", "SFTArguments"),
    "head": ("classify", "HeadArguments"),
    "zero-shot": ("inference", "InferenceArguments"),
    "trained": ("inference", "InferenceArguments"),
    "few-shot": ("fewshot", "FewshotArguments"),
    "trl-grpo": ("benchmarks.trl_grpo", "GRPOArguments"),
}


@dataclass
class LedgerArguments:
    """What this program takes beside the folder."""

    csv: str = option(LEDGER, "run", "the ledger")
    processor: str = option("", "run", "processor of the machine that made the runs; default: this machine's")


@dataclass(frozen=True)
class Entry:
    """One line. Empty: not known."""

    task: str
    version: int | None
    split: str
    model: str
    method: str  # as in the report's tables: PPO (labels, expected)
    seed: int
    rows_trained: int  # rows seen, repetitions included
    rows_evaluated: int
    score: float
    metrics: dict[str, float]  # every official one, and invalid_rate
    train_seconds: float | None
    peak_memory_bytes: int | None
    machine: str
    date: str  # on which the run was started
    commit: str
    command: str
    data_hash: str  # of the training rows (run.folder.data_hash); empty without training
    held_out_hash: str  # of the evaluated rows
    settings: dict  # what the report tells runs of one method apart by
    labels: str  # see `pack`

    @property
    def key(self) -> tuple:
        """What makes two lines the same measurement."""
        names = ("task", "version", "split", "model", "method", "seed", "rows_trained", "rows_evaluated", "settings")
        return tuple(_text(getattr(self, name)) for name in names)


# -------------------------------------------------------------------------------------------------------- the file


def read(path: Path) -> list[Entry]:
    """All lines of a ledger; none if there is no file. ArgumentError names a line that cannot be read."""
    if not path.exists():
        return []
    csv.field_size_limit(LONGEST_FIELD)
    found = []
    with open(path, encoding="utf-8", newline="") as file:
        for number, line in enumerate(csv.DictReader(file), 2):
            try:
                found.append(_from_text(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ArgumentError(
                    f"{path}, entry {number - 1} is not as reporting.ledger writes it ({error}); put the file back as "
                    "it was"
                ) from error
    return found


def append(folder: Path, path: Path, processor: str = "") -> list[Entry]:
    """Add the finished runs in (and below) a folder to a ledger, or replace their lines. Returns their entries.

    The file is written whole or not at all, in the order of task, method and seed. processor: of the machine that made
    the runs; default this one's. A run that went on from another one's adapter is only called so ("SFT + PPO") if
    both lie below the folder. ArgumentError if there is no finished run with usable answers.
    """
    new = list(entries(folder, processor or hardware.processor()))
    if not new:
        raise ArgumentError(f"{folder} holds no finished run whose predictions.jsonl fits its summary.json")
    lines = {entry.key: entry for entry in [*read(path), *new]}
    order = [*tasks.TASKS]  # `entries` gives no other task
    data = to_csv(sorted(lines.values(), key=lambda entry: (order.index(entry.task), entry.key)))
    write_atomically(path, lambda file: file.write(data.encode()))
    return new


def to_csv(lines: Iterable[Entry]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(Entry)]
    writer.writerow(names)
    writer.writerows([_text(getattr(entry, name)) for name in names] for entry in lines)
    return text.getvalue()


def _text(value) -> str:
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    return "" if value is None else str(value)


def _from_text(line: dict[str, str]) -> Entry:
    def number(name: str, kind):
        return kind(line[name]) if line[name] else None

    whole = {name: number(name, int) for name in ("version", "peak_memory_bytes")}
    whole |= {name: int(line[name]) for name in ("seed", "rows_trained", "rows_evaluated")}
    read_too = {"score": float(line["score"]), "train_seconds": number("train_seconds", float)}
    read_too |= {name: json.loads(line[name]) for name in ("metrics", "settings")}
    return Entry(**{field.name: line[field.name] for field in fields(Entry)} | whole | read_too)


# ------------------------------------------------------------------------------------------------------ the labels


def pack(task: Task, labels: list[int | float | None]) -> str:
    """The predicted labels as text: a digit (from class 10 on a letter) for each row. Of a number task the numbers with
    at most three decimals, and of one with more classes than digits their ids, between spaces. `-` stands for an answer
    that did not parse."""
    if task.number:
        return " ".join(INVALID if x is None else f"{x:.3f}".rstrip("0").rstrip(".") for x in labels)
    if len(task.labels) > len(DIGITS):
        return " ".join(INVALID if x is None else str(x) for x in labels)
    return "".join(INVALID if x is None else DIGITS[x] for x in labels)


def unpack(task: Task, text: str) -> list[int | float | None]:
    """The labels that `pack` was given, numbers rounded. ValueError for anything else."""
    if task.number or len(task.labels) > len(DIGITS):
        return [None if word == INVALID else (float if task.number else int)(word) for word in text.split(" ")]
    return [None if digit == INVALID else DIGITS.index(digit) for digit in text]


# -------------------------------------------------------------------------------------------------- from run folders


def entries(folder: Path, processor: str) -> Iterator[Entry]:
    """An entry for every result below a folder whose answers are there and give its metrics."""
    from reporting.collect import collect  # imports scikit-learn, which who reads a ledger need not wait for
    from reporting.results import START

    found = collect(folder)
    for reason in found.skipped:
        print(f"reporting.ledger: warning: {reason}", file=sys.stderr)
    for result in found.results:
        if not result.answers or not result.scored or result.task.name not in tasks.TASKS:
            continue
        before_training = result.run.endswith(START)
        run = folder / result.run.removesuffix(START)
        summary = _json(run / "summary.json")
        begun = _json(run / "run.json") if (run / "run.json").exists() else {}
        _, labels, _ = result.answered_rows()
        trained = 0 if before_training else summary.get("steps", 0) * summary["arguments"]["batch_sentence_num"]
        # A run that only answers has one fingerprint, of the rows that it answers.
        held_out = begun.get("held_out_hash") or summary.get("held_out_hash" if "steps" in summary else "data_hash", "")
        yield Entry(
            task=result.task.name,
            version=result.version,
            split=result.split,
            model=result.model,
            method=result.method,
            seed=0 if before_training else result.seed,  # greedy answers of the model as it is
            rows_trained=trained,
            rows_evaluated=len(labels),
            score=round(result.metrics["score"], 6),
            metrics={n: round(result.metrics[n], 6) for n in (*result.task.metrics, "invalid_rate")},
            train_seconds=summary.get("train_seconds") if trained else None,
            peak_memory_bytes=result.memory,
            machine=f"{processor}, {summary['versions']['device']}" if "versions" in summary else processor,
            date=begun.get("started", time.strftime("%Y-%m-%d", time.localtime(_changed(run))))[:10],
            commit=summary.get("versions", {}).get("commit", "")[:12],
            command=command(summary["method"], begun.get("asked") or summary["arguments"]),
            data_hash=summary.get("data_hash", "") if trained else "",
            held_out_hash=held_out,
            settings={name: _without_folder(value) for name, value in result.settings.items()},
            labels=pack(result.task, labels),
        )


def command(method: str, asked: dict) -> str:
    """The command line that asks for this: every argument that is not at its default, but for where the run lies."""
    module, kind = PROGRAMS[method]
    # By name, as the scripts stand above this module: it needs nothing but their defaults.
    given = fields(getattr(importlib.import_module(module), kind))
    defaults = {f.name: f.default for f in given if f.init}
    words = [".venv/bin/python", *(["-m", module] if "." in module else [f"{module}.py"])]
    for name, value in asked.items():
        if name in defaults and name not in LOCATION and value is not None and value != defaults[name]:
            words += [f"--{name}", str(_without_folder(value))]
    return shlex.join(words)


def _without_folder(value):
    """A value; of a path on this machine only the last name, as the folders say nothing elsewhere."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _changed(run: Path) -> float:
    return (run / "summary.json").stat().st_mtime


def main(argv: list[str] | None = None) -> None:
    parser = Parser(LedgerArguments, __doc__.splitlines()[0], prog="reporting.ledger")
    parser.add_argument("folder", type=Path, help="a finished run, or a folder below which runs lie")
    arguments = parser.parse_args(argv)
    ledger = Path(arguments.csv)
    with clear_errors("reporting.ledger"):
        if not arguments.folder.is_dir():
            raise ArgumentError(f"{arguments.folder} is not a folder; give a run's, or one that runs lie below")
        new = append(arguments.folder, ledger, arguments.processor)
    for entry in new:
        print(
            f"{entry.task}, {entry.method}, seed {entry.seed}: score {entry.score:.4f} on {entry.rows_evaluated} rows"
        )
    print(f"{len(new)} runs; the ledger {ledger} has {len(read(ledger))}.")


if __name__ == "__main__":
    main()
