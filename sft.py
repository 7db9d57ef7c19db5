"""Supervised fine-tuning: the model learns to write the gold answer, on one task or on all tasks of a suite.

    bash scripts/sft.sh                                       the embedded model on MR
    bash scripts/sft.sh --datafolder_path data/GLUE           every task below data/GLUE in one model
    bash scripts/ppo.sh --from_local True --train_model_name model/MR/<run>/best            PPO goes on from it

trl's SFTTrainer (sft_trainer.py) on token ids: a prompt has exactly the ids that inference.py asks with, an answer
those that it reads.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from datasets import Dataset, concatenate_datasets

import prompts
import rewards
from engine import models
from engine.engine import Engine
from engine.loading import load_model
from evaluation import answer_spaces, predict, predictions, scores
from machine import processes
from machine.errors import ArgumentError
from run import dashboards, faults
from run.arguments import Arguments, divisible, get_tasks, one_of, parse
from run.folder import data_hash, folder_of, open_run, write_summary
from run.history import before_after_table, evaluations, train_seconds
from run.progress import RunCallback, quiet_trainer
from tasks import Task, splits
from training.sft_trainer import IGNORED, Finetuner, RunConfig

MICRO_BATCH = 8  # with loss on the full row: rows that go through the network at once, at most
# On one task, unless --max_steps says otherwise: 72 steps of 8 rows are as many rows as ppo.py's default sees. On MR 18
# steps of 32 taught less at every step size (78 to 80% against 89%): the first steps are spent on the tags.
STEPS = 72


@dataclass
class SFTArguments(Arguments):
    """What SFT takes beside the common arguments."""

    task: str = field(default="MR", metadata={"help": "a task, several as SST,RTE, or a suite: GLUE, SuperGLUE"})
    datafolder_path: str = field(
        default="", metadata={"help": "train on every task below this folder (data/GLUE); --task is then not read"}
    )
    batch_sentence_num: int = field(default=8, metadata={"help": "rows per step"})
    lines_per_file: int = field(default=30000, metadata={"help": "training rows of each task at most"})
    learning_rate: float = field(default=5e-4, metadata={"help": "of the adapter"})
    start_epoch: int = field(default=0, metadata={"help": "number of the first epoch"})
    end_epoch: int | None = field(
        default=None, metadata={"help": "train up to, not including, this epoch; default the one after --start_epoch"}
    )
    max_steps: int | None = field(
        default=None,
        metadata={"help": f"stop after so many steps; 0: when the epochs end; default {STEPS} on one task"},
    )
    repeat_time: int = field(default=1, metadata={"help": "how often each row is seen in an epoch"})
    loss_on: str = field(default="answer", metadata={"help": "answer, or full: prompt and answer, as published"})
    save_methods: str = field(default="epoch", metadata={"help": "step or epoch"})
    save_freq: int = field(default=20, metadata={"help": "with --save_methods step: every so many steps"})
    checkpoint_rate: int = field(default=1, metadata={"help": "with --save_methods epoch: every so many epochs"})
    eval_steps: int = field(default=0, metadata={"help": "evaluate every so many steps; 0: before and after only"})
    do_sample: bool = field(default=False, metadata={"help": "True: evaluation samples at --model_temperature"})
    save_total_limit: int = field(default=0, metadata={"help": "keep so many of the last checkpoints; 0: all"})
    resume: str = field(default="", metadata={"help": "folder of a run to go on with, from its last checkpoint"})


@dataclass
class Part:
    """One task's share of the data."""

    task: Task
    train: list[dict]
    held_out: list[dict]
    held_out_prompts: list[list[int]] = field(default_factory=list)


