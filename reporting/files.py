"""Reads and checks the files of a run: summary.json, history.jsonl, predictions.jsonl."""

import json
from collections.abc import Callable
from pathlib import Path

from machine.files import read_json_lines
from reporting.results import METHODS

PROMPT_END = 600  # characters of each prompt that are kept


def read_summary(path: Path) -> dict:
    """A run's summary.json. ValueError says what is wrong with it."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from error
    types = {"method": str, "task": str, "model": str, "seed": int, "metrics": dict, "arguments": dict}
    for name, kind in types.items():
        if not isinstance(summary, dict) or not isinstance(summary.get(name), kind):
            raise ValueError(f"has no {name!r}, or not as a run writes it")
    moments = summary["metrics"]
    if "after" not in moments or not all(isinstance(m, dict) and _all_numbers(m) for m in moments.values()):
        raise ValueError("has no numbers of the moment 'after' in 'metrics'")
    if summary["method"] not in METHODS:
        raise ValueError(f"has the unknown method {summary['method']!r}")
    return summary


def _all_numbers(figures: dict) -> bool:
    return all(isinstance(value, int | float) for value in figures.values())


def read_figures(path: Path, skipped: list[str]) -> list[dict]:
    """The lines of a history.jsonl; none if it is missing or cannot be read."""

    def checked(line: dict) -> dict:
        if "step" not in line or not _all_numbers({n: value for n, value in line.items() if n != "task"}):
            raise ValueError("not a step with its figures")
        return line

    return read_lines(path, skipped, checked)


def read_lines(path: Path, skipped: list[str], convert: Callable[[dict], dict]) -> list[dict]:
    """The converted lines of a JSON Lines file; none if it is missing or cannot be read."""
    try:
        return list(read_json_lines(path, convert)) if path.exists() else []
    except ValueError as error:
        skipped.append(str(error))
        return []


def by_task(name: str, history: list[dict]) -> list[tuple[str, list[dict]]]:
    """A run's name and its history; where its steps are of several tasks, each task's steps for themselves."""
    found = dict.fromkeys(line["task"] for line in history if "task" in line)
    if not found:
        return [(name, history)]
    return [(f"{name}, {task}", [line for line in history if line.get("task") == task]) for task in found]


def checked_answer(line: dict) -> dict:
    """A line of predictions.jsonl, its prompt cut to the end that a page shows. ValueError if a key is missing."""
    missing = [name for name in ("id", "prompt", "answer", "label", "gold") if name not in line]
    if missing:
        raise ValueError(f"it has no {missing[0]!r}")
    return {**line, "prompt": str(line["prompt"])[-PROMPT_END:]}
