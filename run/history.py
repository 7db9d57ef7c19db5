"""history.jsonl, a line of figures per step and per evaluation, and episodes.jsonl, a few answers of some of them."""

import json
from pathlib import Path

from machine.files import append_lines, read_json_lines, write_atomically

HISTORY, EPISODES = "history.jsonl", "episodes.jsonl"


def append_history(folder: Path, step: int, figures: dict[str, float], task: str = "") -> None:
    """Add the figures of a step or an evaluation. They reach the disk before the checkpoint that counts on them.

    task: of the step, where it is one of several.
    """
    of_task = {"task": task} if task else {}
    append_lines(folder / HISTORY, [json.dumps({"step": step, **of_task, **figures})])


def append_episodes(folder: Path, step: int, episodes: list[dict]) -> None:
    """Add a step's sample episodes."""
    lines = [json.dumps({"step": step, **episode}, ensure_ascii=False) for episode in episodes]
    append_lines(folder / EPISODES, lines)


def trim_history(folder: Path, step: int) -> None:
    """Before a resume: drop what came after the checkpoint's step from both files; it will be written again.

    Raises DataError for a line that cannot be read, unless it is the last one: a kill while it was written.
    """
    for path in (folder / HISTORY, folder / EPISODES):
        if path.exists():
            texts, lines = path.read_bytes().split(b"\n"), read_json_lines(path, _with_step)
            kept = [text + b"\n" for text, line in zip(texts, lines) if line["step"] <= step]
            write_atomically(path, lambda file, kept=kept: file.writelines(kept))


def history(folder: Path) -> list[dict]:
    """The lines of history.jsonl; none before the first evaluation. A last line that was cut off is left out.

    Raises DataError for any other line that is no JSON object with a step.
    """
    return _lines(folder / HISTORY)


def episodes(folder: Path) -> list[dict]:
    """The lines of episodes.jsonl: step, row id, prompt, answer, gold and reward, of a run of several tasks also the
    task. Errors are those of `history`."""
    return _lines(folder / EPISODES)


def _lines(path: Path) -> list[dict]:
    return list(read_json_lines(path, _with_step)) if path.exists() else []


def _with_step(line: dict) -> dict:
    if not isinstance(line.get("step"), int):
        raise ValueError("no step")
    return line


def evaluations(folder: Path) -> list[dict[str, float]]:
    """The held-out metrics of every evaluation so far, in order, with its `step`."""
    return [
        {"step": line["step"], **{n[5:]: v for n, v in line.items() if n.startswith("eval/") and n != "eval/seconds"}}
        for line in history(folder)
        if any(name.startswith("eval/") for name in line)
    ]


def train_seconds(folder: Path) -> float:
    """Seconds spent on rollouts and updates, over all resumes; evaluation and loading are not in it."""
    return sum(line.get("time/seconds_per_step", 0.0) for line in history(folder))


def before_after_table(moments: dict[str, dict[str, float]]) -> str:
    """The held-out metrics by moment, as text."""
    names = [name for name in moments["before"] if name != "step"]
    width = max(map(len, names)) + 2
    lines = ["", "held-out".ljust(width) + "".join(f"{moment:>12}" for moment in moments)]
    lines += [
        name.ljust(width) + "".join(f"{m.get(name, float('nan')):12.3f}" for m in moments.values()) for name in names
    ]
    return "\n".join(lines)
