"""PPO on one task: prompts in, answer tokens as actions, agreement with the ground truth as reward.

    bash scripts/ppo.sh                                   sets up, then runs this file on MR with the embedded model
    .venv/bin/python ppo.py --task RTE --train_model_name Qwen/Qwen2.5-1.5B-Instruct

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
from run.arguments import get_task, one_of, parse
from run.parser import option
from tasks import splits
from training import reward_functions
from training.arguments import (
    ADVANTAGES,
    GROUP_ADVANTAGES,
    TrainArguments,
    check_batch,
    check_training,
    fill_in_epochs,
    usual_advantage,
)
from training.data import TaskData, load_rows

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


ADVANTAGE_HELP = "critic, leave_one_out (default with --repeat_time > 1), group, group_mean, batch"


@dataclass
class PPOArguments(TrainArguments):
    """What PPO takes beside the arguments of all training."""

    batch_sentence_num: int | None = option(None, "training", "prompts per step; default: by recipe")
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


def check(arguments: PPOArguments) -> None:
    """Refuse what cannot be run, and fill in what the recipe decides. Raises ArgumentError."""
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
    for name, value in RECIPES[arguments.policy_gradient].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    check_training(
        arguments,
        positive=("value_learning_rate", "clip_range", "clip_range_high", "ppo_epochs", "num_minibatches"),
        not_negative=("kl_coef", "kl_target", "entropy_coef", "entropy_end", "value_coef", "warmup_steps"),
    )
    check_objective(arguments)
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
        check(arguments)
        task = get_task(arguments)
        data = load_rows(arguments, task, splits.task_path(task, arguments.data_path))
        check_batch(arguments, len(data.train), task.name)
        train(arguments, data, load_rewards(arguments, data), guard)


def load_rewards(arguments: PPOArguments, data: TaskData) -> list[Callable]:
    """The functions that judge answers: those of --reward, or the task's own; with --reward_weights both.

    Raises ArgumentError. A resume compares the files of --reward with those that the run began with.
    """
    given = reward_functions.load(arguments.reward, ["ended", "prompt_ids", *data.train[0]])
    arguments.reward_files = reward_functions.file_hashes(arguments.reward, given)
    if given and not arguments.reward_weights:
        return given
    of_task = rewards.reward_function(
        data.task,
        arguments.reward_correct,
        arguments.reward_wrong,
        arguments.reward_invalid,
        arguments.reward_number,
        arguments.strict_format,
        arguments.use_CoT,
    )
    return [of_task, *given]


def train(arguments: PPOArguments, data: TaskData, reward_funcs: list[Callable], guard: faults.Guard) -> None:
    """Build, train, evaluate and save. What goes wrong, `guard` turns into one sentence."""
    # Not at the top: these import torch and transformers, which takes seconds, and bad input is refused without them.
    from engine import models
    from engine.loading import check_vocabulary, load_engine
    from evaluation.answer_spaces import AnswerFormat
    from machine.memory import training_token_budget
    from training import training_run
    from training.ppo_trainer import PPOTrainer

    # 1. prompts
    task, tokenizer = data.task, training_run.load_tokenizer(arguments, [data])
    train_prompts, shortened = training_run.build_prompts(arguments, data, tokenizer)

    # 2. model
    engine = load_engine(arguments.train_model_name, tokenizer, **arguments.model_options)
    check_vocabulary(engine, arguments.train_model_name, data.largest_token)
    adapter = models.lora_config_for(engine.model)
    keep_rollout = arguments.policy_gradient == "sampled" and arguments.num_minibatches == 1
    budget = arguments.tokens_per_micro_batch or training_token_budget(engine.model, keep_rollout)
    arguments.tokens_per_micro_batch = budget

    # 3. run
    run = training_run.TrainingRun("ppo", arguments, task, [data], tokenizer, guard)
    how = f"{answers_text(arguments, [task])}, {arguments.policy_gradient} policy gradient"
    how += f", advantages by {arguments.advantage}" if arguments.advantage else ""
    run.announce(shortened, how)

    # 4. trainer
    trainer = PPOTrainer(
        model=engine.model,
        reward_funcs=reward_funcs,
        args=trainer_config(arguments, run.folder, len(data.train)),
        train_dataset=[{**row, "prompt_ids": ids} for row, ids in zip(data.train, train_prompts)],
        processing_class=tokenizer,
        answer_format=AnswerFormat(task, arguments.use_CoT, arguments.strict_format),
        peft_config=adapter,
        compute_metrics=training_run.HeldOutEvaluation(arguments, [data], run.folder, arguments.strict_format),
        on_save=run.save_start_adapter,
        callbacks=run.callbacks,
        engine=engine,
    )

    # 5. train, save
    run.train(trainer)
    run.finish(trainer, arguments.batch_sentence_num * trainer.samples_per_prompt, arguments.data_path)


def trainer_config(arguments: PPOArguments, folder: Path, rows: int):
    """The PPOConfig of these arguments for so many training rows; one trainer step is one PPO step."""
    from training.ppo_trainer import PPOConfig
    from training.training_run import trainer_settings

    settings = trainer_settings(arguments, folder, rows)
    return PPOConfig(
        **settings,
        per_device_train_batch_size=arguments.batch_sentence_num // processes.count(),
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
