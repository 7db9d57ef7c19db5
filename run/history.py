"""history.jsonl: one line per step and per evaluation, and what can be read from it."""

import json
import os
from pathlib import Path

from machine.errors import ArgumentError


def append_history(folder: Path, step: int, figures: dict[str, float]) -> None:
    """One line of history.jsonl: the step and its figures; on the disk before the checkpoint that counts on it."""
    line = json.dumps({"step": step, **figures})
    with open(folder / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def trim_history(folder: Path, step: int) -> None:
    """Before a resume: drop the lines after the checkpoint's step, which will be written again.

    Raises ArgumentError for a line that cannot be read, unless it is the last one: a kill while it was written.
    """
    if (folder / "history.jsonl").exists():
        aside = folder / ".new-history.jsonl"
        aside.write_text("".join(json.dumps(line) + "\n" for line in history(folder) if line["step"] <= step))
        os.replace(aside, folder / "history.jsonl")


def history(folder: Path) -> list[dict]:
    """The lines of history.jsonl; none before the first evaluation. A last line that was cut off is left out.

    Raises ArgumentError for any other line that is no JSON object with a step.
    """
    path = folder / "history.jsonl"
    if not path.exists():
        return []
    found, texts = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            line["step"] + 0  # a number, in an object
        except (ValueError, TypeError, KeyError):
            if number == len(texts):
                break
            raise ArgumentError(
                f"{path}, line {number} is broken ({text[:40]!r}); put it right, or remove this line and all after it"
            ) from None
        found.append(line)
    return found


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
