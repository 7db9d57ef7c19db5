"""What a trained model's folder says about itself: its task, and how it is asked. These are inference.py's defaults."""

import json
from pathlib import Path

import yaml

from machine.errors import ModelError
from machine.files import write_atomically
from run.prompt_record import PROMPTS
from tasks import own

FILE = "inference.yaml"  # in an exported folder; --config reads the same form
KEPT = ("use_CoT", "answer_space", "number_answer", "max_prompt_length", "max_response_length")


def of_model(folder: Path) -> dict:
    """The options with which a checkpoint was trained, or which an exported folder keeps; {} where none are known.

    Raises ModelError for a file that cannot be read.
    """
    exported = folder / FILE
    return chosen(_read(exported if exported.is_file() else folder.resolve().parent / "arguments.json"))


def task_of_model(folder: Path) -> str:
    """The `--task` of a checkpoint or an exported folder: a name, a YAML file, several of a run on several tasks, or ""
    where none is known. Raises ModelError for a file that cannot be read."""
    kept, run = own.kept_task(str(folder)), folder.resolve().parent
    if kept is not None:
        return str(kept)
    names = list(_read(run / "run.json").get(PROMPTS, {})) or [_read(run / "arguments.json").get("task", "")]
    files = {name: run / name.replace("/", "-") / own.FILE for name in names}  # of several tasks each has its folder
    return ",".join(str(files[name]) if files[name].is_file() else name for name in names)


def _read(path: Path) -> dict:
    """A file's content; {} if there is none."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text) or {}
        if not isinstance(found, dict):
            raise ValueError("it holds no names with values")
        return found
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path} cannot be read ({reason}); copy it again from where it was written") from error


def chosen(arguments: dict) -> dict:
    """Of a run's arguments those that ask a model. What a script fills in by itself is left to it: another option may
    be given beside it."""
    options = {name: arguments[name] for name in KEPT if arguments.get(name) not in (None, "")}
    if options.get("number_answer") == "mean":
        del options["number_answer"]
    if options.get("max_response_length") == (96 if options.get("use_CoT") else 16):
        del options["max_response_length"]
    return options


def write(folder: Path, options: dict) -> None:
    """Keep options in an exported folder."""
    text = "# How this model is asked: defaults of inference.py.\n" + yaml.safe_dump(options, sort_keys=False)
    write_atomically(folder / FILE, lambda file: file.write(text.encode()))
