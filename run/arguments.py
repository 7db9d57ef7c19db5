"""What all four scripts share on the command line, and how bad input ends: exit code 2 and one clear sentence."""

import difflib
import importlib.util
import json
import re
import sys
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

import tasks
from engine.models import EMBEDDED
from machine import processes, sharding
from machine.errors import ArgumentError, clear_errors
from prompts import MAX_PROMPT_LENGTH
from tasks import Task

# Notes from one library to the other about names that will change; a user can do nothing about them.
warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft|trl|accelerate)")
REPORT_TO = ("none", "wandb", "tensorboard", "trackio")


@dataclass
class Arguments:
    """The arguments of all four scripts, with one meaning each."""

    task: str = field(default="MR", metadata={"help": "the task's name, as in tasks/table.py"})
    train_model_name: str = field(
        default=EMBEDDED, metadata={"help": "the embedded model, a hub name, or (with --from_local True) a folder"}
    )
    from_local: bool = field(
        default=False, metadata={"help": "True: --train_model_name is a folder, an adapter or a whole model"}
    )
    use_CoT: bool = field(default=False, metadata={"help": "True: the model writes an analysis before its judgement"})
    data_path: str = field(
        default="", metadata={"help": "a file or folder in the task's format in place of the one below data/"}
    )
    batch_sentence_num: int = field(default=32, metadata={"help": "prompts per step"})
    model_temperature: float = field(default=1.0, metadata={"help": "of sampling; evaluation is greedy"})
    load_in_8bit: bool = field(default=False, metadata={"help": "True: the base model's weights in 8 bits (CUDA)"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "True: Python files that come with the model may be run"}
    )
    max_prompt_length: int = field(
        default=MAX_PROMPT_LENGTH, metadata={"help": "tokens; a longer prompt loses text from its passage"}
    )
    max_response_length: int = field(
        default=0, metadata={"help": "tokens of an answer; 0: 16, with chain of thought 96"}
    )
    answer_space: str = field(
        default="", metadata={"help": "labels: only the task's labels; free: any token; default labels"}
    )
    tokens_per_micro_batch: int | None = field(
        default=None, metadata={"help": "tokens that go through the network at once; default by free memory"}
    )
    eval_size: int = field(default=400, metadata={"help": "held-out rows to evaluate on; 0: all"})
    output_dir: str = field(default="", metadata={"help": "the run's folder; default a new one below model/"})
    seed: int = field(default=0, metadata={"help": "of the data's order, the sampling and the adapter's start"})
    report_to: str = field(default="wandb", metadata={"help": "none, wandb, tensorboard or trackio"})


Given = TypeVar("Given", bound=Arguments)


