"""Supervised fine-tuning: the model learns to write the gold answer, on one task or on all tasks of a suite.

    bash scripts/sft.sh                                       the embedded model on MR
    bash scripts/sft.sh --datafolder_path data/GLUE           every task below data/GLUE in one model
    bash scripts/ppo.sh --from_local True --train_model_name model/MR/<run>/best            PPO goes on from it

trl's SFTTrainer (sft_trainer.py) on token ids: a prompt has exactly the ids that inference.py asks with, an answer
those that it reads.
"""

import random
import shlex
from dataclasses import dataclass
from pathlib import Path

from machine import processes
from machine.errors import ArgumentError
from run import faults
from run.answer_options import answers_text, fill_in_number_answer
from run.arguments import ANSWER_SPACES, ANSWER_SPACES_HELP, one_of, parse
from run.parser import option
from tasks import Task
from tasks.labels import to_units
from training.arguments import FULL_LEARNING_RATE, PolicyArguments, check_batch, check_training, fill_in_epochs
from training.data import TaskData, find_tasks, load_rows, name_of

LOSS_ON = "answer"  # the default of --loss_on

MICRO_BATCH = 8  # with loss on the full row: rows that go through the network at once, at most
# On one task, unless --max_steps says otherwise: 72 steps of 8 rows are as many rows as ppo.py's default sees. On MR 18
# steps of 32 taught less at every step size (78 to 80% against 89%): the first steps are spent on the tags.
STEPS = 72
LEARNING_RATE = 5e-4  # of an adapter


@dataclass
class SFTArguments(PolicyArguments):
    """What SFT takes beside the arguments of all training."""

    batch_sentence_num: int = option(8, "training", "rows per step")
    lines_per_file: int = option(30000, "SFT", "training rows of each task, at most")
    learning_rate: float | None = option(
        None, "training", f"learning rate; default: {LEARNING_RATE:g}, or {FULL_LEARNING_RATE:g} with --full_finetuning"
    )
    gradient_checkpointing: bool | None = option(
        None, "training", "True: less memory, more time; default: on a card with --loss_on full"
    )
    max_steps: int | None = option(
        None, "training", f"number of steps; 0: all epochs; default: {STEPS} for one task without --end_epoch"
    )
    repeat_time: int = option(1, "training", "how often each row is seen in an epoch")
    loss_on: str = option(LOSS_ON, "SFT", "label: choice of the label; answer: the answer's tokens; full: prompt too")
    label_smoothing: float = option(0.0, "SFT", "--loss_on label: share of the target that all labels get alike")
    number_target: str = option("nearest", "SFT", "--loss_on label, STS-B: nearest number, or soft: close ones too")
    answer_space: str = option("", "answers", ANSWER_SPACES_HELP)
    packing: bool = option(False, "SFT", "--loss_on full: rows packed by TRL; --batch_sentence_num counts packed ones")
    do_sample: bool = option(False, "answers", "True: evaluation samples at --model_temperature; False: greedy")


def check(arguments: SFTArguments) -> None:
    """Refuse what cannot be run, and fill in defaults. Raises ArgumentError."""
    arguments.answer_space = arguments.answer_space or "labels"
    one_of("answer_space", arguments.answer_space, ANSWER_SPACES)
    fill_in_number_answer(arguments)
    one_of("loss_on", arguments.loss_on, ("label", "answer", "full"))
    one_of("number_target", arguments.number_target, ("nearest", "soft"))
    if not 0 <= arguments.label_smoothing < 1:
        raise ArgumentError(f"--label_smoothing {arguments.label_smoothing:g} must be at least 0 and less than 1")
    for name, usual in (("label_smoothing", 0), ("number_target", "nearest")):
        value = getattr(arguments, name)
        if value != usual and arguments.loss_on != "label":
            raise ArgumentError(f"--{name} {value} needs --loss_on label; leave it at {usual}")
    if arguments.packing and arguments.loss_on != "full":
        raise ArgumentError(
            f"--packing True needs --loss_on full; with --loss_on {arguments.loss_on} rows share their prefix, and "
            "nothing is padded anyway: leave it at False"
        )
    if arguments.use_CoT:
        raise ArgumentError(
            "--use_CoT True: the data holds no analyses to learn from; leave it at False, or use ppo.py"
        )
    if arguments.do_sample and arguments.answer_space == "score":
        raise ArgumentError("--answer_space score samples nothing; leave --do_sample at False")
    if arguments.learning_rate is None:
        arguments.learning_rate = FULL_LEARNING_RATE if arguments.full_finetuning else LEARNING_RATE
    fill_in_epochs(arguments)
    check_training(arguments, positive=("lines_per_file",))


