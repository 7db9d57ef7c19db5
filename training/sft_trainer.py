"""SFTTrainer with the evaluation, the checkpoints and the names of figures that ppo.py's trainer has.

Where the loss is on the answers alone, the engine computes the forward: the prompts' common prefix goes through the
network once per step, and the rows in micro-batches cut by tokens. Loss and gradient equal SFTTrainer's (tested).
"""

import time
from dataclasses import dataclass, field

import torch
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from engine.engine import Engine
from engine.trees import Tree
from machine import processes
from machine.memory import training_token_budget
from training.run_trainer import RunTrainer

IGNORED = -100  # label of a token without loss


@dataclass
class RunConfig(SFTConfig):
    """SFTConfig, how checkpoints are named, and whether the engine's forward is used."""

    save_methods: str = field(default="step", metadata={"help": "step or epoch"})
    epoch_offset: int = field(default=0, metadata={"help": "number of the first epoch"})
    shared_prefix: bool = field(default=False, metadata={"help": "rows are a prompt without loss, then an answer"})
    tokens_per_micro_batch: int | None = field(default=None, metadata={"help": "of the engine; None: by free memory"})


class Finetuner(RunTrainer, SFTTrainer):
    """SFTTrainer with the evaluation, the checkpoints and the names of figures that ppo.py has.

    Args (all others are SFTTrainer's):
        evaluate_with: `(engine) -> dict` of held-out figures, whose `score` decides what is best.
        on_save: called with every checkpoint's folder before it counts as written.
        engine: that of the model, as engine.loading gives it; None: a new one.
    """

    def __init__(self, *args, evaluate_with, on_save, engine: Engine | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.evaluation, self.on_save = evaluate_with, on_save
        tokens = self.args.tokens_per_micro_batch or training_token_budget(self.model)
        self.engine = engine or Engine(self.model, self.processing_class)
        self.engine.start_training(self.model, tokens)
        self.episodes: list[dict] = []  # of the last evaluation
        self.started: float | None = None  # when the step's first micro-batch began

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.started = self.started or time.perf_counter()
        if self.args.shared_prefix:
            with self.enough_memory("Lower --max_prompt_length"):
                loss = self._shared_step(inputs)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self.failure(f"the loss is {float(loss)}", "Lower --learning_rate")
        return loss

    def _shared_step(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of the answers' tokens, its gradient added to the weights'. Inputs (batch, tokens)."""
        self.model.train()
        prompts, answers = prompts_and_answers(inputs)
        total = sum(processes.all_gather([sum(map(len, answers))]))  # answer tokens of all processes

        def from_zero() -> torch.Tensor:
            # No collective in here: a process that runs out of memory begins again alone.
            self.model.zero_grad()
            return self._add_gradient(prompts, answers, total)

        sums = self.engine.retry_with_smaller_batches(from_zero)
        processes.add_gradients(self.model.parameters())
        loss, correct, entropy = (sum(part) for part in zip(*processes.all_gather([tuple(sums.tolist())])))
        self._metrics["train"]["mean_token_accuracy"].append(correct / total)
        self._metrics["train"]["entropy"].append(entropy / total)
        return torch.tensor(loss, device=self.args.device)

    def _add_gradient(self, prompts: list[list[int]], answers: list[list[int]], total: int) -> torch.Tensor:
        """The gradient of these rows' share of a mean over `total` tokens. Returns (3,): loss, correct tokens and
        entropy, summed."""
        # Node t of a row's tree is the state after t tokens of its answer, and predicts the next one.
        trees = [Tree([-1, *a[:-1]], [*range(-1, len(a) - 1)], [*range(len(a))]) for a in answers]
        sums = torch.zeros(3, device=self.args.device)
        for rows, states in self.engine.training_batches(prompts, trees):
            positions = [(line, t) for line, row in enumerate(rows) for t in range(len(answers[row]))]
            line, node = (torch.tensor(numbers, device=states.device) for numbers in zip(*positions))
            gold = torch.tensor([token for row in rows for token in answers[row]], device=states.device)
            log_probs = torch.log_softmax(self.engine.logits(states[line, node]), dim=-1)  # (tokens, vocabulary)
            loss = torch.nn.functional.nll_loss(log_probs, gold, reduction="sum") / total
            self.accelerator.backward(loss)
            with torch.no_grad():
                correct = (log_probs.argmax(-1) == gold).sum()
                sums += torch.stack([loss, correct, -(log_probs.exp() * log_probs).sum()])
        return sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's and SFTTrainer's figures under the names of the dashboards."""
        if "loss" in logs:
            inner = {name: sum(values) / len(values) for name, values in self._metrics["train"].items() if values}
            logs = {
                "train/loss": logs["loss"],
                "train/learning_rate": logs["learning_rate"],
                "train/grad_norm": logs.get("grad_norm", 0.0),
                "train/token_accuracy": inner["mean_token_accuracy"],
                "train/entropy": inner["entropy"],
                "time/seconds_per_step": time.perf_counter() - self.started,
                **self.so_far(),
            }
            self._metrics["train"].clear()
            self.started = None
        Trainer.log(self, logs, start_time)

    @property
    def samples_per_step(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes.count()


def prompts_and_answers(inputs: dict[str, torch.Tensor]) -> tuple[list[list[int]], list[list[int]]]:
    """(batch, tokens) input_ids, labels and attention_mask -> token ids of each row's prompt and answer. The labels are
    the answer's, which is what the row ends with."""
    prompts, answers = [], []
    for ids, labels, mask in zip(*(inputs[name].cpu() for name in ("input_ids", "labels", "attention_mask"))):
        ids, size = ids[mask.bool()].tolist(), int((labels != IGNORED).sum())
        prompts.append(ids[:-size])
        answers.append(ids[-size:])
    return prompts, answers
