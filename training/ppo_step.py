"""One PPO step: its rows and random stream, rewards, the updates on a rollout, and what it reports.

sampled_step.py and expected_step.py are the two kinds of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.trees import Tree
from machine import processes
from training import reward_functions

if TYPE_CHECKING:
    from training.ppo_task import PPOTask
    from training.ppo_trainer import PPOTrainer

KL_SHARE = 8  # one prompt in so many (at least one) has its KL measured when it is not part of the reward


def add(sums: dict, figures: dict) -> None:
    """Add figures to the sums under their names; tensors stay on their device, which need not be waited for."""
    for name, value in figures.items():
        sums[name] = sums.get(name, 0.0) + value


class Step:
    """One step of a PPOTrainer in this process.

    Attributes:
        task: whose rows these are.
        policy: over the task's answers.
        rows, prompts: this process's rows, and their token ids.
        row_offset: the first row's number among those of all processes.
        generator: of the draws of this step, the same in all processes.
        kl_coef, entropy_coef: of this step.
        metrics: what the dashboards show of the step.
        episodes: its answers, for people: prompt, answer, reward, row, task, and `extra` if there is any.
        extra: per completion that was judged, what reward functions said of it for people; empty if nothing.
    """

    def __init__(self, trainer: PPOTrainer, task: PPOTask, rows: list[dict]):
        self.trainer, self.args, self.engine = trainer, trainer.args, trainer.engine
        self.task, self.policy = task, task.policy
        self.rows, self.prompts = rows, [trainer.prompt_ids(row) for row in rows]
        self.row_offset = processes.number() * len(rows)
        self.generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + trainer.state.global_step)
        self.kl_coef, self.entropy_coef = trainer.kl_coef, trainer.entropy_coef
        self.metrics: dict[str, float] = {}
        self.episodes: list[dict] = []
        self.extra: list[dict] = []

    @property
    def measured(self) -> int:
        """For how many of the prompts here the reference is asked: all, or the first few of all processes."""
        if self.task.reference is None:
            return 0
        count = len(self.prompts)
        sample = max(1, count * processes.count() // KL_SHARE)
        return count if self.args.kl_coef else min(max(sample - self.row_offset, 0), count)

    def reference_states(self, trees: list[Tree]) -> list[torch.Tensor]:
        """The reference's states (nodes, hidden) for the prompts that are measured and their answers' trees."""
        reference = self.task.reference.engine
        reference.lasting_prefix = self.task.prefix
        return reference.states(self.prompts[: self.measured], trees, reference=reference is self.engine)

    def rewards(
        self, completions: list[str], completion_ids: list[list[int]], places: list[int], ended: list[bool]
    ) -> list[float]:
        """One reward per completion: the weighted sum over all reward functions that have an opinion of it, else 0.

        completion_ids: tokens. places: each completion's prompt, as a place in `prompts`. ended: by the model itself;
        a column beside those of the dataset. So is `task`, the task's name, where there are several. TrainingError for
        a function that fails (see reward_functions.ask).
        """
        trainer = self.trainer
        extra: dict[str, list] = {}
        metrics: dict[str, list[float]] = {}

        def log_extra(column: str, values: list) -> None:
            if len(values) != len(completions):
                raise ValueError(f"log_extra({column!r}) was given {len(values)} values for {len(completions)} answers")
            extra[column] = [value if isinstance(value, str | int | float | None) else str(value) for value in values]

        prompts = [trainer.prompt_text(row) for row in self.rows]
        columns = [name for name in self.rows[0] if name not in reward_functions.NOT_COLUMNS]
        given = {
            **{name: [self.rows[place][name] for place in places] for name in columns},
            "ended": ended,
            "prompts": [prompts[place] for place in places],
            "completions": completions,
            "completion_ids": completion_ids,
            "trainer_state": trainer.state,
            "log_extra": log_extra,
            "log_metric": lambda name, value: metrics.setdefault(name, []).append(float(value)),
        }
        if len(trainer.tasks) > 1:
            given["task"] = [self.task.name] * len(completions)
        found = reward_functions.ask(self.task.reward_funcs, given, trainer.named_failure)
        self.extra = [dict(zip(extra, values)) for values in zip(*extra.values())]
        self.log_means(metrics)
        totals = reward_functions.combine(found, trainer.reward_weights)
        if None in totals and not trainer.warned_of_abstention:
            trainer.warned_of_abstention = True
            text = completions[totals.index(None)]
            print(f"No reward function has an opinion of the answer {text!r}; such answers have a reward of 0.")
        return [0.0 if total is None else total for total in totals]

    def log_means(self, metrics: dict[str, list[float]]) -> None:
        """Log the means of what reward functions measured, over all processes."""
        parts = processes.all_gather([metrics]) if processes.count() > 1 else [metrics]
        for name in dict.fromkeys(name for part in parts for name in part):
            values = [value for part in parts for value in part.get(name, [])]
            self.metrics[f"objective/reward/{name}"] = sum(values) / len(values)

    def keep_episode(self, place: int, answer: str, reward: float, completion: int) -> None:
        """Keep an answer for people. place: its prompt's. completion: its number among those that `rewards` judged."""
        episode = {"prompt": self.prompts[place], "answer": answer, "reward": reward, "row": self.rows[place]}
        episode["task"] = self.task.answer_format.task
        extra = {"extra": self.extra[completion]} if self.extra else {}
        self.episodes.append(episode | extra)

    def is_correct(self, text: str, ended: bool, row: dict) -> bool | None:
        """Whether an answer gives the row's label; None for a row without one."""
        return None if row.get("label") is None else self.task.answer_format.is_correct(text, ended, row)

    def update(self, add_gradient: Callable[[list[int], list[int]], dict]) -> dict[str, float]:
        """Every update of every pass over the rollout: its gradient, summed over all processes, and an optimizer step.

        `add_gradient(mine, minibatch)` adds up the gradient of a minibatch and returns sums of figures. `minibatch` are
        its prompts, numbered over all processes, `mine` those that are here, as places in `prompts`. The last optimizer
        step is left to Trainer. An update that runs out of memory is begun again with smaller micro-batches. Returns
        the figures, summed over all updates and processes.
        """
        args, model, optimizer = self.args, self.trainer.model, self.trainer.optimizer
        count = len(self.prompts)
        everything = count * processes.count()
        size, total = everything // args.num_minibatches, args.ppo_epochs * args.num_minibatches
        shuffle = torch.Generator().manual_seed(self.generator.initial_seed())
        order: list[int] = []
        sums: dict = {}
        for number in range(total):
            if not order:
                order = list(range(everything))
                order = torch.randperm(everything, generator=shuffle).tolist() if total > 1 else order
            if number:
                clip_gradients(self.trainer)
                optimizer.step()
            minibatch, order = order[:size], order[size:]
            mine = [i - self.row_offset for i in minibatch if 0 <= i - self.row_offset < count]

            def from_zero(mine=mine, minibatch=minibatch) -> dict:
                model.zero_grad()
                return add_gradient(mine, minibatch)

            add(sums, self.engine.retry_with_smaller_batches(from_zero))
            processes.add_gradients(model.parameters())
        totals: dict = {}
        for part in processes.all_gather([{name: float(value) for name, value in sums.items()}]):
            add(totals, part)
        return totals

    def log(self, reward: torch.Tensor, spread: float, entropy: float, shares: dict[str, float], accuracy) -> None:
        """What both kinds of step report of all processes' answers. The KL is logged where it is measured.

        reward: one number per answer or prompt. spread: the rewards' standard deviation. shares: of each label word
        among the answers, and of `invalid` ones. accuracy: None where it is not known.
        """
        if accuracy is not None:
            self.metrics["objective/accuracy"] = accuracy
        self.metrics |= {
            "objective/invalid_rate": shares.get("invalid", 0.0),
            "objective/reward": float(reward.mean()),
            "objective/reward_std": spread,
            "objective/entropy": entropy,
            **{f"objective/share/{word}": share for word, share in shares.items()},
        }


def clip_gradients(trainer: PPOTrainer) -> torch.Tensor:
    """Clip policy and critic apart, so that a surprised critic does not shrink the policy's step. Returns the policy's
    norm before.

    A gradient that is not finite must stop the run before the weights change (TrainingError), so here a card is waited
    for, once per update. In float16, where gradients are scaled, it first makes the scale smaller, and the update is
    left out.
    """
    scaler = trainer.accelerator.scaler
    trainer.accelerator.unscale_gradients()  # float16's, and no others
    *policy, critic = trainer.optimizer.param_groups
    apart = [weight for group in policy for weight in group["params"]], critic["params"]
    norms = [nn.utils.clip_grad_norm_(weights, trainer.args.max_grad_norm) for weights in apart]
    for norm in torch.stack(norms).tolist():
        if not math.isfinite(norm):
            if scaler is not None and scaler.get_scale() > 1:
                return torch.zeros_like(norms[0])
            raise trainer.failure(f"the gradient is {norm}", "Lower --learning_rate")
    return norms[0]
