"""What may be answered: the label trie, the targets that SFT learns, and when generation stops."""

from collections.abc import Callable
from dataclasses import dataclass

import prompts
import rewards
from engine.trees import Answer, LabelTrie
from machine.errors import ModelError
from tasks import Task


@dataclass(frozen=True)
class AnswerFormat:
    """How answers to a task are read: `rewards`' functions with the task and these two options.

    use_CoT: an analysis comes before the judgement. strict_format: only the closing tag ends an answer.
    """

    task: Task
    use_CoT: bool = False
    strict_format: bool = False

    @property
    def _options(self) -> dict[str, bool]:
        return {"strict_format": self.strict_format, "use_CoT": self.use_CoT}

    def parse(self, text: str, ended: bool = True) -> int | float | None:
        """The label in a text, None if there is none. ended: the model itself ended the text."""
        return rewards.parse(self.task, text, ended, **self._options)

    def is_complete(self, text: str) -> bool:
        """Whether the answer is there, and nothing that follows can change it."""
        return rewards.is_complete(self.task, text, **self._options)

    def is_hopeless(self, text: str) -> bool:
        """Whether no continuation of the text can be parsed any more."""
        return rewards.is_hopeless(self.task, text, **self._options)

    def label_length(self, text: str, ended: bool = True) -> int | None:
        """Characters of the text up to the end of its label; None where `parse` gives None."""
        return rewards.label_length(self.task, text, ended, **self._options)

    def is_correct(self, text: str, ended: bool, row: dict) -> bool:
        """Whether the label in the text is the row's. ValueError if the row has none."""
        return rewards.is_correct(self.task, self.parse(text, ended), row["label"])

    def stop_rule(self, early: bool = False) -> Callable[[str], bool]:
        """When generation may stop: the answer is complete, or (`early`, in training) it can never become valid."""
        return lambda text: self.is_complete(text) or (early and self.is_hopeless(text))


def label_trie(task: Task, tokenizer) -> LabelTrie:
    """The spellings of a task's words right after `<Judgement>`; ValueError if the task has no label set.

    Raises ModelError if the tokenizer spells two words alike (both as one unknown token), or one as nothing.
    """
    if not task.words:
        raise ValueError(f"--answer_space labels: {task.name} has no label set; use --answer_space free")
    spellings: dict[tuple[int, ...], str] = {}
    for word in task.words:
        spelling = tuple(tokenizer(word, add_special_tokens=False).input_ids)
        if spelling in spellings or not spelling:
            alike = f"like {spellings[spelling]!r}" if spelling else "as no token at all"
            raise ModelError(
                f"the model's tokenizer spells the label {word!r} of {task.name} {alike}, so the labels cannot be told "
                "apart; choose another model, or rename them in the data"
            )
        spellings[spelling] = word
    return LabelTrie([list(spelling) for spelling in spellings], tokenizer.eos_token_id)


def target_ids(task: Task, row: dict, tokenizer) -> list[int]:
    """What the model should write after `<Judgement>` for a labelled row: the label as `label_trie` spells it, the
    closing tag and end-of-sequence."""
    word = tokenizer(prompts.answer_word(task, row["label"]), add_special_tokens=False).input_ids
    whole = tokenizer(prompts.target(task, row), add_special_tokens=False).input_ids
    # A tokenizer may melt the word's end and the tag's beginning into one token; the label is then not what is read.
    if whole[: len(word)] != word:
        whole = word + tokenizer(rewards.JUDGEMENT_END, add_special_tokens=False).input_ids
    return [*whole, tokenizer.eos_token_id]


def label_of(task: Task, index: int) -> int | float:
    """The label that the task's word with this number stands for."""
    return float(task.words[index]) if task.number else index


def analysis_closed(text: str) -> bool:
    """The stop rule of a free analysis whose judgement will be masked."""
    return rewards.ANALYSIS_END in text


def judgement_link(tokenizer):
    """For `generate_then_classify`: the tokens between an answer's analysis and its label."""

    def link(answer: Answer) -> tuple[list[int], str]:
        text = ("" if analysis_closed(answer.text) else rewards.ANALYSIS_END) + "\n" + rewards.JUDGEMENT
        return tokenizer(text, add_special_tokens=False).input_ids, text

    return link
