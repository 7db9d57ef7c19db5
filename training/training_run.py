"""What ppo.py, sft.py and classify.py share once their arguments are checked: the model, Trainer's settings, evaluation
on held-out rows, and the run from its folder to its summary."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

import prompts
import rewards
from engine import models, templates
from engine.classifier import Classifier
from engine.engine import Engine
from evaluation import answer_spaces, predict, predictions, prompt_length, scores
from evaluation.predictions import Prediction
from machine import processes
from run import dashboards, prompt_record
from run.arguments import Arguments
from run.faults import Guard
from run.folder import data_hash, folder_of, open_run, write_summary
from run.history import before_after_table, evaluations, train_seconds
from run.progress import RunCallback, quiet_trainer
from run.stopping import StopCallback
from tasks import Task, own
from training.arguments import TrainArguments
from training.data import TaskData

EPISODES_PER_TASK = 2


def load_tokenizer(arguments: TrainArguments, data: list[TaskData]) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ModelError, also if labels that it must tell apart are spelled alike; says where
    labels cannot be spelled as they continue the opening tag. Fills in --max_prompt_length. Raises PromptError."""
    tokenizer = models.load_tokenizer(arguments.train_model_name, arguments.from_local, arguments.trust_remote_code)
    for part in data:
        if arguments.answer_space != "free":
            answer_spaces.label_trie(part.task, tokenizer)
        if notice := answer_spaces.spelling_notice(part.task, tokenizer):
            print(notice)
    templates.set_time(tokenizer, prompt_record.prompts_time(arguments.resume))
    if arguments.max_prompt_length is None:
        limit = prompt_length.limit_of(arguments, arguments.train_model_name)
        arguments.max_prompt_length = max(
            prompt_length.for_prompts(arguments, part.task, [*part.train, *part.held_out], tokenizer, limit)
            for part in data
        )
    return tokenizer


def build_prompts(
    arguments: TrainArguments, part: TaskData, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], int]:
    """The prompts of a task's training rows, and how many lost text, of the held-out rows' too. What TaskData has of
    prompts is filled in. Raises PromptError and ModelError."""
    lengths = dict(use_CoT=arguments.use_CoT, max_prompt_length=arguments.max_prompt_length)
    train, shortened = prompts.build_all(part.task, part.train, tokenizer, **lengths)
    part.held_out_prompts, shortened_too = prompts.build_all(part.task, part.held_out, tokenizer, **lengths)
    part.prompts_hash = prompt_record.hash_of(train, part.held_out_prompts)
    part.largest_token = answer_spaces.largest_token(part.task, tokenizer, [*train, *part.held_out_prompts])
    return train, shortened + shortened_too


def new_adapter(arguments: TrainArguments, model: PreTrainedModel) -> LoraConfig | None:
    """The adapter to train on a model; None for all weights. See models.lora_config_for."""
    if arguments.full_finetuning:
        model.requires_grad_(True)  # a merged adapter has left them frozen
        return None
    return models.lora_config_for(model, **arguments.lora)


def trainer_settings(arguments: TrainArguments, folder: Path, rows: int) -> dict:
    """What both scripts tell Trainer: fields of TrainingArguments, and those that both configurations add.

    rows: of the training set. A step takes `--batch_sentence_num` of them.
    """
    steps_per_epoch = rows // arguments.batch_sentence_num
    by_epochs = (arguments.end_epoch - arguments.start_epoch) * steps_per_epoch
    steps = min(arguments.max_steps or by_epochs, by_epochs)
    by_step = arguments.save_methods == "step"
    save_every = arguments.save_freq if by_step else arguments.checkpoint_rate * steps_per_epoch
    return dict(
        output_dir=str(folder),
        run_name=folder.name,
        seed=arguments.seed,
        dataloader_drop_last=True,
        max_steps=steps,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type=arguments.lr_scheduler,
        optim=arguments.optimizer,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        activation_checkpointing=bool(arguments.gradient_checkpointing),
        fp16=arguments.dtype == "float16",  # gradients are scaled, so that small ones are not lost
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
        save_methods=arguments.save_methods,
        epoch_offset=arguments.start_epoch,
        tokens_per_micro_batch=arguments.tokens_per_micro_batch,
    )


def task_options(folder: Path, data: list[TaskData]) -> dict[str, str]:
    """`--task` for these tasks; one of somebody's own is named by the file in the run's folder. A checkpoint of that
    one task alone needs no name."""
    files = [predictions_folder(part, data, folder) / own.FILE for part in data]
    if len(data) == 1 and files[0].is_file():
        return {}
    return {"task": ",".join(str(file) if file.is_file() else p.task.name for file, p in zip(files, data))}


