"""PPO on one task: prompts in, answer tokens as actions, agreement with the ground truth as reward.

    bash scripts/ppo.sh                                   sets up, then runs this file on MR with the embedded model
    .venv/bin/python ppo.py --task RTE --train_model_name Qwen/Qwen2.5-1.5B-Instruct

What is left at its default follows RECIPES, which RESULTS.md gives the reasons for.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers

import prompts
import rewards
from engine import models
from engine.loading import load_model
from evaluation import answer_spaces, predict, predictions, scores
from machine import processes
from machine.errors import ArgumentError
from machine.memory import training_tokens
from run import dashboards, faults
from run.arguments import Arguments, divisible, get_task, one_of, parse
from run.folder import data_hash, open_run, write_summary
from run.history import before_after_table, evaluations, train_seconds
from run.progress import RunCallback, quiet_trainer
from tasks import Task, splits
from training.ppo_trainer import PPOConfig, PPOTrainer

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


@dataclass
class PPOArguments(Arguments):
    """What PPO takes beside the common arguments."""

    batch_sentence_num: int | None = field(default=None, metadata={"help": "prompts per step; default by recipe"})
    learning_rate: float | None = field(default=None, metadata={"help": "of the adapter; default by recipe"})
    start_epoch: int = field(default=0, metadata={"help": "number of the first epoch"})
    end_epoch: int | None = field(
        default=None, metadata={"help": "train up to, not including, this epoch; default the one after --start_epoch"}
    )
    max_steps: int | None = field(
        default=None,
        metadata={"help": "stop after so many steps; 0: when the epochs end; default by recipe, 0 with --end_epoch"},
    )
    repeat_time: int | None = field(default=None, metadata={"help": "samples per prompt; default by recipe"})
    save_methods: str = field(default="epoch", metadata={"help": "step or epoch"})
    save_freq: int = field(default=20, metadata={"help": "with --save_methods step: every so many steps"})
    checkpoint_rate: int = field(default=1, metadata={"help": "with --save_methods epoch: every so many epochs"})
    eval_steps: int = field(default=0, metadata={"help": "evaluate every so many steps; 0: before and after only"})
    save_total_limit: int = field(default=0, metadata={"help": "keep so many of the last checkpoints; 0: all"})
    resume: str = field(default="", metadata={"help": "folder of a run to go on with, from its last checkpoint"})
    policy_gradient: str = field(
        default="", metadata={"help": "sampled, or expected over all labels; default expected where it is possible"}
    )
    ppo_epochs: int = field(default=1, metadata={"help": "passes over each rollout"})
    num_minibatches: int = field(default=1, metadata={"help": "updates per pass"})
    clip_range: float = field(default=0.2, metadata={"help": "of the probability ratio"})
    kl_coef: float = field(default=0.0, metadata={"help": "weight of the KL to the reference in the reward"})
    entropy_coef: float | None = field(
        default=None, metadata={"help": "weight of the entropy bonus; default by recipe"}
    )
    value_coef: float = field(default=0.5, metadata={"help": "weight of the value loss"})
    value_learning_rate: float = field(default=1e-3, metadata={"help": "of the value head"})
    warmup_steps: int | None = field(
        default=None, metadata={"help": "steps until the learning rate is full; by recipe"}
    )
    reward_correct: float = field(default=1.0, metadata={"help": "reward of a correct answer"})
    reward_wrong: float = field(default=-1.0, metadata={"help": "reward of a wrong answer"})
    reward_invalid: float = field(default=-3.0, metadata={"help": "reward of an answer that does not parse"})
    reward_number: float = field(default=2.5, metadata={"help": "STS-B: reward of an exact number; less the distance"})
    strict_format: bool = field(default=False, metadata={"help": "True: only the closing tag ends an answer"})


def check(arguments: PPOArguments, task: Task) -> None:
    """Refuse what cannot be run, and fill in what the recipe decides. Raises ArgumentError."""
    arguments.answer_space = arguments.answer_space or "labels"
    one_of("answer_space", arguments.answer_space, ("labels", "free"))
    summable = arguments.answer_space == "labels" and not arguments.use_CoT
    arguments.policy_gradient = arguments.policy_gradient or ("expected" if summable else "sampled")
    one_of("policy_gradient", arguments.policy_gradient, ("sampled", "expected"))
    if arguments.policy_gradient == "expected" and not summable:
        raise ArgumentError(
            "--policy_gradient expected sums over all labels: it needs --answer_space labels and --use_CoT False; "
            "use --policy_gradient sampled"
        )
    if arguments.end_epoch is None:
        arguments.end_epoch = arguments.start_epoch + 1
    elif arguments.max_steps is None:
        arguments.max_steps = 0  # who asks for epochs gets whole ones
    for name, value in RECIPES[arguments.policy_gradient].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    one_of("save_methods", arguments.save_methods, ("step", "epoch"))
    for name in ("learning_rate", "value_learning_rate", "clip_range", "repeat_time", "save_freq", "checkpoint_rate",
                 "ppo_epochs", "num_minibatches"):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ArgumentError(f"--{name} {getattr(arguments, name)} must be greater than 0")
    for name in ("kl_coef", "entropy_coef", "value_coef", "max_steps", "eval_steps", "start_epoch", "warmup_steps",
                 "save_total_limit"):  # fmt: skip
        if getattr(arguments, name) < 0:
            raise ArgumentError(f"--{name} {getattr(arguments, name)} must not be negative")
    if arguments.end_epoch <= arguments.start_epoch:
        raise ArgumentError(
            f"--end_epoch {arguments.end_epoch} must be greater than --start_epoch {arguments.start_epoch}"
        )
    divisible(arguments)
    if arguments.batch_sentence_num % arguments.num_minibatches:
        raise ArgumentError(
            f"--batch_sentence_num {arguments.batch_sentence_num} cannot be divided into --num_minibatches "
            f"{arguments.num_minibatches}; give a multiple"
        )


def main(argv: list[str] | None = None) -> None:
    arguments = parse(PPOArguments, __doc__.splitlines()[0], argv)
    with faults.guard("ppo.py") as guard:
        train_on_task(arguments, guard)


def train_on_task(arguments: PPOArguments, guard: faults.Guard) -> None:
    """A whole run: load, build, train, evaluate. What goes wrong, `guard` turns into one sentence."""
    task = get_task(arguments.task)
    check(arguments, task)
    place = splits.task_path(task, arguments.data_path)
    task = splits.labelled(task, place)
    train, held_out = splits.train_and_held_out(task, place, arguments.eval_size, arguments.seed)
    if len(train) < arguments.batch_sentence_num:
        raise ArgumentError(
            f"--batch_sentence_num {arguments.batch_sentence_num} is more than the {len(train)} training rows of "
            f"{task.name}; lower it"
        )
    tokenizer = models.load_tokenizer(arguments.train_model_name, arguments.from_local, arguments.trust_remote_code)
    if arguments.answer_space == "labels":
        answer_spaces.label_trie(task, tokenizer)  # labels that this model cannot tell apart are refused now
    model, problem = load_model(arguments.train_model_name, tokenizer, arguments)
    keeps = arguments.policy_gradient == "sampled" and arguments.num_minibatches == 1
    arguments.tokens_per_micro_batch = arguments.tokens_per_micro_batch or training_tokens(model, keeps)
    settings = dict(tokenizer=tokenizer, use_CoT=arguments.use_CoT, max_prompt_length=arguments.max_prompt_length)
    train_prompts, shortened = prompts.build_all(task, train, **settings)
    held_out_prompts, shortened_held_out = prompts.build_all(task, held_out, **settings)
    run = open_run(arguments, task, train, held_out, arguments.learning_rate)
    folder = guard.folder = run.folder
    guard.at_exit.append(lambda code: run.close())
    transformers.set_seed(arguments.seed)
    print(models.device_line())
    print(
        f"{task.name}: {len(train)} training rows, {len(held_out)} held out; "
        f"{shortened + shortened_held_out} prompts were shortened to {arguments.max_prompt_length} tokens."
    )
    print(
        f"{arguments.train_model_name}, {arguments.answer_space} answers, {arguments.policy_gradient} policy gradient, "
        f"learning rate {arguments.learning_rate:g}; the run lies in {folder}"
    )

    format_ = {"strict_format": arguments.strict_format, "use_CoT": arguments.use_CoT}

    def evaluate(engine) -> dict[str, float]:
        found = predict.predict(
            engine, task, held_out_prompts, arguments.answer_space, arguments.max_response_length, **format_
        )
        first = not evaluations(folder)
        predictions.write(folder, task, held_out, held_out_prompts, found, tokenizer, first)
        return scores.score(task, held_out, found)

    config = trainer_config(arguments, folder, len(train))
    progress = RunCallback(folder, task, tokenizer)
    trackers = dashboards.wandb_callbacks(arguments.report_to, progress, "ppo")
    guard.at_exit += [tracker.close for tracker in trackers]
    masked = arguments.answer_space == "labels"
    trainer = PPOTrainer(
        model,
        rewards.reward_function(
            task,
            arguments.reward_correct,
            arguments.reward_wrong,
            arguments.reward_invalid,
            arguments.reward_number,
            **format_,
        ),  # fmt: skip
        config,
        [{**row, "prompt_ids": ids} for row, ids in zip(train, train_prompts)],
        tokenizer,
        peft_config=models.lora_config(),
        label_words=task.words,
        completion=lambda word: word + rewards.JUDGEMENT_END,
        stop=answer_spaces.analysis_closed if masked else answer_spaces.stop_rule(task, early=True, **format_),
        credit=lambda text, ended: rewards.label_length(task, text, ended, **format_),
        is_correct=lambda text, ended, row: rewards.is_correct(
            task, rewards.parse(task, text, ended, **format_), row["label"]
        ),
        link=answer_spaces.judgement_link(tokenizer),
        compute_metrics=evaluate,
        callbacks=[guard, progress, *trackers],
        on_save=lambda checkpoint: models.save_start_adapter(
            arguments.train_model_name, arguments.from_local, checkpoint
        ),
    )
    quiet_trainer(trainer)
    progress.trainer = trainer
    trainer.engine.plain = problem is not None
    if run.checkpoint:
        print(f"Going on from {run.checkpoint}")
    trainer.train_from(run.checkpoint)
    guard.trained(trainer)
    finish(arguments, task, folder, trainer, train, held_out)


def trainer_config(arguments: PPOArguments, folder: Path, rows: int) -> PPOConfig:
    """PPOConfig for these arguments; one trainer step is one PPO step."""
    per_epoch = rows // arguments.batch_sentence_num
    by_epochs = (arguments.end_epoch - arguments.start_epoch) * per_epoch
    steps = min(arguments.max_steps or by_epochs, by_epochs)
    save_every = arguments.save_freq if arguments.save_methods == "step" else arguments.checkpoint_rate * per_epoch
    return PPOConfig(
        output_dir=str(folder),
        run_name=folder.name,
        seed=arguments.seed,
        per_device_train_batch_size=divisible(arguments),
        dataloader_drop_last=True,
        max_steps=steps,
        learning_rate=arguments.learning_rate,
        warmup_steps=min(arguments.warmup_steps, steps - 1),  # the first step of a warm-up has a rate of 0
        lr_scheduler_type="linear",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=min(arguments.eval_steps or steps, steps),
        eval_on_start=not evaluations(folder),
        save_strategy="steps",
        save_steps=min(save_every, steps),
        save_total_limit=arguments.save_total_limit or None,
        report_to=dashboards.prepare_reporting(arguments.report_to, folder),
        project=dashboards.project(),
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        answer_space=arguments.answer_space,
        use_CoT=arguments.use_CoT,
        policy_gradient=arguments.policy_gradient,
        samples_per_prompt=arguments.repeat_time,
        temperature=arguments.model_temperature,
        max_response_length=arguments.max_response_length,
        epoch_offset=arguments.start_epoch,
        save_methods=arguments.save_methods,
        ppo_epochs=arguments.ppo_epochs,
        num_minibatches=arguments.num_minibatches,
        clip_range=arguments.clip_range,
        kl_coef=arguments.kl_coef,
        entropy_coef=arguments.entropy_coef,
        value_coef=arguments.value_coef,
        value_learning_rate=arguments.value_learning_rate,
        tokens_per_micro_batch=arguments.tokens_per_micro_batch,
    )


def finish(
    arguments: PPOArguments, task: Task, folder: Path, trainer: PPOTrainer, train: list[dict], held_out: list[dict]
) -> None:
    """Write summary.json, and say what came out, where it lies and how to evaluate it."""
    if processes.broadcast_from_main(lambda: evaluations(folder)[-1]["step"]) != trainer.state.global_step:
        trainer.evaluate()
    if not processes.is_main():
        return
    history = evaluations(folder)
    moments = {"before": history[0], "after": history[-1], "best": max(history, key=lambda m: m["score"])}
    samples = trainer.state.global_step * arguments.batch_sentence_num * trainer.samples_per_prompt
    write_summary(
        folder, "ppo", task, replace(arguments), moments, samples, train_seconds(folder),
        data_hash=data_hash(train), steps=trainer.state.global_step,
        best_step=moments["best"]["step"], **scores.details_from_file(folder, task, held_out, arguments.data_path),
    )  # fmt: skip
    print(before_after_table(moments))
    best = folder / "best"
    print(
        f"\nEverything lies in {folder}: best/ (the best checkpoint), predictions.jsonl, history.jsonl, summary.json.\n"
        f"Evaluate it:\n"
        f"  bash scripts/inference.sh --task {task.name} --answer_space {arguments.answer_space} --from_local True "
        f"--train_model_name {best}"
    )


if __name__ == "__main__":
    processes.run(main)
