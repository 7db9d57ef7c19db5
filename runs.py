"""A run's folder: where it lies, what stands in it, and its summary. The same for all four scripts."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from arguments import ArgumentError, Arguments, as_dict
from tasks import Task

ROOT = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "wandb")


def folder_name(name: str) -> str:
    """A task's or model's name as one folder name: `Qwen/Qwen2.5-1.5B` -> `Qwen2.5-1.5B`, `a b` -> `a-b`."""
    return re.sub(r"[^\w.+-]+", "-", name.rstrip("/").rsplit("/", 1)[-1])


def folder_of(task: Task) -> str:
    """The folder of one task below a run of several: `SuperGLUE/RTE` -> `SuperGLUE-RTE`."""
    return task.name.replace("/", "-")


def make_folder(arguments: Arguments, task: Task | str, learning_rate: float | None = None) -> Path:
    """The run's folder: `--output_dir`, or model/<task, or name of several>/<model>-<batch>-<lr>-<timestamp>.

    ArgumentError if it cannot be written, or holds another run (which is never overwritten).
    """
    if arguments.output_dir:
        folder = Path(arguments.output_dir)
        if folder.is_dir() and any(folder.iterdir()):
            raise ArgumentError(
                f"--output_dir {folder} is not empty, and nothing in it is overwritten; choose another folder"
                + (f", or go on with that run: --resume {folder}" if (folder / "arguments.json").exists() else "")
            )
    else:
        parts = [folder_name(arguments.train_model_name), str(arguments.batch_sentence_num)]
        parts += [f"{learning_rate:g}"] if learning_rate is not None else []
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = task if isinstance(task, str) else task.name
        folder = ROOT / "model" / name.replace("/", "-") / "-".join([*parts, stamp])
        number = 2
        while folder.exists():
            folder = folder.with_name(f"{'-'.join([*parts, stamp])}-{number}")
            number += 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "arguments.json", as_dict(arguments))
    except OSError as error:
        raise ArgumentError(
            f"--output_dir {folder} cannot be written ({error.strerror}); choose a folder that you may write to"
        ) from error
    return folder


def write_json(path: Path, data: dict) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False)
        file.write("\n")
    os.replace(name, path)


def peak_memory_bytes() -> int:
    """The most memory the run has held: on the card if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def versions() -> dict[str, str]:
    """What the run was computed with: Python, the packages, the hardware and the project's commit."""
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {torch.get_num_threads()}",
        "commit": commit or "unknown",
    }


def data_hash(rows: list[dict]) -> str:
    """A fingerprint of the rows a run was given."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()[:16]


def write_summary(
    folder: Path,
    method: str,
    task: Task | str,
    arguments: Arguments,
    metrics: dict[str, dict[str, float]],
    samples: int = 0,
    train_seconds: float = 0.0,
    **more,
) -> dict:
    """summary.json: what was run, what came out, and all that is needed to run it again. Returns it.

    task: the task, or a name for several.
    metrics: by moment (`before`, `after`, `best`), every official metric under its name and `invalid_rate`.
    """
    summary = {
        "method": method,
        "task": task if isinstance(task, str) else task.name,
        "task_version": None if isinstance(task, str) else task.version,
        "model": arguments.train_model_name,
        "seed": arguments.seed,
        "answer_space": arguments.answer_space,
        "samples": samples,
        "train_seconds": round(train_seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "metrics": metrics,
        "versions": versions(),
        "arguments": as_dict(arguments),
        **more,
    }
    write_json(folder / "summary.json", summary)
    return summary