def predictions_folder(part: TaskData, data: list[TaskData], folder: Path) -> Path:
    """Where the answers to a task's held-out rows are kept: of several tasks each has a folder inside the run's."""
    return folder / folder_of(part.task) if len(data) > 1 else folder


def episode(part: TaskData, i: int, prediction: Prediction) -> dict:
    """The answer to a task's held-out row i with its prompt, its reward and its row."""
    row = part.held_out[i]
    reward = rewards.reward(part.task, prediction.label, row["label"])
    return {
        "prompt": part.held_out_prompts[i],
        "answer": prediction.text,
        "reward": reward,
        "row": row,
        "task": part.task,
    }


class HeldOutEvaluation:
    """Called with an engine, it answers the held-out rows, keeps the answers in the run's folder, and scores them.

    The figures are the task's metrics; of several tasks each one's as <task>/<metric>, and the means of score and
    invalid_rate. `episodes` holds a few answers of the last call, as a terminal and the dashboards show them.
    """

    def __init__(
        self,
        arguments: TrainArguments,
        data: list[TaskData],
        folder: Path,
        strict_format: bool = False,
        answer: Callable[[Any, TaskData], list[Prediction]] | None = None,
        **how,
    ):
        """strict_format: see AnswerFormat. answer: answers the held-out rows in place of predict.predict.

        how: further arguments of predict.predict (temperature, seed).
        """
        self.reading = arguments.use_CoT, strict_format, arguments.number_answer  # options of AnswerFormat
        self.answer_space, self.max_response_length = arguments.answer_space, arguments.max_response_length
        self.data, self.folder, self.how = data, folder, how
        self.answer = answer or self._generate
        self.episodes: list[dict] = []

    def __call__(self, engine: Engine | Classifier) -> dict[str, float]:
        first, figures = not evaluations(self.folder), {}
        self.episodes.clear()
        for part in self.data:
            found = self.answer(engine, part)
            folder = predictions_folder(part, self.data, self.folder)
            predictions.write(folder, part.task, part.held_out, part.held_out_prompts, found, engine.tokenizer, first)
            self.episodes += [episode(part, i, prediction) for i, prediction in enumerate(found[:EPISODES_PER_TASK])]
            figures[part.task.name] = scores.score(part.task, part.held_out, found)
        if len(figures) == 1:
            return next(iter(figures.values()))
        means = {name: sum(f[name] for f in figures.values()) / len(figures) for name in ("score", "invalid_rate")}
        return means | {f"{task}/{name}": value for task, found in figures.items() for name, value in found.items()}

    def _generate(self, engine: Engine, part: TaskData) -> list[Prediction]:
        answer_format = answer_spaces.AnswerFormat(part.task, *self.reading)
        return predict.predict(
            engine, answer_format, part.held_out_prompts, self.answer_space, self.max_response_length, **self.how
        )


