"""The arguments that ppo.py and sft.py share, and what is checked of them. Imports nothing that takes long."""

from dataclasses import dataclass

from machine.errors import ArgumentError
from run.arguments import TASKS_HELP, Arguments, check_not_negative, check_positive, divisible, one_of
from run.parser import option

MAX_STEPS_HELP = "number of steps; 0: all epochs; default: by recipe, or 0 with --end_epoch"


@dataclass
class TrainArguments(Arguments):
    """What ppo.py and sft.py take beside the arguments of all scripts."""

    learning_rate: float | None = option(None, "training", "learning rate of the adapter; default: by recipe")
    start_epoch: int = option(0, "training", "number of the first epoch")
    end_epoch: int | None = option(None, "training", "epoch to stop before; default: --start_epoch + 1")
    max_steps: int | None = option(None, "training", MAX_STEPS_HELP)
    repeat_time: int | None = option(None, "training", "samples per prompt; default: by recipe")
    save_methods: str = option("epoch", "evaluation and saving", "when to save checkpoints: step or epoch")
    save_freq: int = option(20, "evaluation and saving", "steps between checkpoints, with --save_methods step")
    checkpoint_rate: int = option(1, "evaluation and saving", "epochs between checkpoints, with --save_methods epoch")
    eval_steps: int = option(0, "evaluation and saving", "steps between evaluations; 0: only before and after training")
    save_total_limit: int = option(0, "evaluation and saving", "checkpoints to keep beside the best; 0: all")
    resume: str = option("", "run", "folder of the run to continue, from its last checkpoint")


@dataclass
class PolicyArguments(TrainArguments):
    """What ppo.py and sft.py take, which train one model on a task or on several."""

    task: str = option("", "run", TASKS_HELP)
    datafolder_path: str = option("", "run", "folder such as data/GLUE: train on every task in it, not on --task")
    balance_tasks: bool = option(
        False, "training", "True: every task equally often, small ones repeated; SFT: up to --lines_per_file"
    )


ADVANTAGES = ("critic", "leave_one_out", "group", "group_mean", "batch")
GROUP_ADVANTAGES = ("group", "group_mean")  # compare the answers to one prompt, so they need several
POSITIVE = ("learning_rate", "repeat_time", "save_freq", "checkpoint_rate")
NOT_NEGATIVE = ("max_steps", "eval_steps", "start_epoch", "save_total_limit")


def usual_advantage(samples_per_prompt: int) -> str:
    """What sampled PPO's advantages are taken against, unless it is told."""
    return "leave_one_out" if samples_per_prompt > 1 else "critic"


def fill_in_epochs(arguments: TrainArguments) -> None:
    """Without --end_epoch one epoch; with it, and without --max_steps, whole epochs."""
    if arguments.end_epoch is None:
        arguments.end_epoch = arguments.start_epoch + 1
    elif arguments.max_steps is None:
        arguments.max_steps = 0


def check_training(
    arguments: TrainArguments, positive: tuple[str, ...] = (), not_negative: tuple[str, ...] = ()
) -> None:
    """ArgumentError unless the shared arguments, and those that are named, can be used. None stays to be decided."""
    one_of("save_methods", arguments.save_methods, ("step", "epoch"))
    check_positive(arguments, (*POSITIVE, *positive))
    check_not_negative(arguments, (*NOT_NEGATIVE, *not_negative))
    if arguments.end_epoch <= arguments.start_epoch:
        raise ArgumentError(
            f"--end_epoch {arguments.end_epoch} must be greater than --start_epoch {arguments.start_epoch}"
        )
    divisible(arguments)


def check_batch(arguments: TrainArguments, rows: int, name: str) -> None:
    """ArgumentError if a step takes more than all training rows of the task (or tasks) of this name."""
    if rows < arguments.batch_sentence_num:
        raise ArgumentError(
            f"--batch_sentence_num {arguments.batch_sentence_num} is more than the {rows} training rows of {name}; "
            "lower it"
        )
