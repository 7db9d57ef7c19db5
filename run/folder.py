"""A run's folder: its name, its lock, the files that describe the run, and the summary. The same for all scripts."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from machine import processes
from machine.errors import ArgumentError
from machine.files import UNFINISHED_PREFIX, free_name, write_json
from run import checkpoints, prompt_record
from run.arguments import Arguments, as_dict, run_folder
from run.history import trim_history
from tasks import Task, own

ROOT = Path(__file__).resolve().parents[1]
LOCK = ".lock"
LOCATION = ("resume", "output_dir")  # where a run lies, not what it is
# What the weights and the optimizer's state of a checkpoint were made with.
SETTLED = ("lora_r", "lora_alpha", "lora_targets", "use_rslora", "full_finetuning", "optimizer", "weight_decay")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "wandb")


def folder_name(name: str) -> str:
    """A task's or model's name as one folder name: `Qwen/Qwen2.5-1.5B` -> `Qwen2.5-1.5B`, `a b` -> `a-b`."""
    return re.sub(r"[^\w.+-]+", "-", name.rstrip("/").rsplit("/", 1)[-1])


def folder_of(task: Task) -> str:
    """The folder of one task below a run of several: `SuperGLUE/RTE` -> `SuperGLUE-RTE`."""
    return task.name.replace("/", "-")


@dataclass
class Run:
    """A training run's folder, and the checkpoint that it resumes from, if it does."""

    folder: Path
    checkpoint: Path | None
    lock: IO | None  # of the main process; held until it is closed or the process ends

    def close(self) -> None:
        """Let other runs into the folder."""
        if self.lock is not None:
            self.lock.close()


def open_run(
    arguments: Arguments,
    task: Task | str,
    train: list[dict],
    held_out: list[dict],
    learning_rate: float,
    prompts: dict | None = None,
) -> Run:
    """The folder of a new run, or with `--resume` of an earlier one: best/, history.jsonl and episodes.jsonl are then
    reset to what they were at the checkpoint. run.json has what is needed to run it again.

    prompts: what run.json keeps of them (prompt_record.py).
    Raises ArgumentError if the folder is in use or holds another run, or if the rows or the prompts are not those that
    the run began with; DataError if history.jsonl is broken; CheckpointError if no checkpoint can be used.
    """
    held: list[IO] = []

    def open_in_main() -> tuple[Path, Path | None]:
        about = {
            "id": os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8],
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "task": task if isinstance(task, str) else task.name,
            "task_version": None if isinstance(task, str) else task.version,
            "data_hash": data_hash(train),
            "held_out_hash": data_hash(held_out),
            **(prompts or {}),
            "versions": versions(),
            "reward_files": getattr(arguments, "reward_files", {}),
            "asked": getattr(arguments, "asked", None),
            "arguments": as_dict(arguments),
            "resumed": [],
        }
        if not arguments.resume:
            folder = make_folder(arguments, task, learning_rate, about)
            held.append(lock(folder))
            return folder, None
        folder = run_folder(arguments.resume)
        file = lock(folder)
        try:
            checkpoint = _resume(arguments, folder, about)
        except BaseException:
            file.close()
            raise
        held.append(file)
        return folder, checkpoint

    return Run(*processes.broadcast_from_main(open_in_main), held[0] if held else None)


def _resume(arguments: Arguments, folder: Path, now: dict) -> Path | None:
    """Prepare a locked folder for a resume; returns the checkpoint to resume from. now: run.json as of today."""
    about = prompt_record.read(folder) or now
    _check_rows(folder, about, now)
    _check_reward_files(folder, about.get("reward_files", {}), now["reward_files"])
    stored = json.loads((folder / "arguments.json").read_text(encoding="utf-8"))
    changed = {n: v for n, v in as_dict(arguments).items() if n not in LOCATION and v != stored.get(n, v)}
    if "start_epoch" in changed:
        raise ArgumentError(
            f"--start_epoch {changed['start_epoch']}: {folder} began with epoch {stored['start_epoch']} and goes on by "
            "itself; leave --start_epoch out"
        )
    for name in changed.keys() & {*SETTLED}:
        raise ArgumentError(
            f"--{name} {changed[name]}: {folder} began with {stored[name]}, as its checkpoints did; leave "
            f"--{name} out, or start a new run"
        )
    _check_prompts(folder, about, now, changed)
    named = Path(arguments.resume) if Path(arguments.resume).resolve() != folder.resolve() else None
    checkpoint = checkpoints.checkpoint_to_resume(folder, named)
    step = checkpoints.step_of(checkpoint) if checkpoint else -1
    trim_history(folder, step)
    checkpoints.clear_up(folder, step)
    name = checkpoint.name if checkpoint else None
    about["resumed"].append({"from": name, "time": now["started"], "changed": changed, "versions": now["versions"]})
    about["reward_files"] = now["reward_files"]
    if changed:
        about["asked"] = None  # the first command no longer describes this run
    write_json(folder / "run.json", about)
    write_json(folder / "arguments.json", {**stored, **changed})
    return checkpoint


