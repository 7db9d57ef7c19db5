"""transformers.Trainer for a classification head, with the evaluation and the checkpoints of ppo.py and sft.py."""

import time
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy, mse_loss
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from engine.classifier import Classifier
from machine import memory, processes
from training.run_trainer import RunTrainer
from training.sampler import StratifiedSampler


@dataclass
class HeadConfig(TrainingArguments):
    """TrainingArguments, and how checkpoints are named."""

    save_methods: str = field(default="step", metadata={"help": "step or epoch"})
    epoch_offset: int = field(default=0, metadata={"help": "number of the first epoch"})
    tokens_per_micro_batch: int | None = field(default=None, metadata={"help": "tokens per forward pass"})


def micro_batch(batch: int, longest: int, tokens: int) -> int:
    """Rows per forward pass: the largest divisor of a batch so that even the longest rows take at most `tokens`."""
    return next(size for size in range(batch, 0, -1) if batch % size == 0 and (size == 1 or size * longest <= tokens))


class HeadTrainer(RunTrainer, Trainer):
    """Cross-entropy of a row's class, or the squared error of its number, averaged over the rows of a step.

    train_dataset: what classifying.build_inputs gives, with `labels` (class ids; floats for a number).
    """

    def __init__(
        self, classifier: Classifier, args: HeadConfig, train_dataset: list[dict], evaluate_with, on_save, callbacks
    ):
        args.remove_unused_columns = False
        args._n_gpu = min(args.n_gpu, 1)  # one process drives one card; several cards take several processes
        super().__init__(
            model=classifier.model,
            args=args,
            data_collator=DataCollatorWithPadding(classifier.tokenizer),
            train_dataset=train_dataset,
            eval_dataset=train_dataset[:1],  # Trainer wants one; `evaluation` has the rows
            processing_class=classifier.tokenizer,
            compute_loss_func=self._loss,
            callbacks=callbacks,
        )
        self.engine, self.evaluation, self.on_save = classifier, evaluate_with, on_save
        self.episodes: list[dict] = []  # of the last evaluation
        self.number = isinstance(train_dataset[0]["labels"], float)
        self.correct = self.rows = 0  # of this step, in this process
        self.started = 0.0

    def _loss(self, outputs, labels: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """A micro-batch's part of the mean over the step's rows (num_items_in_batch, of all processes)."""
        logits = outputs.logits.float()  # (rows, labels)
        self.rows += len(labels)
        if self.number:
            return mse_loss(logits[:, 0], labels.float(), reduction="sum") / num_items_in_batch
        self.correct += int((logits.argmax(-1) == labels).sum())
        return cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.started = self.started or time.perf_counter()
        with self.enough_memory("Lower --tokens_per_micro_batch or --max_prompt_length"):
            try:
                loss = super().training_step(model, inputs, num_items_in_batch)
            except RuntimeError as error:
                if not memory.ran_out(error):
                    raise
                raise MemoryError(f"out of memory ({str(error).splitlines()[0][:100]})") from error
        if not torch.isfinite(loss):
            raise self.failure(f"the loss is {float(loss)}", "Lower --learning_rate")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's figures under the names of the dashboards."""
        if "loss" in logs:
            correct, rows = map(sum, zip(*processes.all_gather([(self.correct, self.rows)])))
            logs = {
                "train/loss": logs["loss"],
                "train/learning_rate": logs["learning_rate"],
                "train/grad_norm": logs.get("grad_norm", 0.0),
                **({} if self.number else {"train/accuracy": correct / rows}),
                "time/seconds_per_step": time.perf_counter() - self.started,
                **self.so_far(),
            }
            self.correct = self.rows = 0
            self.started = 0.0
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        labels = [round(row["labels"]) for row in self.train_dataset]
        rows = len(labels) // self.samples_per_step * self.samples_per_step  # whole steps only
        first = self.args.seed + self.args.epoch_offset  # epoch n has one order, whichever run it is in
        return StratifiedSampler(labels, first, rows)

    @property
    def samples_per_step(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes.count()