def check(arguments: SFTArguments) -> list[tuple[Task, str | None]]:
    """The tasks and where their files are; refuses what cannot be run and fills in defaults. Raises ArgumentError."""
    arguments.answer_space = arguments.answer_space or "labels"
    one_of("answer_space", arguments.answer_space, answer_spaces.ANSWER_SPACES)
    one_of("save_methods", arguments.save_methods, ("step", "epoch"))
    one_of("loss_on", arguments.loss_on, ("answer", "full"))
    divisible(arguments)
    if arguments.use_CoT:
        raise ArgumentError(
            "--use_CoT True: the data holds no analyses to learn from; leave it at False, or use ppo.py"
        )
    if arguments.do_sample and arguments.answer_space == "score":
        raise ArgumentError("--answer_space score samples nothing; leave --do_sample at False")
    for name in ("learning_rate", "lines_per_file", "repeat_time", "save_freq", "checkpoint_rate"):
        if not getattr(arguments, name) > 0:
            raise ArgumentError(f"--{name} {getattr(arguments, name)} must be greater than 0")
    for name in ("max_steps", "eval_steps", "start_epoch", "save_total_limit"):
        if (getattr(arguments, name) or 0) < 0:
            raise ArgumentError(f"--{name} {getattr(arguments, name)} must not be negative")
    if arguments.end_epoch is None:
        arguments.end_epoch = arguments.start_epoch + 1
    elif arguments.max_steps is None:
        arguments.max_steps = 0  # who asks for epochs gets whole ones
    if arguments.end_epoch <= arguments.start_epoch:
        raise ArgumentError(
            f"--end_epoch {arguments.end_epoch} must be greater than --start_epoch {arguments.start_epoch}"
        )
    if arguments.datafolder_path:
        chosen = splits.found_below(arguments.datafolder_path)
        if not chosen:
            raise ArgumentError(
                f"--datafolder_path {arguments.datafolder_path} holds no task's training file; give a folder such as "
                "data/GLUE with RTE/train.tsv in it"
            )
    else:
        named = splits.one_per_training_file(get_tasks(arguments.task))
        if not named:
            raise ArgumentError(f"--task {arguments.task} has no training data: it is answered by another task's model")
        if len(named) > 1 and Path(arguments.data_path or ".").is_file():
            raise ArgumentError(f"--data_path {arguments.data_path} is one file, but --task names {len(named)} tasks")
        chosen = [(task, splits.task_path(task, arguments.data_path, len(named) > 1)) for task in named]
    if arguments.max_steps is None:
        arguments.max_steps = STEPS if len(chosen) == 1 else 0
    return chosen


def load(arguments: SFTArguments, chosen: list[tuple[Task, str | None]]) -> list[Part]:
    """Every task's training and held-out rows, at most `--lines_per_file` training rows of each."""
    parts = []
    for task, place in chosen:
        task = splits.labelled(task, place)
        train, held_out = splits.train_and_held_out(task, place, arguments.eval_size, arguments.seed)
        if len(train) > arguments.lines_per_file:
            train = random.Random(arguments.seed).sample(train, arguments.lines_per_file)
        parts.append(Part(task, train, held_out))
    return parts


def example(prompt: list[int], answer: list[int], loss_on: str) -> dict[str, list[int]]:
    """input_ids and labels of one row: the loss is on the answer's tokens, or on all."""
    ignored = [IGNORED] * len(prompt) if loss_on == "answer" else prompt
    return {"input_ids": prompt + answer, "labels": ignored + answer}


def dataset(arguments: SFTArguments, parts: list[Part], tokenizer) -> tuple[Dataset, int]:
    """The training rows of all tasks as token ids, and how many prompts were shortened. Raises PromptError."""
    tables, shortened = [], 0
    for part in parts:
        built, cut = prompts.build_all(part.task, part.train, tokenizer, False, arguments.max_prompt_length)
        answers = {row["label"]: answer_spaces.target_ids(part.task, row, tokenizer) for row in part.train}
        rows = [example(ids, answers[row["label"]], arguments.loss_on) for ids, row in zip(built, part.train)]
        tables.append(Dataset.from_dict({name: [row[name] for row in rows] for name in ("input_ids", "labels")}))
        part.held_out_prompts, cut_too = prompts.build_all(
            part.task, part.held_out, tokenizer, False, arguments.max_prompt_length
        )
        shortened += cut + cut_too
    return concatenate_datasets(tables * arguments.repeat_time), shortened


