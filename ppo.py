"""PPO on a task or several: prompts in, answer tokens as actions, agreement with the ground truth as reward.

    bash scripts/ppo.sh                                   sets up, then runs this file on MR with the embedded model
    .venv/bin/python ppo.py --task RTE --train_model_name Qwen/Qwen2.5-1.5B-Instruct
    .venv/bin/python ppo.py --task SST,RTE --balance_tasks True       one policy for two tasks; a step has rows of one

What is left at its default follows RECIPES, which RESULTS.md gives the reasons for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rewards
from machine import processes
from machine.errors import ArgumentError
from run import faults
from run.answer_options import answers_text, fill_in_number_answer
from run.arguments import one_of, parse
from run.parser import option
from training import reward_functions
from training.arguments import (
    ADVANTAGES,
    FULL_LEARNING_RATE,
    GROUP_ADVANTAGES,
    OPTIMIZER_HELP,
    PolicyArguments,
    check_batch,
    check_training,
    fill_in_epochs,
    usual_advantage,
)
from training.data import TaskData, find_tasks, load_rows, name_of

# By policy gradient; each sees 576 rows. Small batches teach more per row than large ones. The entropy bonus keeps
# every label likely enough to be tried: with 0.05 in place of 0.5 sampled answers collapsed onto one label, with
# rewards of 1 and -1 it lets no probability of two rise above 0.98. Summing over all labels needs no critic; sampling
# needs many samples per prompt (they share its forward) and a slower start.
RECIPES = {
    "expected": dict(
        batch_sentence_num=8, max_steps=72, learning_rate=5e-4, repeat_time=1, entropy_coef=0.5, warmup_steps=3
    ),
    "sampled": dict(
        batch_sentence_num=16, max_steps=36, learning_rate=4e-4, repeat_time=16, entropy_coef=0.5, warmup_steps=4
    ),
}


MAX_STEPS_HELP = "number of steps; 0: all epochs; default: by recipe per task, 0 with --end_epoch"
ADVANTAGE_HELP = "critic, leave_one_out (default with --repeat_time > 1), group, group_mean, batch"


@dataclass
class PPOArguments(PolicyArguments):
    """What PPO takes beside the arguments of all training."""

    batch_sentence_num: int | None = option(None, "training", "prompts per step; default: by recipe")
    max_steps: int | None = option(None, "training", MAX_STEPS_HELP)
    optimizer: str = option("adamw_torch", "training", OPTIMIZER_HELP)
    policy_gradient: str = option(
        "", "PPO", "sampled, or expected: sum over all labels; default: expected where possible"
    )
    success_order: float = option(1.0, "PPO", "1: expected reward; higher: MaxRL of this order, towards likelihood")
    advantage: str = option("", "PPO", ADVANTAGE_HELP)
    ppo_epochs: int = option(1, "PPO", "passes over each rollout")
    num_minibatches: int = option(1, "PPO", "weight updates per pass")
    clip_range: float = option(0.2, "PPO", "how far the probability ratio may move from 1")
    clip_range_high: float | None = option(None, "PPO", "how far it may rise above 1; default: --clip_range")
    kl_coef: float = option(0.0, "PPO", "weight of the KL divergence from the reference in the reward")
    kl_target: float = option(0.0, "PPO", "the objective/kl that --kl_coef is adapted to, step by step; 0: it stays")
    entropy_coef: float | None = option(None, "PPO", "weight of the entropy bonus; default: by recipe")
    entropy_end: float | None = option(None, "PPO", "the bonus's weight at the last step; default: --entropy_coef")
    value_coef: float = option(0.5, "PPO", "weight of the value loss")
    value_learning_rate: float = option(1e-3, "PPO", "learning rate of the value head")
    warmup_steps: int | None = option(None, "PPO", "steps of learning rate warm-up; default: by recipe")
    reward_correct: float = option(1.0, "PPO", "reward of a correct answer")
    reward_wrong: float = option(-1.0, "PPO", "reward of a wrong answer")
    reward_invalid: float = option(-3.0, "PPO", "reward of an answer that does not parse")
    reward_number: float = option(2.5, "PPO", "STS-B: reward of the exact number; the distance is subtracted")
    reward: str = option("", "PPO", "functions in place of the task's reward: file.py:function, or several")
    reward_weights: str = option("", "PPO", "weights such as 1,0.5: of the task's reward, then of each of --reward")
    strict_format: bool = option(False, "answers", "True: only the closing tag ends a free answer")


def check(arguments: PPOArguments, tasks: int = 1) -> None:
    """Refuse what cannot be run, and fill in what the recipe decides. tasks: how many. Raises ArgumentError."""
    arguments.answer_space = arguments.answer_space or "labels"
    one_of("answer_space", arguments.answer_space, ("labels", "free"))
    fill_in_number_answer(arguments)
    summable = arguments.answer_space == "labels" and not arguments.use_CoT
    arguments.policy_gradient = arguments.policy_gradient or ("expected" if summable else "sampled")
    one_of("policy_gradient", arguments.policy_gradient, ("sampled", "expected"))
    if arguments.policy_gradient == "expected" and not summable:
        raise ArgumentError(
            "--policy_gradient expected sums over all labels: it needs --answer_space labels and --use_CoT False; "
            "use --policy_gradient sampled"
        )
    fill_in_epochs(arguments)
    if arguments.warmup_steps and arguments.lr_scheduler == "constant":
        raise ArgumentError(
            f"--lr_scheduler constant has no warm-up; leave out --warmup_steps {arguments.warmup_steps}, or give "
            "constant_with_warmup"
        )
    if arguments.full_finetuning and arguments.learning_rate is None:
        arguments.learning_rate = FULL_LEARNING_RATE
    recipe = RECIPES[arguments.policy_gradient]
    for name, value in {**recipe, "max_steps": recipe["max_steps"] * tasks}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    check_training(
        arguments,
        positive=("value_learning_rate", "clip_range", "clip_range_high", "ppo_epochs", "num_minibatches"),
        not_negative=("kl_coef", "kl_target", "entropy_coef", "entropy_end", "value_coef", "warmup_steps"),
    )
    check_objective(arguments)
    if arguments.lora_dropout:
        raise ArgumentError(
            f"--lora_dropout {arguments.lora_dropout:g}: PPO compares an answer's probability before and after an "
            "update, and with dropout two masks would change it too; leave it at 0"
        )
    arguments.reward = reward_functions.check(arguments.reward, arguments.reward_weights)
    if arguments.batch_sentence_num % arguments.num_minibatches:
        raise ArgumentError(
            f"--batch_sentence_num {arguments.batch_sentence_num} cannot be divided into --num_minibatches "
            f"{arguments.num_minibatches}; give a multiple"
        )


def check_objective(arguments: PPOArguments) -> None:
    """ArgumentError for options of the objective that do not fit the policy gradient; fills in --advantage."""
    gradient, order = arguments.policy_gradient, arguments.success_order
    if not order >= 1:
        raise ArgumentError(f"--success_order {order:g} must be at least 1")
    if order != 1 and gradient != "expected":
        raise ArgumentError(f"--success_order {order:g} needs --policy_gradient expected; leave it at 1")
    if arguments.advantage and gradient != "sampled":
        raise ArgumentError(f"--advantage {arguments.advantage} needs --policy_gradient sampled; leave it out")
    if gradient == "sampled":
        arguments.advantage = arguments.advantage or usual_advantage(arguments.repeat_time)
        one_of("advantage", arguments.advantage, ADVANTAGES)
        if arguments.advantage in GROUP_ADVANTAGES and arguments.repeat_time < 2:
            raise ArgumentError(
                f"--advantage {arguments.advantage} compares the answers to a prompt: give --repeat_time 2 or more"
            )
    if arguments.kl_target and not arguments.kl_coef:
        raise ArgumentError(
            f"--kl_target {arguments.kl_target:g} adapts --kl_coef, which must be greater than 0 to begin with"
        )


def main(argv: list[str] | None = None) -> None:
    arguments = parse(PPOArguments, __doc__.splitlines()[0], argv)
    with faults.guard("ppo.py") as guard:
        chosen = find_tasks(arguments)
        check(arguments, len(chosen))
        data = [load_rows(arguments, task, path) for task, path in chosen]
        check_tasks(arguments, data)
        train(arguments, data, load_rewards(arguments, data), guard)


def check_tasks(arguments: PPOArguments, data: list[TaskData]) -> None:
    """ArgumentError for a task that has too few rows for a step, or no labels to choose among."""
    for part in data:
        check_batch(arguments, len(part.train), part.task.name)
        if arguments.answer_space == "labels" and len(part.task.words) < 2:
            raise ArgumentError(f"--answer_space labels: {part.task.name} has no label set; use --answer_space free")


def load_rewards(arguments: PPOArguments, data: list[TaskData]) -> dict[str, list[Callable]]:
    """By task the functions that judge answers: those of --reward, or the task's own; with --reward_weights both.

    Raises ArgumentError. A resume compares the files of --reward with those that the run began with.
    """
    beside = ["ended", "prompt_ids", *(["task"] if len(data) > 1 else [])]
    given = reward_functions.load(arguments.reward, *([*beside, *part.train[0]] for part in data))
    arguments.reward_files = reward_functions.file_hashes(arguments.reward, given)
    if given and not arguments.reward_weights:
        return {part.task.name: given for part in data}
    return {part.task.name: [reward_of_task(arguments, part), *given] for part in data}


def reward_of_task(arguments: PPOArguments, part: TaskData) -> Callable:
    """The task's own reward."""
    return rewards.reward_function(
        part.task,
        arguments.reward_correct,
        arguments.reward_wrong,
        arguments.reward_invalid,
        arguments.reward_number,
        arguments.strict_format,
        arguments.use_CoT,
    )


