"""The options that all four scripts share, and how a script reads its own: `parse`."""

import difflib
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

import yaml

import tasks
from engine.folders import EMBEDDED, check_folder
from machine import processes
from machine.errors import ArgumentError, clear_errors
from run.parser import Parser, option, option_types, options_of
from tasks import Task, guessing, own, tables

# Notes from one library to the other about names that will change; a user can do nothing about them.
warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft|trl|accelerate)")
# peft imports bitsandbytes, which notes that a package is missing for kernels that are not used.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
DTYPES = ("float32", "bfloat16", "float16")
REPORT_TO = ("none", "wandb", "tensorboard", "trackio")
ANSWER_SPACES = ("labels", "free", "score")
ANSWER_SPACES_HELP = "labels (default): only the task's labels; free: any token; score: likeliest one"
TASK_HELP = "a task, a table or a YAML file; default: MR, or what --data_path is"
TASKS_HELP = "SST,RTE, a suite, a table or a YAML file; default: MR, or --data_path's"
CONFIG_HELP = "YAML file with any of these options; the command line overrides it"


@dataclass
class Arguments:
    """The arguments of all four scripts, with one meaning each."""

    task: str = option("", "run", TASK_HELP)
    train_model_name: str = option(
        EMBEDDED, "model", "the embedded model, a hub name, or with --from_local True a folder"
    )
    from_local: bool = option(False, "model", "True: --train_model_name is a folder with an adapter or a whole model")
    use_CoT: bool = option(False, "answers", "True: the model writes an analysis before its judgement")
    data_path: str = option("", "run", "a table is the task; with --task, or a folder: rows in place of those in data/")
    text_columns: str = option("", "run", "a table's columns of texts, as subject,body; default: by their names")
    label_column: str = option("", "run", "a table's column of labels; default: by its name")
    batch_sentence_num: int = option(32, "run", "prompts per step")
    model_temperature: float = option(1.0, "answers", "sampling temperature")
    load_in_8bit: bool = option(False, "model", "True: the base model's linear layers with 8-bit weights")
    load_in_4bit: bool = option(False, "model", "True: with 4-bit weights (NF4, as QLoRA)")
    dtype: str = option("", "model", "float32, bfloat16 or float16; default: bfloat16 on a card, else float32")
    trust_remote_code: bool = option(False, "model", "True: run the Python code that comes with the model")
    max_prompt_length: int | None = option(
        None, "answers", "tokens in a prompt; a longer passage is truncated; default: by the data"
    )
    max_response_length: int = option(0, "answers", "tokens in an answer; 0: 16, or 96 with --use_CoT True")
    answer_space: str = option("", "answers", "labels (default): only the task's labels; free: any token")
    number_answer: str = option("", "answers", "STS-B, among labels: mean of the numbers (default), or likeliest")
    tokens_per_micro_batch: int | None = option(None, "model", "tokens per forward pass; default: by free memory")
    eval_size: int = option(400, "evaluation and saving", "held-out rows to evaluate on; 0: all")
    output_dir: str = option("", "run", "folder of the run; default: a new one below model/")
    seed: int = option(0, "run", "seed of the data order, the sampling and the adapter's initial weights")
    report_to: str = option("wandb", "evaluation and saving", "dashboard: none, wandb, tensorboard or trackio")

    @property
    def number_format(self) -> str:
        """The name of the weights' data type; "": by the machine."""
        return self.dtype

    @property
    def model_options(self) -> dict:
        """What engine.loading takes beside the model's name and its tokenizer; `longest` is 0 as long as the prompts'
        length is to be decided."""
        return dict(
            longest=self.max_prompt_length + self.max_response_length if self.max_prompt_length else 0,
            from_local=self.from_local,
            bits=8 if self.load_in_8bit else 4 if self.load_in_4bit else 0,
            trust_remote_code=self.trust_remote_code,
            dtype=self.number_format,
        )


Given = TypeVar("Given", bound=Arguments)


