"""What may be answered: the label trie, the targets that SFT learns, and when generation stops."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import prompts
import rewards
from engine.tokens import encode_part
from engine.trees import Answer, LabelTrie
from machine.errors import ModelError
from tasks import Task


@dataclass(frozen=True)
class AnswerFormat:
    """How answers to a task are read: `rewards`' functions with the task and two options; and what a distribution over
    a number task's numbers answers.

    use_CoT: an analysis comes before the judgement. strict_format: only the closing tag ends an answer. number_answer:
    "mean": the mean of the numbers; else the number that was chosen.
    """

    task: Task
    use_CoT: bool = False
    strict_format: bool = False
    number_answer: str = ""

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


@dataclass(frozen=True)
class Spelling:
    """Words as the model writes them right after `<Judgement>`, and the closing tag as it follows every one of them.

    apart: a token of this tokenizer spans a word and a tag, so words or the closing tag are spelled by themselves.
    """

    words: tuple[tuple[int, ...], ...]  # token ids
    closing: tuple[int, ...]
    apart: bool


@functools.lru_cache(maxsize=64)
def spell(words: tuple[str, ...], tokenizer) -> Spelling:
    """The one spelling of words for the label trie, for scores, SFT's targets and the entropy bonus.

    A word is spelled as it continues the tag: a sentencepiece tokenizer has another token for "yes" at the start of a
    text ("▁yes") than for "yes" after ">", and the demonstrations and free answers are written with the latter.
    """

    def ids(text: str) -> list[int]:
        return encode_part(tokenizer, text)

    def after(context: str, text: str) -> list[int] | None:
        before, both = ids(context), ids(context + text)
        # Nothing new: word and tag are one token, an unknown one as a rule.
        return both[len(before) :] or None if both[: len(before)] == before else None

    opening, closing = rewards.JUDGEMENT, rewards.JUDGEMENT_END
    found = [after(opening, word) for word in words]
    apart = None in found
    if apart:
        found = [ids(word) for word in words]
    context = "" if apart else opening
    closings = {tuple(after(context + word, closing) or ()) for word in words}
    if len(closings) > 1 or () in closings:
        apart, closings = True, {tuple(ids(closing))}
    return Spelling(tuple(map(tuple, found)), closings.pop(), apart)


def spelling_notice(task: Task, tokenizer) -> str:
    """A line for people where the spelling in context is not to be had; else empty."""
    if not (task.words and spell(task.words, tokenizer).apart):
        return ""
    return (
        f"A token of this model spans a tag and a label of {task.name}: labels and tags are spelled apart, in training "
        "and in evaluation alike."
    )


def label_trie(task: Task, tokenizer) -> LabelTrie:
    """The spellings of a task's words right after `<Judgement>`; ValueError if the task has no label set.

    Where a label begins another, the closing tag tells them apart. Raises ModelError if the tokenizer spells two words
    alike (both as one unknown token), or one as nothing.
    """
    if not task.words:
        raise ValueError(f"--answer_space labels: {task.name} has no label set; use --answer_space free")
    spelling = spell(task.words, tokenizer)
    known: dict[tuple[int, ...], str] = {}
    for word, tokens in zip(task.words, spelling.words):
        if tokens in known or not tokens:
            alike = f"like {known[tokens]!r}" if tokens else "as no token at all"
            raise ModelError(
                f"the model's tokenizer spells the label {word!r} of {task.name} {alike}, so the labels cannot be told "
                "apart; choose another model, or rename them in the data"
            )
        known[tokens] = word
    return LabelTrie([list(tokens) for tokens in spelling.words], spelling.closing[0])


def target_ids(task: Task, row: dict, tokenizer) -> list[int]:
    """What the model should write after `<Judgement>` for a labelled row: the label as `label_trie` spells it, the
    closing tag and end-of-sequence."""
    word = prompts.answer_word(task, row["label"])
    words = task.words if word in task.words else (word,)  # of a number task not every number is listed
    spelling = spell(words, tokenizer)
    return [*spelling.words[words.index(word)], *spelling.closing, tokenizer.eos_token_id]


def largest_token(task: Task, tokenizer, prompts: Iterable[Sequence[int]]) -> int:
    """The largest token id in these prompts and in what may be answered: the model must have as many embeddings."""
    spelling = spell(task.words, tokenizer) if task.words else Spelling((), (), False)
    return max(tokenizer.eos_token_id, *(max(ids, default=0) for ids in (*prompts, *spelling.words, spelling.closing)))


def label_of(task: Task, index: int) -> int | float:
    """The label that the task's word with this number stands for."""
    return float(task.words[index]) if task.number else index


def mean_number(task: Task, probabilities: Sequence[float]) -> float:
    """The mean of a number task's numbers under (labels,) probabilities, or weights, of its words.

    It minimises the expected squared error (https://arxiv.org/abs/2403.04182).
    """
    return math.fsum(p * float(word) for p, word in zip(probabilities, task.words, strict=True)) / math.fsum(
        probabilities
    )


def analysis_closed(text: str) -> bool:
    """The stop rule of a free analysis whose judgement will be masked."""
    return rewards.ANALYSIS_END in text


def judgement_link(tokenizer):
    """For `generate_then_classify`: the tokens between an answer's analysis and its label."""

    def link(answer: Answer) -> tuple[list[int], str]:
        text = ("" if analysis_closed(answer.text) else rewards.ANALYSIS_END) + "\n" + rewards.JUDGEMENT
        return encode_part(tokenizer, text), text

    return link