def train(
    arguments: PPOArguments, data: list[TaskData], reward_funcs: dict[str, list[Callable]], guard: faults.Guard
) -> None:
    """Build, train, evaluate and save. What goes wrong, `guard` turns into one sentence."""
    # Not at the top: these import torch and transformers, which takes seconds, and bad input is refused without them.
    from engine.loading import check_vocabulary, load_engine
    from evaluation.answer_spaces import AnswerFormat
    from machine.memory import OF_ALL_WEIGHTS, training_token_budget
    from training import training_run
    from training.ppo_trainer import PPOTrainer

    # 1. prompts
    tokenizer = training_run.load_tokenizer(arguments, data)
    rows, shortened = training_rows(arguments, data, tokenizer)

    # 2. model
    engine = load_engine(arguments.train_model_name, tokenizer, **arguments.model_options)
    check_vocabulary(engine, arguments.train_model_name, max(part.largest_token for part in data))
    adapter = training_run.new_adapter(arguments, engine.model)
    keep_rollout = arguments.policy_gradient == "sampled" and arguments.num_minibatches == 1
    copies = 0 if adapter else OF_ALL_WEIGHTS + (arguments.kl_coef > 0)
    budget = arguments.tokens_per_micro_batch or training_token_budget(engine.model, keep_rollout, copies)
    arguments.tokens_per_micro_batch = budget

    # 3. run
    name = data[0].task if len(data) == 1 else name_of(arguments, data)
    run = training_run.TrainingRun("ppo", arguments, name, data, tokenizer, guard)
    how = f"{answers_text(arguments, [part.task for part in data])}, {arguments.policy_gradient} policy gradient"
    how += f", advantages by {arguments.advantage}" if arguments.advantage else ""
    how += f", tasks drawn {'evenly' if arguments.balance_tasks else 'by size'}" if len(data) > 1 else ""
    run.announce(shortened, how)

    # 4. trainer
    trainer = PPOTrainer(
        model=engine.model,
        reward_funcs=reward_funcs,
        args=trainer_config(arguments, run.folder, data),
        train_dataset=rows,
        processing_class=tokenizer,
        answer_format={
            part.task.name: AnswerFormat(part.task, arguments.use_CoT, arguments.strict_format) for part in data
        },
        peft_config=adapter,
        compute_metrics=training_run.HeldOutEvaluation(arguments, data, run.folder, arguments.strict_format),
        on_save=run.save_start_adapter,
        callbacks=run.callbacks,
        engine=engine,
    )

    # 5. train, save
    run.train(trainer)
    samples, root = arguments.batch_sentence_num * trainer.samples_per_prompt, arguments.datafolder_path
    run.finish(trainer, samples, root or arguments.data_path, tasks=[part.task.name for part in data])