def parse(
    kind: type[Given],
    description: str,
    argv: list[str] | None = None,
    of_model: Callable[[dict], dict] | None = None,
) -> Given:
    """The arguments of a script: command line over `--config` file over the run of `--resume` over defaults.

    What is wrong ends the program with exit code 2 and one sentence. The command of a run that was interrupted, given
    once more, resumes it. of_model: gives the defaults that the named model brings along, from all options as they are
    without it; a run that goes on has its own. `asked` on the result is what the command asks for, wherever the run
    lies.
    """
    processes.quiet_others()
    parser = Parser(kind, description)
    parser.add_option("config", str, "", "run", CONFIG_HELP)
    names = {f.name for f in options_of(kind)}
    argv = sys.argv[1:] if argv is None else argv
    chosen, _ = parser.parse_known_args(argv)
    with clear_errors(parser.prog):
        if getattr(chosen, "resume", ""):
            stored = _read_stored(chosen.resume)
            parser.set_defaults(**{name: value for name, value in stored.items() if name in names})
        config = _read_config(chosen.config, names) if chosen.config else {}
        parser.set_defaults(**config)
        if of_model and not chosen.resume:
            parser.set_defaults(**(of_model(vars(parser.parse_known_args(argv)[0])) | config))
    given = vars(parser.parse_args(argv))
    given.pop("config")
    with clear_errors(parser.prog):
        arguments = checked(kind, given)
    arguments.asked = {name: value for name, value in as_dict(arguments).items() if name != "output_dir"}
    if not getattr(arguments, "resume", "") and processes.broadcast_from_main(lambda: _interrupted(arguments)):
        print(f"{arguments.output_dir} holds this very run, interrupted: it goes on.")
        return parse(kind, description, [*argv, "--resume", arguments.output_dir])
    return arguments


def checked(kind: type[Given], given: dict) -> Given:
    """The arguments of these options, with what follows from them filled in. Raises UserError for what no script can
    use."""
    arguments = kind(**given)
    _check_common(arguments)
    return arguments


def run_folder(path: str) -> Path:
    """The run's folder of a `--resume`, which may name one of the run's checkpoints."""
    folder = Path(path)
    inside = not (folder / "arguments.json").exists() and (folder.parent / "arguments.json").exists()
    return folder.parent if inside else folder


