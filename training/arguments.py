"""The arguments that ppo.py and sft.py share, and what is checked of them. Imports nothing that takes long."""

import importlib.util
from dataclasses import dataclass, fields

from engine.folders import LORA_ALPHA, LORA_R
from machine import processes
from machine.errors import ArgumentError
from run.arguments import TASKS_HELP, Arguments, check_not_negative, check_positive, divisible, one_of
from run.parser import option

OPTIMIZER_HELP = "adamw_torch, adamw_torch_fused, adamw_8bit, adafactor, sgd, lion_32bit, ..."
MAX_STEPS_HELP = "number of steps; 0: all epochs; default: by recipe, or 0 with --end_epoch"


FULL_LEARNING_RATE = 5e-5  # of all weights: the largest of those in https://arxiv.org/abs/1810.04805
OF_TORCH = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
OF_BITSANDBYTES = (
    "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "lion_32bit", "lion_8bit", "paged_lion_8bit"
)  # fmt: skip
SCHEDULERS = (  # that need no settings of their own
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
)  # fmt: skip


@dataclass
class AdapterArguments:
    """What is trained: a LoRA adapter, whose options are those of peft.LoraConfig, or all weights."""

    lora_r: int = option(LORA_R, "adapter", "rank")
    lora_alpha: int = option(LORA_ALPHA, "adapter", "scaling: the update is times alpha / r")
    lora_dropout: float = option(0.0, "adapter", "share of a layer's input that the adapter does not see; 0 in PPO")
    lora_targets: str = option("all-linear", "adapter", "all-linear, or names of linear layers such as q_proj,v_proj")
    use_rslora: bool = option(False, "adapter", "True: scaling alpha / sqrt(r) in place of alpha / r")
    full_finetuning: bool = option(False, "adapter", "True: train all weights, without an adapter")

    @property
    def lora(self) -> dict:
        """Fields of peft.LoraConfig."""
        names = [name.strip() for name in self.lora_targets.split(",")]
        return dict(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_targets if self.lora_targets == "all-linear" else names,
            use_rslora=self.use_rslora,
        )

    @property
    def trained(self) -> str:
        """What is trained, for people."""
        scaling = "rank-stabilized " if self.use_rslora else ""
        return "all weights" if self.full_finetuning else f"{scaling}LoRA of rank {self.lora_r}"


@dataclass
class OptimizationArguments:
    """How it is trained; names and values are those of transformers.TrainingArguments."""

    optimizer: str = option("adamw_torch_fused", "training", OPTIMIZER_HELP)
    lr_scheduler: str = option("linear", "training", "learning rate over the run: linear, cosine, constant, ...")
    weight_decay: float = option(0.0, "training", "decay of the weights per step, times the learning rate")
    max_grad_norm: float = option(1.0, "training", "norm that gradients are clipped to")
    gradient_checkpointing: bool = option(False, "training", "True: less memory, as activations are computed twice")


@dataclass
class TrainArguments(OptimizationArguments, AdapterArguments, Arguments):
    """What ppo.py, sft.py and classify.py take beside the arguments of all scripts."""

    learning_rate: float | None = option(
        None, "training", f"learning rate; default: by recipe, or {FULL_LEARNING_RATE:g} with --full_finetuning"
    )
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

    @property
    def number_format(self) -> str:
        """The name of the weights' data type; "": by the machine. All weights need float32: in bfloat16 an update of
        less than a 512th of a weight is lost."""
        return self.dtype or ("float32" if self.full_finetuning else "")


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
POSITIVE = ("learning_rate", "repeat_time", "save_freq", "checkpoint_rate", "lora_r", "lora_alpha", "max_grad_norm")
NOT_NEGATIVE = ("max_steps", "eval_steps", "start_epoch", "save_total_limit", "weight_decay")


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
    _check_adapter(arguments)
    _check_optimization(arguments)


def _check_adapter(arguments: TrainArguments) -> None:
    """ArgumentError for an adapter that cannot be, and for what full fine-tuning has no use for."""
    if not 0 <= arguments.lora_dropout < 1:
        raise ArgumentError(f"--lora_dropout {arguments.lora_dropout:g} must be at least 0 and less than 1")
    if not all(name.strip() for name in arguments.lora_targets.split(",")):
        raise ArgumentError(
            f"--lora_targets {arguments.lora_targets!r} names no layer; give all-linear, or names such as q_proj,v_proj"
        )
    if not arguments.full_finetuning:
        return
    for field in fields(AdapterArguments):
        value = getattr(arguments, field.name)
        if field.name != "full_finetuning" and value != field.default:
            raise ArgumentError(
                f"--full_finetuning True trains all weights, so there is no adapter: leave out --{field.name} {value}"
            )
    bits = 8 if arguments.load_in_8bit else 4 if arguments.load_in_4bit else 0
    if bits:
        raise ArgumentError(
            f"--load_in_{bits}bit True: {bits}-bit weights cannot be trained, only an adapter on them; leave "
            "--full_finetuning at False"
        )
    if arguments.dtype == "float16":
        raise ArgumentError(
            "--full_finetuning True: weights in float16 cannot hold small updates; leave --dtype out, for float32"
        )
    if processes.LAUNCHED_FOR in processes.SHARDING:
        raise ArgumentError(
            f"--full_finetuning True: {processes.LAUNCHED_FOR} shards frozen weights here, with an adapter on them; "
            "leave it at False, or use scripts/accelerate/processes.yaml"
        )


def _check_optimization(arguments: TrainArguments) -> None:
    """ArgumentError for an optimizer, a schedule or checkpointing that cannot be had."""
    one_of("optimizer", arguments.optimizer, (*OF_TORCH, *OF_BITSANDBYTES))
    one_of("lr_scheduler", arguments.lr_scheduler, SCHEDULERS)
    if arguments.optimizer in OF_BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise ArgumentError(
            f"--optimizer {arguments.optimizer} needs the package bitsandbytes: pip install bitsandbytes; or give "
            f"{OF_TORCH[0]}"
        )
    if arguments.gradient_checkpointing and processes.LAUNCHED_FOR in processes.SHARDING:
        raise ArgumentError(
            f"--gradient_checkpointing True: not with {processes.LAUNCHED_FOR}, which gathers weights block by block; "
            "leave it at False, or lower --tokens_per_micro_batch"
        )


def check_batch(arguments: TrainArguments, rows: int, name: str) -> None:
    """ArgumentError if a step takes more than all training rows of the task (or tasks) of this name."""
    if rows < arguments.batch_sentence_num:
        raise ArgumentError(
            f"--batch_sentence_num {arguments.batch_sentence_num} is more than the {rows} training rows of {name}; "
            "lower it"
        )
