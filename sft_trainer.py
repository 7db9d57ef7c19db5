"""SFTTrainer with the evaluation, the checkpoints and the names of figures that ppo.py's trainer has."""

import time
from dataclasses import dataclass, field

import torch
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from checkpoints import RunTrainer, TrainingError
from engine import Engine


@dataclass
class RunConfig(SFTConfig):
    """SFTConfig, and how checkpoints are named."""

    save_methods: str = field(default="step", metadata={"help": "step or epoch"})
    epoch_offset: int = field(default=0, metadata={"help": "number of the first epoch"})


class Finetuner(RunTrainer, SFTTrainer):
    """SFTTrainer with the evaluation, the checkpoints and the names of figures that ppo.py has."""

    def __init__(self, *args, evaluate_with, on_save, **kwargs):
        super().__init__(*args, **kwargs)
        self.evaluation, self.on_save = evaluate_with, on_save
        self.engine = Engine(self.model, self.processing_class)
        self.episodes: list[dict] = []  # of the last evaluation
        self.started = 0.0

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.started = self.started or time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1}; {self._last_checkpoint_text()}. "
                "Lower --learning_rate"
            )
        return loss

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
            }
            self._metrics["train"].clear()
            self.started = 0.0
        Trainer.log(self, logs, start_time)