def _interrupted(arguments: Arguments) -> bool:
    """Whether `--output_dir` holds an unfinished run of ppo.py or sft.py that the same command started."""
    folder = Path(arguments.output_dir)
    if not arguments.output_dir or (folder / "summary.json").exists() or not (folder / "arguments.json").exists():
        return False
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))["asked"] == arguments.asked
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_stored(path: str) -> dict:
    """The arguments of the run of a `--resume`."""
    stored = run_folder(path) / "arguments.json"
    if not stored.is_file():
        raise ArgumentError(f"--resume {path} holds no arguments.json; give the folder of a run")
    try:
        return json.loads(stored.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--resume {path}: arguments.json cannot be read ({error})") from error


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


def _check_common(arguments: Arguments) -> None:
    """Refuse what no script can use, and fill in what depends on other arguments. Raises ArgumentError, ModelError."""
    _check_types(arguments)
    check_positive(
        arguments, ("batch_sentence_num", "model_temperature", "max_prompt_length", "tokens_per_micro_batch")
    )
    check_not_negative(arguments, ("eval_size", "max_response_length"))
    one_of("report_to", arguments.report_to, REPORT_TO)
    if arguments.dtype:
        one_of("dtype", arguments.dtype, DTYPES)
    _check_bits(arguments)
    if arguments.report_to != "none" and importlib.util.find_spec(arguments.report_to) is None:
        raise ArgumentError(
            f"--report_to {arguments.report_to} needs that package: pip install {arguments.report_to}; or give none"
        )
    if "{task}" not in arguments.train_model_name:  # inference.py looks for each of several models
        check_folder(arguments.train_model_name, arguments.from_local)
    _fill_in_task(arguments)
    arguments.max_response_length = arguments.max_response_length or (96 if arguments.use_CoT else 16)


def _check_bits(arguments: Arguments) -> None:
    """ArgumentError for quantized weights that cannot be had."""
    bits = [number for number in (8, 4) if getattr(arguments, f"load_in_{number}bit")]
    if len(bits) > 1:
        raise ArgumentError("--load_in_8bit True and --load_in_4bit True exclude each other; give one of them")
    for number in bits:
        if processes.LAUNCHED_FOR in processes.SHARDING:
            raise ArgumentError(
                f"--load_in_{number}bit True: {processes.LAUNCHED_FOR} cannot shard {number}-bit weights; leave it at "
                "False, or use scripts/accelerate/processes.yaml"
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ArgumentError(
                f"--load_in_{number}bit True needs the package bitsandbytes: pip install bitsandbytes; or give False"
            )


def _check_types(arguments: Arguments) -> None:
    """ArgumentError for a value that a YAML file gave another type than its field has."""
    types = option_types(type(arguments))
    for f in fields(arguments):
        value, wanted = getattr(arguments, f.name), types[f.name]
        if value is None and f.default is None:
            continue  # the script decides later
        fits = isinstance(value, int | float if wanted is float else wanted)
        if not fits or (wanted is not bool and isinstance(value, bool)):
            raise ArgumentError(f"--{f.name} {value!r} must be of type {wanted.__name__}")


def check_positive(arguments: Arguments, names: Iterable[str]) -> None:
    """ArgumentError unless all of these arguments are greater than 0, or None: the script decides later."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ArgumentError(f"--{name} {value} must be greater than 0")


def check_not_negative(arguments: Arguments, names: Iterable[str]) -> None:
    """ArgumentError unless all of these arguments are at least 0, or None."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 0:
            raise ArgumentError(f"--{name} {value} must not be negative")


def divisible(arguments: Arguments) -> int:
    """The prompts of a step per process. ArgumentError if `--batch_sentence_num` cannot be divided evenly."""
    if arguments.batch_sentence_num % processes.count():
        raise ArgumentError(
            f"--batch_sentence_num {arguments.batch_sentence_num} cannot be divided among {processes.count()} "
            "processes; give a multiple"
        )
    return arguments.batch_sentence_num // processes.count()


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ArgumentError if an argument is none of its choices; of those it may be a misspelling of one."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ArgumentError(f"--{name} {value} must be one of {', '.join(choices)}{meant}")


def get_task(arguments: Arguments) -> Task:
    """The one task of `--task`. Raises ArgumentError, also for several, and DataError for a file that is no task."""
    chosen = get_tasks(arguments)
    if len(chosen) > 1:
        raise ArgumentError(f"--task {arguments.task} names {len(chosen)} tasks; name one")
    return chosen[0]


def get_tasks(arguments: Arguments) -> list[Task]:
    """The tasks of `--task`: names, suites, YAML files and tables, with commas between.

    Raises ArgumentError for an unknown name and a task that is named twice, DataError for a file that is no task.
    """
    given, chosen = arguments.task, []
    listed = [given] if Path(given).is_file() else [name.strip() for name in given.split(",")]
    for name in listed:
        chosen += tasks.suite(name) if name in tasks.SUITES else [_named_task(name, arguments)]
    if len({task.name for task in chosen}) < len(chosen):
        raise ArgumentError(f"--task {given} names a task twice")
    named = {"text_columns": arguments.text_columns, "label_column": arguments.label_column}
    for option_, value in named.items():
        if value and not any(tables.is_table(name) for name in listed):
            raise ArgumentError(f"--{option_} {value} is about a table, and --task {given} is none; leave it out")
    return chosen


def _named_task(name: str, arguments: Arguments) -> Task:
    """The task of a name in `--task`, which may be a file."""
    if own.is_task_file(name):
        return own.read_task(name)
    if tables.is_table(name):
        return guessing.task_of(name, arguments.text_columns, arguments.label_column)
    try:
        return tasks.get(name)
    except ValueError as error:
        raise ArgumentError(f"--task {name}: {error}") from error


def _fill_in_task(arguments: Arguments) -> None:
    """Without `--task` a checkpoint has its own, and a file is one: `--data_path tickets.csv`."""
    if arguments.task:
        return
    kept = own.kept_task(arguments.train_model_name) if arguments.from_local else None
    file = Path(arguments.data_path or ".")
    if kept is not None:
        arguments.task = str(kept)
    elif file.is_file() and file.suffix.lower() != ".txt":  # of the tables' tasks one comes as .txt: MR
        arguments.task, arguments.data_path = arguments.data_path, ""
        if not own.is_task_file(arguments.task):
            tables.check_suffix(arguments.task)
    elif arguments.data_path and not file.exists():
        raise ArgumentError(f"--data_path {arguments.data_path}: no such file or folder; check the path")
    else:
        arguments.task = "MR"


def as_dict(arguments: Arguments) -> dict:
    """The arguments as plain data, for the run's folder and the dashboards."""
    return asdict(arguments)