class Parser(HfArgumentParser):
    """Says what is wrong in one sentence, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        meant = f"did you mean {near[0]}? " if near else ""
        print(f"{self.prog}: error: {message.rstrip('.')}; {meant}--help lists all options", file=sys.stderr)
        raise SystemExit(2)


def parse(kind: type[Given], description: str, argv: list[str] | None = None) -> Given:
    """Command line over `--config` file over `--resume` folder over defaults. Unknown names end with exit code 2."""
    processes.quiet_others()
    parser = Parser(kind, description=description, allow_abbrev=False)
    parser.add_argument("--config", default="", help="a YAML file with any of these arguments; the command line wins")
    names = {f.name for f in fields(kind)}
    argv = sys.argv[1:] if argv is None else argv
    chosen, _ = parser.parse_known_args(argv)
    with clear_errors(parser.prog):
        if getattr(chosen, "resume", ""):
            stored = run_folder(chosen.resume) / "arguments.json"
            if not stored.is_file():
                raise ArgumentError(f"--resume {chosen.resume} holds no arguments.json; give the folder of a run")
            try:
                values = json.loads(stored.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ArgumentError(f"--resume {chosen.resume}: arguments.json cannot be read ({error})") from error
            parser.set_defaults(**{k: v for k, v in values.items() if k in names})
        if chosen.config:
            parser.set_defaults(**_read_config(chosen.config, names))
    given = vars(parser.parse_args(argv))
    given.pop("config")
    with clear_errors(parser.prog):
        arguments = kind(**given)
        _check(arguments)
    arguments.asked = {name: value for name, value in as_dict(arguments).items() if name != "output_dir"}
    if not getattr(arguments, "resume", "") and processes.broadcast_from_main(lambda: _interrupted(arguments)):
        print(f"{arguments.output_dir} holds this very run, interrupted: it goes on.")
        return parse(kind, description, [*argv, "--resume", arguments.output_dir])
    return arguments


def run_folder(path: str) -> Path:
    """The run of a `--resume`: the folder itself, or the one that a checkpoint lies in."""
    folder = Path(path)
    inside = not (folder / "arguments.json").exists() and (folder.parent / "arguments.json").exists()
    return folder.parent if inside else folder


def _interrupted(arguments: Arguments) -> bool:
    """Whether `--output_dir` holds a run of ppo.py or sft.py that was asked for in the same words and did not end."""
    folder = Path(arguments.output_dir)
    if not arguments.output_dir or (folder / "summary.json").exists() or not (folder / "arguments.json").exists():
        return False
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))["asked"] == arguments.asked
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_config(path: str, names: set[str]) -> dict:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"--config {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"--config {path} must hold lines of the form `name: value`")
    unknown = sorted(map(str, set(values) - names))
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        raise ArgumentError(
            f"--config {path} has the unknown key {unknown[0]!r}; "
            + (f"did you mean {near[0]}? " if near else "")
            + "--help lists all names"
        )
    return values


def _check(arguments: Arguments) -> None:
    """What holds for every script; also fills in the defaults that depend on other arguments. ArgumentError if not."""
    for f in fields(arguments):
        value = getattr(arguments, f.name)
        right = {int: int, float: (int, float), bool: bool, str: str}.get(f.type, object)
        if value is None and f.default is None:
            continue  # decided later, by the script
        if not isinstance(value, right) or (f.type is not bool and isinstance(value, bool)):
            raise ArgumentError(f"--{f.name} {value!r} must be of type {f.type.__name__}")
    positive = ("batch_sentence_num", "model_temperature", "max_prompt_length", "tokens_per_micro_batch")
    for name in positive:
        value = getattr(arguments, name)
        if value is not None and not value > 0:  # None: decided later, by the script
            raise ArgumentError(f"--{name} {getattr(arguments, name)} must be greater than 0")
    for name in ("eval_size", "max_response_length"):
        if (getattr(arguments, name) or 0) < 0:
            raise ArgumentError(f"--{name} {getattr(arguments, name)} must not be negative")
    one_of("report_to", arguments.report_to, REPORT_TO)
    if arguments.load_in_8bit and processes.LAUNCHED_FOR in sharding.CUTTING:
        raise ArgumentError(
            f"--load_in_8bit True: {processes.LAUNCHED_FOR} cannot cut up weights of 8 bits; leave it at False, or use "
            "scripts/accelerate/processes.yaml"
        )
    if arguments.report_to != "none" and importlib.util.find_spec(arguments.report_to) is None:
        raise ArgumentError(
            f"--report_to {arguments.report_to} needs that package: pip install {arguments.report_to}; or give none"
        )
    arguments.max_response_length = arguments.max_response_length or (96 if arguments.use_CoT else 16)


def divisible(arguments: Arguments) -> int:
    """The prompts of a step for each process. ArgumentError if they cannot be shared out evenly."""
    if arguments.batch_sentence_num % processes.count():
        raise ArgumentError(
            f"--batch_sentence_num {arguments.batch_sentence_num} cannot be divided among {processes.count()} "
            "processes; give a multiple"
        )
    return arguments.batch_sentence_num // processes.count()


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ArgumentError if an argument is none of its choices."""
    if value not in choices:
        raise ArgumentError(f"--{name} {value} must be one of {', '.join(choices)}")


def get_task(name: str) -> Task:
    """The task of `--task`; ArgumentError with the known names if there is none."""
    try:
        return tasks.get(name)
    except ValueError as error:
        raise ArgumentError(f"--task {name}: {error}") from error


def get_tasks(names: str) -> list[Task]:
    """The tasks of a `--task` that may be a list (SST,RTE) or a suite; ArgumentError also for a task named twice."""
    listed = [name.strip() for name in names.split(",")]
    chosen = [task for name in listed for task in (tasks.suite(name) if name in tasks.SUITES else [get_task(name)])]
    if len({task.name for task in chosen}) < len(chosen):
        raise ArgumentError(f"--task {names} names a task twice")
    return chosen


def as_dict(arguments: Arguments) -> dict:
    """The arguments as plain data, for the run's folder and the dashboards."""
    return asdict(arguments)