def training_rows(arguments: PPOArguments, data: list[TaskData], tokenizer) -> tuple[dict[str, list[dict]], int]:
    """By task the training rows with their prompts, and how many prompts were shortened. Also builds the held-out
    prompts. Raises PromptError."""
    from training.training_run import build_prompts

    rows, shortened = {}, 0
    for part in data:
        built, cut = build_prompts(arguments, part, tokenizer)
        rows[part.task.name] = [{**row, "prompt_ids": ids} for row, ids in zip(part.train, built)]
        shortened += cut
    return rows, shortened


def trainer_config(arguments: PPOArguments, folder: Path, data: list[TaskData]):
    """The PPOConfig of these arguments for these training rows; one trainer step is one PPO step."""
    from training.ppo_trainer import PPOConfig
    from training.sampler import steps_per_epoch
    from training.training_run import trainer_settings

    batch = arguments.batch_sentence_num
    steps = sum(steps_per_epoch([len(part.train) for part in data], batch, arguments.balance_tasks))
    settings = trainer_settings(arguments, folder, steps * batch)
    return PPOConfig(
        **settings,
        balance_tasks=arguments.balance_tasks,
        per_device_train_batch_size=batch // processes.count(),
        # The first step of a warm-up has a rate of 0, so a warm-up as long as the run would train nothing.
        warmup_steps=min(arguments.warmup_steps, settings["max_steps"] - 1),
        answer_space=arguments.answer_space,
        policy_gradient=arguments.policy_gradient,
        success_order=arguments.success_order,
        advantage=arguments.advantage,
        samples_per_prompt=arguments.repeat_time,
        temperature=arguments.model_temperature,
        max_response_length=arguments.max_response_length,
        ppo_epochs=arguments.ppo_epochs,
        num_minibatches=arguments.num_minibatches,
        clip_range=arguments.clip_range,
        clip_range_high=arguments.clip_range_high,
        kl_coef=arguments.kl_coef,
        kl_target=arguments.kl_target,
        entropy_coef=arguments.entropy_coef,
        entropy_end=arguments.entropy_end,
        value_coef=arguments.value_coef,
        value_learning_rate=arguments.value_learning_rate,
        reward_weights=reward_functions.weights_of(arguments.reward_weights),
    )


if __name__ == "__main__":
    processes.run(main)