def _check_rows(folder: Path, before: dict, now: dict) -> None:
    """ArgumentError unless the rows are those that the run began with."""
    for key, rows in (("data_hash", "training"), ("held_out_hash", "held-out")):
        if before[key] != now[key]:
            raise ArgumentError(
                f"--resume {folder}: the {rows} rows are not those that the run began with (their hash was "
                f"{before[key]} and is {now[key]}); put the data file back as it was, leave out options that choose "
                "rows, or start a new run"
            )


def _check_prompts(folder: Path, before: dict, now: dict, changed: dict) -> None:
    """ArgumentError unless the prompts are those that the run began with, or other ones were asked for. An earlier
    program's run.json, which has no record of them, gets one."""
    kept, found = before.get(prompt_record.PROMPTS), now.get(prompt_record.PROMPTS, {})
    if kept and not prompt_record.CHANGE_PROMPTS & set(changed):
        for task in sorted(kept.keys() & found.keys()):
            prompt_record.check(folder, task, kept[task], found[task])
    before |= {name: now[name] for name in (prompt_record.PROMPTS, prompt_record.TIME) if name in now}


def _check_reward_files(folder: Path, before: dict[str, str], now: dict[str, str]) -> None:
    """ArgumentError if a reward function's file is not as it was. Another `--reward` may be given."""
    for name, digest in now.items():
        if before.get(name, digest) != digest:
            raise ArgumentError(
                f"--resume {folder}: the file of --reward {name} is not the one that the run began with (its SHA-256 "
                f"was {before[name][:16]} and is {digest[:16]}); put it back as it was, or start a new run"
            )


def lock(folder: Path) -> IO:
    """Keep other runs out of a folder until the returned file is closed, which the kernel does when the process ends.

    ArgumentError if another run holds it.
    """
    try:
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ArgumentError(f"{folder} cannot be written ({error.strerror}); a run must be able to") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ArgumentError(
            f"{folder} is in use: the run of {holder} still goes on in it; wait until it ends, or give another "
            "--output_dir"
        ) from None
    except OSError as error:
        print(f"{folder} cannot be locked ({error.strerror}): make sure that no second run uses it.")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def make_folder(
    arguments: Arguments, task: Task | str, learning_rate: float | None = None, about: dict | None = None
) -> Path:
    """Make the folder of a new run: `--output_dir`, or model/<task, or name of several>/<model>-<batch>-<lr>-<time>.

    about: the content of run.json; without it that file is not written. Raises ArgumentError if the folder cannot be
    written, or holds another run, which is never overwritten.
    """
    if arguments.output_dir:
        folder = Path(arguments.output_dir)
        _check_unused(folder)
    else:
        parts = [folder_name(arguments.train_model_name), str(arguments.batch_sentence_num)]
        parts += [f"{learning_rate:g}"] if learning_rate is not None else []
        name = task if isinstance(task, str) else task.name
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = free_name(ROOT / "model" / name.replace("/", "-") / "-".join([*parts, stamp]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if about is not None:
            write_json(folder / "run.json", about)
        write_json(folder / "arguments.json", as_dict(arguments))
    except OSError as error:
        raise ArgumentError(
            f"--output_dir {folder} cannot be written ({error.strerror}); choose a folder that you may write to"
        ) from error
    return folder


def _check_unused(folder: Path) -> None:
    """ArgumentError if the folder of `--output_dir` holds anything but the rest of a start that was cut off."""
    # arguments.json is written last: without it there was no run yet.
    begun = (folder / "arguments.json").exists()
    if folder.is_dir() and any(begun or not _left_by_a_start(path) for path in folder.iterdir()):
        raise ArgumentError(
            f"--output_dir {folder} is not empty, and nothing in it is overwritten; choose another folder"
            + (f", or go on with that run: --resume {folder}" if begun else "")
        )


def _left_by_a_start(path: Path) -> bool:
    return path.name in (LOCK, "run.json") or path.name.startswith(UNFINISHED_PREFIX)


def versions() -> dict[str, str]:
    """What the run was computed with: Python, the packages, the hardware and the project's commit."""
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "device": _device_name(),
        "commit": commit or "unknown",
    }


def _device_name() -> str:
    torch = sys.modules.get("torch")
    if torch is None:
        return "none"  # a server computed
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {torch.get_num_threads()}"


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
    """Write summary.json: what was run, what came out, and what is needed to run it again. Returns its content.

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
        "peak_memory_bytes": processes.peak_memory_bytes(),
        "metrics": metrics,
        "versions": versions(),
        "arguments": as_dict(arguments),
        **more,
    }
    if not isinstance(task, str):
        own.keep_task(folder, task)
    write_json(folder / "summary.json", summary)
    return summary
