"""A trained model as one plain Hugging Face folder, for transformers, vLLM and this project alike.

    bash scripts/export.sh --checkpoint model/MR/<run>/best --output_dir exported
    bash scripts/export.sh --checkpoint model/MR/<run>/best --push_to_hub my-classifier

The folder holds the weights with the adapter merged in, the tokenizer, its chat template, task.yaml (the task and its
wording), inference.yaml (how it is asked) and README.md, the model card. `inference.py --from_local True
--train_model_name exported` needs nothing else. A head of classify.py becomes an AutoModelForSequenceClassification.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import tasks
from engine.folders import HEAD, check_folder
from machine.errors import ArgumentError, ModelError, clear_errors
from machine.files import UNFINISHED_PREFIX, write_atomically
from run import model_options
from run.parser import Parser, option
from tasks import Task, own, splits

DTYPES = ("", "float32", "bfloat16", "float16")


@dataclass
class ExportArguments:
    """What export.py takes."""

    checkpoint: str = option("", "run", "folder of an adapter or a whole model, such as model/MR/RUN/best")
    output_dir: str = option("exported", "run", "folder to write, new or empty")
    task: str = option("", "run", "a task or a YAML file, of a checkpoint that does not say its own")
    dtype: str = option("", "model", "float32, bfloat16 or float16; default: as the base model's files")
    trust_remote_code: bool = option(False, "model", "True: run the Python code that comes with the model")
    push_to_hub: str = option("", "run", "also upload the folder to the Hugging Face hub, as NAME or OWNER/NAME")
    private: bool = option(True, "run", "False: what is uploaded can be seen by everybody")


def check(arguments: ExportArguments) -> Path:
    """The folder to write; refuses what cannot be exported. Raises ArgumentError, ModelError."""
    if not arguments.checkpoint:
        raise ArgumentError("--checkpoint is missing; give a checkpoint folder such as model/MR/RUN/best")
    try:
        check_folder(arguments.checkpoint, from_local=True)
    except ModelError as error:
        raise ArgumentError(str(error).replace("--train_model_name", "--checkpoint")) from error
    if arguments.dtype not in DTYPES:
        raise ArgumentError(f"--dtype {arguments.dtype} must be one of {', '.join(DTYPES[1:])}")
    folder = Path(arguments.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(
            f"--output_dir {folder} is not an empty folder, and nothing is overwritten; choose another one"
        )
    return folder


def find_task(arguments: ExportArguments) -> Task:
    """The task that a checkpoint was trained on, or that `--task` names. Raises ArgumentError, DataError."""
    checkpoint = Path(arguments.checkpoint)
    name = arguments.task or model_options.task_of_model(checkpoint)
    of_several = checkpoint.resolve().parent / name.replace("/", "-") / own.FILE  # a run on several tasks keeps each
    if arguments.task and of_several.is_file():
        return own.read_task(of_several)
    if own.is_task_file(name) and (arguments.task or Path(name).is_file()):
        return own.read_task(name)
    if not arguments.task and (not name or "," in name):
        raise ArgumentError(
            f"--checkpoint {checkpoint} does not say which task it was trained on, or was on several; name one with "
            "--task"
        )
    try:
        task = tasks.get(name)
    except ValueError as error:
        raise ArgumentError(f"--task {name}: {error}") from error
    return splits.labelled(task, None)


def write_language_model(arguments: ExportArguments, task: Task, folder: Path, name: str) -> str:
    """Write an exported language model into a folder that exists. Returns what there is to say about its weights."""
    from engine import exporting
    from prompts import wording_of
    from reporting import card, snippets

    checkpoint, task = Path(arguments.checkpoint), replace(task, wording=wording_of(task))
    facts, options = card.read_run(checkpoint), model_options.of_model(checkpoint)
    about = exporting.write_language_model(
        arguments.checkpoint,
        folder,
        arguments.dtype,
        options.get("max_response_length") or (96 if options.get("use_CoT") else 16),
        arguments.trust_remote_code,
    )
    about = card.known_base(about, arguments.checkpoint, facts)
    own.write_task(folder / own.FILE, task, files=False)
    model_options.write(folder, options)
    asked = snippets.Asked(
        bool(options.get("use_CoT")), options.get("answer_space", "labels"), options.get("number_answer", "mean")
    )
    snippet = snippets.of_language_model(name, task, about.tokenizer, asked)
    write_card(folder, card.card(name, task, about, facts, snippet))
    return f"{about.parameters:,} parameters in {about.dtype}" + (
        f"; {notice}" if (notice := card.of_bits(facts)) else ""
    )


def write_head(arguments: ExportArguments, task: Task, folder: Path, name: str) -> str:
    """`write_language_model` for a classification head."""
    from engine import exporting
    from evaluation import classifying
    from reporting import card, snippets

    if arguments.dtype not in ("", "float32"):
        raise ArgumentError(f"--dtype {arguments.dtype}: a classification head is exported in float32; leave it out")
    about = exporting.write_classifier(arguments.checkpoint, folder, task.name, arguments.trust_remote_code)
    own.write_task(folder / own.FILE, task, files=False)
    pair = len(classifying.layout(dict.fromkeys(task.fields, ""), about.tokenizer)) > 1
    facts = card.read_run(Path(arguments.checkpoint))
    about = card.known_base(about, arguments.checkpoint, facts)
    write_card(folder, card.card(name, task, about, facts, snippets.of_head(name, task, pair), head=True))
    return f"{about.parameters:,} parameters in {about.dtype}, a classification head on {about.base}"


def write_card(folder: Path, text: str) -> None:
    """Write README.md, the model card."""
    write_atomically(folder / "README.md", lambda file: file.write(text.encode()))


def export(arguments: ExportArguments, task: Task, folder: Path) -> None:
    """Write the folder, whole or not at all. Raises ModelError, CheckpointError, ArgumentError."""
    name = arguments.push_to_hub or arguments.output_dir
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{UNFINISHED_PREFIX}{folder.name}-"))
    except OSError as error:
        raise ArgumentError(f"--output_dir {folder} cannot be written ({error.strerror}); choose another") from error
    try:
        write = write_head if (Path(arguments.checkpoint) / HEAD).exists() else write_language_model
        said = write(arguments, task, aside, name)
        aside.chmod(0o755)
        os.replace(aside, folder)
    except OSError as error:
        raise ArgumentError(
            f"--output_dir {folder} cannot be written ({error.strerror or error}); choose another"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{folder}: {said}; transformers loads it with the same logits. README.md is its model card.")


class Hub:
    """The Hugging Face hub, by its own client. Its errors become ModelError with one sentence."""

    def __init__(self, name: str, private: bool):
        """Raises ModelError if nobody is logged in: before hours of work, not behind them."""
        import huggingface_hub

        self.name, self.private, self.api = name, private, huggingface_hub.HfApi()
        self._do(self.api.whoami)

    def upload(self, folder: Path) -> str:
        """Upload a folder's files into a model repository, made if there is none; returns its address."""
        made = self._do(self.api.create_repo, self.name, private=self.private, exist_ok=True)
        self._do(self.api.upload_folder, repo_id=made.repo_id, folder_path=folder)
        return str(made)

    def _do(self, action, *given, **named):
        try:
            return action(*given, **named)
        except Exception as error:  # whatever the client raises: no connection, no token, a name that is taken
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"--push_to_hub {self.name}: the hub refused it ({reason}); log in with `hf auth login`, or leave the "
                "option out"
            ) from error


def main(argv: list[str] | None = None) -> None:
    parser = Parser(ExportArguments, __doc__.splitlines()[0], prog="export.py")
    arguments = ExportArguments(**vars(parser.parse_args(argv)))
    with clear_errors("export.py"):
        folder = check(arguments)
        task = find_task(arguments)
        hub = Hub(arguments.push_to_hub, arguments.private) if arguments.push_to_hub else None
        export(arguments, task, folder)
        print(f'Ask it:\n  bash scripts/inference.sh --from_local True --train_model_name {folder} --text "..."')
        if hub is not None:
            print(f"Uploaded to {hub.upload(folder)} ({'private' if arguments.private else 'public'}).")


if __name__ == "__main__":
    main()
