"""What run.json keeps of a run's prompts, so that a resume asks the same: the time at which the chat template was
rendered (some write the date into every prompt), and by task a hash of all prompt ids and of what they are made with.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from machine import processes
from machine.errors import ArgumentError
from machine.files import write_json
from run.arguments import run_folder

TIME, PROMPTS = "prompts_time", "prompts"
CHANGE_PROMPTS = {"max_prompt_length", "use_CoT"}  # whoever gives another one to --resume wants other prompts


def prompts_time(resume: str) -> datetime:
    """The local time, without its zone, at which a run's chat template is rendered: now, or of a `--resume` the run's
    start. Raises ArgumentError for a run.json that cannot be read."""

    def find() -> datetime:
        about = read(run_folder(resume)) if resume else {}
        # A run.json from before this was kept says when the run started, which is as good.
        kept = about.get(TIME) or about.get("started")
        return datetime.fromisoformat(kept).replace(tzinfo=None) if kept else datetime.now().replace(microsecond=0)

    return processes.broadcast_from_main(find)


def read(folder: Path) -> dict:
    """The content of run.json; {} if there is none. Raises ArgumentError if it cannot be read."""
    path = folder / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ArgumentError(f"--resume {folder}: run.json cannot be read ({error})") from error


def hash_of(*groups: Iterable[Sequence[int]]) -> str:
    """A fingerprint of prompts' token ids."""
    digest = hashlib.sha256()
    for prompts in groups:
        for ids in prompts:
            digest.update(",".join(map(str, ids)).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def record(tokenizer, prompts_hash: str) -> dict[str, str]:
    """What is kept of a task's prompts. prompts_hash: see hash_of. tokenizer: None if a server has it."""
    if tokenizer is None:
        return {"hash": prompts_hash}
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    template = tokenizer.chat_template or ""
    return {"hash": prompts_hash, "chat_template": _short(template), "vocabulary": _short(vocabulary)}


def check(folder: Path, task: str, before: dict[str, str], now: dict[str, str]) -> None:
    """ArgumentError unless a task's prompts are those that the run in this folder began with; it names what differs."""
    if before["hash"] == now["hash"]:
        return
    causes = [name for name in ("chat_template", "vocabulary") if before.get(name) != now.get(name)]
    words = {"chat_template": "the model's chat template", "vocabulary": "the model's tokenizer"}
    changed = " and ".join(words[name] for name in causes) or "neither the model's chat template nor its vocabulary"
    raise ArgumentError(
        f"--resume {folder}: the prompts of {task} are not those that the run began with (their hash was "
        f"{before['hash']} and is {now['hash']}); {changed} has changed since"
        + ("" if causes else ", so it is the project's prompts or a package (see `versions` in its run.json)")
        + "; put that back as it was, or start a new run"
    )


def check_or_keep(folder: Path, task: str, now: dict[str, str]) -> None:
    """`check` a task's prompts if run.json has a record of them, else write one into it."""
    about = read(folder)
    kept = about.setdefault(PROMPTS, {})
    if task in kept:
        check(folder, task, kept[task], now)
        return
    kept[task] = now
    write_json(folder / "run.json", about)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