def predictions_folder(part: Part, parts: list[Part], folder: Path) -> Path:
    """Where the answers to a task's held-out rows are kept: of several tasks each has a folder inside the run's."""
    return folder / folder_of(part.task) if len(parts) > 1 else folder


def evaluator(arguments: SFTArguments, parts: list[Part], episodes: list[dict], folder: Path):
    """`(engine) -> figures` on the held-out rows: of one task its metrics; of several each one's, and their means."""

    def evaluate(engine: Engine) -> dict[str, float]:
        figures, all_metrics, first = {}, [], not evaluations(folder)
        episodes.clear()
        for part in parts:
            found = predict.predict(
                engine, part.task, part.held_out_prompts, arguments.answer_space, arguments.max_response_length,
                temperature=arguments.model_temperature if arguments.do_sample else 0.0, seed=arguments.seed,
            )  # fmt: skip
            own = predictions_folder(part, parts, folder)
            predictions.write(own, part.task, part.held_out, part.held_out_prompts, found, engine.tokenizer, first)
            all_metrics.append(scores.score(part.task, part.held_out, found))
            figures |= {f"{part.task.name}/{name}": value for name, value in all_metrics[-1].items()}
            for ids, row, prediction in list(zip(part.held_out_prompts, part.held_out, found))[:2]:
                reward = rewards.reward(part.task, prediction.label, row["label"])
                episodes.append({"prompt": ids, "answer": prediction.text, "reward": reward, "row": row,
                                 "task": part.task})  # fmt: skip
        if len(parts) == 1:
            return all_metrics[0]
        return {
            name: sum(m[name] for m in all_metrics) / len(all_metrics) for name in ("score", "invalid_rate")
        } | figures

    return evaluate


