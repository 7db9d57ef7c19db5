"""What a PPO step takes from its task: the rows, how answers are read and judged, the policy over the task's answers,
and the prefix that its prompts share. One policy may learn several tasks; a step has rows of one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from engine.batches import common_prefix
from engine.engine import Engine, LastingPrefix
from engine.tokens import encode_part
from engine.trees import LabelTrie
from evaluation.answer_spaces import AnswerFormat, label_trie
from machine.errors import ModelError
from rewards import JUDGEMENT_END
from tasks import Task
from training.policy import Policy

if TYPE_CHECKING:
    from training.ppo_trainer import PPOTrainer

Rewards = Callable | Sequence[Callable]


@dataclass
class PPOTask:
    """One task of a PPOTrainer. Its policy and prefix are there once `start` was called.

    Attributes:
        name: the task's, as the dashboards show it.
        rows: to train on; see PPOTrainer's `train_dataset`.
        label_texts: every label as the rewards judge it, with its closing tag; label_ids: their tokens.
        policy: over the task's answers, on the one model in training.
        reference: the same on the reference; None: there is none.
        prefix: the tokens that all its prompts begin with.
    """

    name: str
    answer_format: AnswerFormat
    reward_funcs: list[Callable]
    rows: Sequence[dict]

    def start(self, trainer: PPOTrainer, reference: Engine | None) -> None:
        """Take the trainer's model, engine and tokenizer, and the engine of its reference. Raises ModelError if the
        tokenizer spells labels alike that must be told apart."""
        args, tokenizer = trainer.args, trainer.processing_class
        masked = args.answer_space == "labels"
        self.prefix = LastingPrefix(common_prefix([trainer.prompt_ids(row) for row in self.rows]))
        self.label_ids = [encode_part(tokenizer, text) for text in self.label_texts]
        self.policy = Policy(
            trainer.engine,
            trainer.model.value_head,
            args.temperature,
            labels=known_labels(self.answer_format.task, tokenizer, needed=masked),
            masked=masked,
            use_CoT=self.answer_format.use_CoT,
        )
        self.reference = reference and copy.copy(self.policy)
        if self.reference is not None:
            self.reference.engine = reference

    @property
    def label_words(self) -> tuple[str, ...]:
        return self.answer_format.task.words

    @property
    def label_texts(self) -> tuple[str, ...]:
        return tuple(word + JUDGEMENT_END for word in self.label_words)


def ppo_tasks(
    answer_format: AnswerFormat | dict[str, AnswerFormat],
    reward_funcs: Rewards | dict[str, Rewards],
    train_dataset: Sequence[dict] | dict[str, Sequence[dict]],
) -> list[PPOTask]:
    """The tasks of a trainer, from its arguments of these names. ValueError if not all three are of the same tasks."""
    if not isinstance(answer_format, dict):
        name = answer_format.task.name
        answer_format, reward_funcs, train_dataset = (
            {name: given} for given in (answer_format, reward_funcs, train_dataset)
        )
    given: tuple[Any, ...] = (answer_format, reward_funcs, train_dataset)
    if not all(isinstance(x, dict) and x.keys() == answer_format.keys() for x in given):
        raise ValueError(
            "answer_format, reward_funcs and train_dataset must be of one task, or dicts of the same tasks"
        )
    functions = {name: [f] if callable(f) else list(f) for name, f in reward_funcs.items()}
    return [PPOTask(name, answer_format[name], functions[name], train_dataset[name]) for name in answer_format]


def known_labels(task: Task, tokenizer: PreTrainedTokenizerBase, needed: bool) -> LabelTrie | None:
    """The task's labels as a trie; None if they cannot be told apart and are not `needed`, else ModelError."""
    try:
        return label_trie(task, tokenizer)
    except (ModelError, ValueError):
        if needed:
            raise
        return None