class TrainingRun:
    """One run of ppo.py, sft.py or classify.py: its folder, what shows and guards it, and its end.

    Attributes: `folder`, and `callbacks` for the trainer. Raises ArgumentError and CheckpointError (see open_run).
    """

    def __init__(
        self,
        method: str,
        arguments: TrainArguments,
        name: Task | str,
        data: list[TaskData],
        tokenizer: PreTrainedTokenizerBase,
        guard: Guard,
    ):
        """method: ppo, sft, head. name: the task, or one for several. guard: told where the run lies, and its end."""
        self.method, self.arguments, self.name, self.data, self.guard = method, arguments, name, data, guard
        self.train_rows = [row for part in data for row in part.train]
        held_out = [row for part in data for row in part.held_out]
        run = open_run(arguments, name, self.train_rows, held_out, arguments.learning_rate, self._prompts(tokenizer))
        self.folder = guard.folder = run.folder
        self.checkpoint = run.checkpoint
        if processes.is_main():
            for part in data:
                folder = predictions_folder(part, data, self.folder)
                folder.mkdir(exist_ok=True)
                own.keep_task(folder, part.task)
        guard.at_exit.append(lambda code: run.close())
        self.progress = RunCallback(self.folder, tokenizer, several=len(data) > 1)
        trackers = dashboards.wandb_callbacks(arguments.report_to, self.progress, method)
        guard.at_exit += [tracker.close for tracker in trackers]
        self.callbacks: list[TrainerCallback] = [StopCallback(guard), self.progress, *trackers]
        transformers.set_seed(arguments.seed)

    def _prompts(self, tokenizer: PreTrainedTokenizerBase) -> dict:
        """What run.json keeps of the prompts, if there are any."""
        time = getattr(tokenizer, "template_time", None)
        kept = {p.task.name: prompt_record.record(tokenizer, p.prompts_hash) for p in self.data if p.prompts_hash}
        return {prompt_record.TIME: time.isoformat(), prompt_record.PROMPTS: kept} if time and kept else {}

    def announce(self, shortened: int, how: str) -> None:
        """Say what is trained on what. shortened: prompts that lost text. how: the method's own settings."""
        arguments = self.arguments
        print(models.device_line(arguments.number_format))
        for part in self.data:
            print(f"{part.task.name}: {len(part.train)} training rows, {len(part.held_out)} held out")
        print(f"{shortened} prompts were shortened to {arguments.max_prompt_length} tokens.")
        print(
            f"{arguments.train_model_name}, {how}, {arguments.trained}, learning rate {arguments.learning_rate:g}; "
            f"the run lies in {self.folder}"
        )

    def save_start_adapter(self, checkpoint: Path) -> None:
        """Complete a checkpoint by the adapter that training began from, if there was one: whole weights hold it."""
        if not self.arguments.full_finetuning:
            models.save_start_adapter(self.arguments.train_model_name, self.arguments.from_local, checkpoint)

    def train(self, trainer) -> None:
        """Train from the start or from the run's last checkpoint; SystemExit if a signal ended it before its time.

        trainer: a RunTrainer.
        """
        quiet_trainer(trainer)
        self.progress.trainer = trainer
        trainer.at_once = self.guard.at_once
        if self.checkpoint:
            print(f"Going on from {self.checkpoint}")
        trainer.train_from(self.checkpoint)
        self.guard.end_training(trainer.state.global_step)

    def finish(self, trainer, samples_per_step: int, data_path: str, script: str = "inference.sh", **more) -> None:
        """Evaluate the last weights, write summary.json (with `more`), and say what came out and how to evaluate it.

        data_path: where the data lies, if not below data/. script: the one that evaluates best/.
        """
        step = trainer.state.global_step
        if processes.broadcast_from_main(lambda: evaluations(self.folder)[-1]["step"]) != step:
            trainer.evaluate()
        if not processes.is_main():
            return
        history = evaluations(self.folder)
        best = max(history, key=lambda moment: (moment["score"], moment["step"]))  # of equal ones the later, as best/
        moments = {"before": history[0], "after": history[-1], "best": best}
        write_summary(
            self.folder,
            self.method,
            self.data[0].task if len(self.data) == 1 else self.name,
            self.arguments,
            moments,
            step * samples_per_step,
            train_seconds(self.folder),
            data_hash=data_hash(self.train_rows),
            steps=step,
            best_step=best["step"],
            trained=self.arguments.trained,
            trained_weights=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            **more,
            **self._details(data_path),
        )
        print(before_after_table(moments))
        print(
            f"\nEverything lies in {self.folder}: best/ (the best checkpoint), predictions.jsonl, history.jsonl, "
            f"summary.json.\nEvaluate it:\n  bash scripts/{self._evaluation(data_path, script)}"
        )
        if best["step"] == 0 < step:
            print(
                f"Training did not help: every later score is below the {best['score']:.3f} of step 0, and best/ holds "
                "the model as it was then. Train for longer (--max_steps), or with another --learning_rate."
            )

    def _evaluation(self, data_path: str, script: str) -> str:
        """The command that evaluates best/ on the very rows that are held out here."""
        asked, given = getattr(self.arguments, "asked", {}), task_options(self.folder, self.data)
        given |= {"data_path": data_path} if data_path else {}
        given |= {"split": "validation"} if script == "classify.sh" or os.path.isfile(data_path) else {}
        given |= {"answer_space": self.arguments.answer_space} if script == "inference.sh" else {}
        for name in ("eval_size", "max_prompt_length", "use_CoT", "strict_format"):
            value, usual = asked.get(name), getattr(Arguments, name, False)
            given |= {name: value} if value not in (None, usual) else {}
        given |= {"from_local": True, "train_model_name": self.folder / "best"}
        return " ".join([script, *(f"--{name} {shlex.quote(str(value))}" for name, value in given.items())])

    def _details(self, data_path: str) -> dict:
        """Intervals and confusion counts of the last answers; of several tasks under `details`, by task."""
        found = {}
        for part in self.data:
            folder = predictions_folder(part, self.data, self.folder)
            found[part.task.name] = scores.details_from_file(folder, part.task, part.held_out, data_path)
        return found[self.data[0].task.name] if len(self.data) == 1 else {"details": found}