def trainer_config(arguments: SFTArguments, folder: Path, rows: int) -> RunConfig:
    """RunConfig for these arguments; a step is one batch."""
    batch = arguments.batch_sentence_num
    own = divisible(arguments)
    shared = arguments.loss_on == "answer"
    micro = own if shared else next(size for size in range(min(MICRO_BATCH, own), 0, -1) if own % size == 0)
    by_epochs = (arguments.end_epoch - arguments.start_epoch) * (rows // batch)
    steps = min(arguments.max_steps or by_epochs, by_epochs)
    save_every = (
        arguments.save_freq if arguments.save_methods == "step" else arguments.checkpoint_rate * (rows // batch)
    )
    cuda = torch.cuda.is_available()
    return RunConfig(
        output_dir=str(folder),
        run_name=folder.name,
        seed=arguments.seed,
        data_seed=arguments.seed + arguments.start_epoch,  # epoch n has one order, whichever run it is in
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=own // micro,
        dataloader_drop_last=True,
        max_steps=steps,
        learning_rate=arguments.learning_rate,
        warmup_steps=steps // 20,
        lr_scheduler_type="linear",
        weight_decay=0.0,
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
        use_cpu=not cuda,
        bf16=cuda,
        activation_checkpointing=cuda and not shared,  # room for long prompts
        shared_prefix=shared,
        tokens_per_micro_batch=arguments.tokens_per_micro_batch,
        loss_type="chunked_nll",  # logits only where there is a loss
        max_length=None,  # the prompts are already short enough, and the answer stands at the end
        dataset_kwargs={"skip_prepare_dataset": True},
        save_methods=arguments.save_methods,
        epoch_offset=arguments.start_epoch,
    )


def main(argv: list[str] | None = None) -> None:
    arguments = parse(SFTArguments, __doc__.splitlines()[0], argv)
    with faults.guard("sft.py") as guard:
        train_on_tasks(arguments, guard)


def train_on_tasks(arguments: SFTArguments, guard: faults.Guard) -> None:
    """A whole run: load, build, train, evaluate. What goes wrong, `guard` turns into one sentence."""
    parts = load(arguments, check(arguments))
    tokenizer = models.load_tokenizer(arguments.train_model_name, arguments.from_local, arguments.trust_remote_code)
    table, shortened = dataset(arguments, parts, tokenizer)
    if len(table) < arguments.batch_sentence_num:
        raise ArgumentError(
            f"--batch_sentence_num {arguments.batch_sentence_num} is more than the {len(table)} training rows; lower it"
        )
    if arguments.answer_space != "free":
        for part in parts:
            answer_spaces.label_trie(part.task, tokenizer)  # labels that this model cannot tell apart are refused now
    model, problem = load_model(arguments.train_model_name, tokenizer, arguments)
    name = parts[0].task.name if len(parts) == 1 else arguments.task
    if arguments.datafolder_path:
        name = Path(arguments.datafolder_path).resolve().name
    train = [row for part in parts for row in part.train]
    held_out = [row for part in parts for row in part.held_out]
    run = open_run(arguments, name, train, held_out, arguments.learning_rate)
    folder = guard.folder = run.folder
    guard.at_exit.append(lambda code: run.close())
    transformers.set_seed(arguments.seed)
    print(models.device_line())
    for part in parts:
        print(f"{part.task.name}: {len(part.train)} training rows, {len(part.held_out)} held out")
    print(f"{shortened} prompts were shortened to {arguments.max_prompt_length} tokens.")
    print(f"{arguments.train_model_name}, learning rate {arguments.learning_rate:g}; the run lies in {folder}")
    progress = RunCallback(folder, parts[0].task, tokenizer)
    trackers = dashboards.wandb_callbacks(arguments.report_to, progress, "sft")
    guard.at_exit += [tracker.close for tracker in trackers]
    episodes: list[dict] = []
    trainer = Finetuner(
        model,
        trainer_config(arguments, folder, len(table)),
        train_dataset=table,
        eval_dataset=table.select([0]),  # Trainer wants one; evaluate_with has the rows
        processing_class=tokenizer,
        peft_config=models.lora_config(),
        callbacks=[guard, progress, *trackers],
        evaluate_with=evaluator(arguments, parts, episodes, folder),
        on_save=lambda checkpoint: models.save_start_adapter(
            arguments.train_model_name, arguments.from_local, checkpoint
        ),
    )
    trainer.episodes = episodes
    quiet_trainer(trainer)
    progress.trainer = trainer
    trainer.engine.plain = problem is not None
    if run.checkpoint:
        print(f"Going on from {run.checkpoint}")
    trainer.train_from(run.checkpoint)
    guard.trained(trainer)
    finish(arguments, name, parts, folder, trainer)


def finish(arguments: SFTArguments, name: str, parts: list[Part], folder: Path, trainer: Finetuner) -> None:
    """Write summary.json, and say what came out, where it lies and what can be done with it."""
    if processes.broadcast_from_main(lambda: evaluations(folder)[-1]["step"]) != trainer.state.global_step:
        trainer.evaluate()
    if not processes.is_main():
        return
    history = evaluations(folder)
    moments = {"before": history[0], "after": history[-1], "best": max(history, key=lambda m: m["score"])}
    root = arguments.datafolder_path or arguments.data_path
    details = {
        part.task.name: scores.details_from_file(
            predictions_folder(part, parts, folder), part.task, part.held_out, root
        )
        for part in parts
    }
    write_summary(
        folder, "sft", parts[0].task if len(parts) == 1 else name, arguments, moments,
        trainer.state.global_step * arguments.batch_sentence_num, train_seconds(folder),
        data_hash=data_hash([row for part in parts for row in part.train]), steps=trainer.state.global_step,
        best_step=moments["best"]["step"], tasks=[part.task.name for part in parts],
        **(details[parts[0].task.name] if len(parts) == 1 else {"details": details}),
    )  # fmt: skip
    print(before_after_table(moments))
    best = folder / "best"
    asked = ",".join(part.task.name for part in parts)
    print(
        f"\nEverything lies in {folder}: best/ (the best checkpoint), predictions.jsonl, history.jsonl, summary.json.\n"
        f"Evaluate it, or train on:\n"
        f"  bash scripts/inference.sh --task {asked} --answer_space {arguments.answer_space} --from_local True "
        f"--train_model_name {best}\n"
        f"  bash scripts/ppo.sh --task {parts[0].task.name} --from_local True --train_model_name {best}"
    )


if __name__ == "__main__":
    processes.run(main)