def load(arguments: SFTArguments, chosen: list[tuple[Task, str | None]]) -> list[TaskData]:
    """Every task's rows, at most `--lines_per_file` training rows of each. Raises DataError."""
    data = [load_rows(arguments, task, path) for task, path in chosen]
    for part in data:
        if len(part.train) > arguments.lines_per_file:
            part.train = random.Random(arguments.seed).sample(part.train, arguments.lines_per_file)
    return data


def rows_of(arguments: SFTArguments, part: TaskData) -> int:
    """How many training rows an epoch has of a task, `--repeat_time` not counted."""
    return arguments.lines_per_file if arguments.balance_tasks else len(part.train)


def repeated(rows: int, wanted: int, seed: int) -> list[int]:
    """`wanted` numbers of so many rows: each as often as any other or once more, by draw."""
    return [*range(rows)] * (wanted // rows) + random.Random(seed).sample(range(rows), wanted % rows)


def check_label_sets(arguments: SFTArguments, data: list[TaskData]) -> None:
    """ArgumentError unless `--loss_on label` has labels to choose among, and `--number_target soft` numbers."""
    without = [part.task.name for part in data if len(part.task.words) < 2]
    if arguments.loss_on == "label" and without:
        raise ArgumentError(f"--loss_on label: {', '.join(without)} has no label set; use --loss_on answer")
    if arguments.number_target == "soft" and not any(part.task.number for part in data):
        raise ArgumentError("--number_target soft: no task here has numbers as labels; leave it out")


def main(argv: list[str] | None = None) -> None:
    arguments = parse(SFTArguments, __doc__.splitlines()[0], argv)
    with faults.guard("sft.py") as guard:
        check(arguments)
        data = load(arguments, find_tasks(arguments))
        check_label_sets(arguments, data)
        if arguments.max_steps is None:
            arguments.max_steps = STEPS if len(data) == 1 else 0
        rows = sum(rows_of(arguments, part) for part in data) * arguments.repeat_time
        check_batch(arguments, rows, name_of(arguments, data))
        train(arguments, data, guard)


def train(arguments: SFTArguments, data: list[TaskData], guard: faults.Guard) -> None:
    """Build, train, evaluate and save. What goes wrong, `guard` turns into one sentence."""
    # Not at the top: these import torch and transformers, which takes seconds, and bad input is refused without them.
    from engine.loading import check_vocabulary, load_engine
    from evaluation.answer_spaces import label_trie
    from training import training_run
    from training.sft_trainer import Finetuner, check_packing, loss_type

    # 1. prompts and answers
    tokenizer = training_run.load_tokenizer(arguments, data)
    table, shortened = dataset(arguments, data, tokenizer)

    # 2. model
    engine = load_engine(arguments.train_model_name, tokenizer, **arguments.model_options)
    check_vocabulary(engine, arguments.train_model_name, max(part.largest_token for part in data))
    if arguments.packing:
        check_packing(engine.network)
    adapter = training_run.new_adapter(arguments, engine.model)

    # 3. run
    run = training_run.TrainingRun("sft", arguments, name_of(arguments, data), data, tokenizer, guard)
    run.announce(shortened, f"{answers_text(arguments, [part.task for part in data])}, loss on {arguments.loss_on}")

    # 4. trainer
    temperature = arguments.model_temperature if arguments.do_sample else 0.0
    evaluation = training_run.HeldOutEvaluation(
        arguments, data, run.folder, temperature=temperature, seed=arguments.seed
    )
    config = trainer_config(arguments, run.folder, len(table))
    config.loss_type = loss_type(engine.network)
    if arguments.packing:
        config.rows_per_sequence = sum(map(len, table["seq_lengths"])) / len(table)
    trainer = Finetuner(
        engine.model,
        config,
        train_dataset=table,
        eval_dataset=table.select([0]),  # Trainer wants one; `evaluation` has the rows
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=run.callbacks,
        engine=engine,
        evaluate_with=evaluation,
        on_save=run.save_start_adapter,
        label_tries=[label_trie(part.task, tokenizer) for part in data] if arguments.loss_on == "label" else None,
    )
    trainer.episodes = evaluation.episodes

    # 5. train, save
    run.train(trainer)
    root = arguments.datafolder_path or arguments.data_path
    run.finish(trainer, trainer.samples_per_step, root, tasks=[part.task.name for part in data])
    given = training_run.task_options(run.folder, data) | ({"data_path": root} if root else {})
    given |= {"from_local": True, "train_model_name": run.folder / "best"}
    print("Or train on:\n  bash scripts/ppo.sh", *(f"--{name} {shlex.quote(str(v))}" for name, v in given.items()))


def dataset(arguments: SFTArguments, data: list[TaskData], tokenizer):
    """(datasets.Dataset of all tasks' training rows as Finetuner takes them, how many prompts were shortened).

    Also builds the held-out prompts. Raises PromptError.
    """
    import datasets

    from training.training_run import build_prompts

    tables, shortened = [], 0
    for number, part in enumerate(data):
        built, cut = build_prompts(arguments, part, tokenizer)
        shortened += cut
        if arguments.loss_on == "label":
            columns = label_columns(arguments, number, part, built)
        else:
            columns = answer_columns(arguments, part, built, tokenizer)
        table = datasets.Dataset.from_dict(columns)
        if arguments.balance_tasks:
            table = table.select(repeated(len(table), arguments.lines_per_file, arguments.seed))
        tables.append(table)
    table = datasets.concatenate_datasets(tables * arguments.repeat_time)
    return pack(arguments, table) if arguments.packing else table, shortened


def pack(arguments: SFTArguments, table):
    """The rows packed by TRL (best fit decreasing), whole: a sequence is as long as a prompt may be, or as the longest
    row. Raises ArgumentError if there are fewer sequences than a step takes."""
    import datasets
    from trl import pack_dataset

    size = max(arguments.max_prompt_length, max(map(len, table["input_ids"])))
    datasets.disable_progress_bars()
    packed = pack_dataset(table.shuffle(seed=arguments.seed), size, "bfd")
    if len(packed) < arguments.batch_sentence_num:
        raise ArgumentError(
            f"--packing True makes {len(packed)} sequences of the {len(table)} training rows, fewer than the "
            f"--batch_sentence_num {arguments.batch_sentence_num} of a step; lower it"
        )
    return packed


def answer_columns(arguments: SFTArguments, part: TaskData, built: list[list[int]], tokenizer) -> dict[str, list]:
    """A task's prompts and answers; the loss is on the answer's tokens, or on all."""
    from evaluation import answer_spaces
    from training.sft_trainer import IGNORED

    targets = {row["label"]: answer_spaces.target_ids(part.task, row, tokenizer) for row in part.train}
    answers = [targets[row["label"]] for row in part.train]
    loss_on_answer = arguments.loss_on == "answer"
    ignored = [[IGNORED] * len(prompt) if loss_on_answer else prompt for prompt in built]
    return {
        "input_ids": [prompt + answer for prompt, answer in zip(built, answers)],
        "labels": [before + answer for before, answer in zip(ignored, answers)],
    }


def label_columns(arguments: SFTArguments, number: int, part: TaskData, built: list[list[int]]) -> dict[str, list]:
    """A task's prompts, and the weights of its labels in the loss. number: the task's, among those of the run."""
    import torch

    from training.objectives import number_weights, smoothed

    def target(label: int | float) -> list[float]:
        if part.task.number:
            numbers = torch.tensor([to_units(part.task, float(word)) for word in part.task.words])
            weights = number_weights(numbers, to_units(part.task, label), arguments.number_target == "soft")
        else:
            weights = torch.nn.functional.one_hot(torch.tensor(label), len(part.task.words)).float()
        return smoothed(weights, arguments.label_smoothing).tolist()

    labels = [row["label"] for row in part.train]
    targets = {label: target(label) for label in set(labels)}
    return {
        "prompt_ids": built,
        "task": [number] * len(built),
        "label": [float(label) for label in labels],
        "target": [targets[label] for label in labels],
    }


def trainer_config(arguments: SFTArguments, folder: Path, rows: int):
    """The RunConfig of these arguments for so many training rows; a step is one batch."""
    import torch

    from engine.models import number_format
    from training.sft_trainer import RunConfig
    from training.training_run import trainer_settings

    settings = trainer_settings(arguments, folder, rows)
    batch = arguments.batch_sentence_num // processes.count()
    shared = arguments.loss_on != "full"
    most = batch if shared else 1 if arguments.packing else min(MICRO_BATCH, batch)  # a packed sequence is long
    micro = next(size for size in range(most, 0, -1) if batch % size == 0)
    if arguments.gradient_checkpointing is None:
        settings["activation_checkpointing"] = torch.cuda.is_available() and not shared  # room for long prompts
    return RunConfig(
        **settings,
        data_seed=arguments.seed + arguments.start_epoch,  # epoch n has one order, whichever run it is in
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        warmup_steps=settings["max_steps"] // 20,
        adam_epsilon=1e-5 if arguments.loss_on == "label" else 1e-8,  # PPO's, where only the objective should differ
        bf16=number_format(arguments.number_format) == torch.bfloat16,
        shared_prefix=arguments.loss_on == "answer",
        packing=arguments.packing,
        remove_unused_columns=arguments.loss_on != "label",
        loss_type="chunked_nll",  # logits only where there is a loss
        max_length=None,  # the prompts are already short enough, and the answer stands at the end
        dataset_kwargs={"skip_prepare_dataset": True},
    )


if __name__ == "__main__":
    processes.run(main)
