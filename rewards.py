"""From generated text to a label, and from a label to a reward.

There is one parser. Training rewards, evaluation metrics and early stopping all use it, so the reward is +1 if and only
if the metric counts the answer as correct.

The answer is the label word (or, for a number task, the plain decimal number) at the start of the judgement. White
space before it is ignored, case is ignored, and "_", "-" and " " inside a word are the same. The longest word wins.
A word counts only as a whole: followed by white space, punctuation or the end, never by a letter, digit, hyphen,
underscore or apostrophe. Such an answer is complete at

- punctuation right after the word ("<" included, so an answer is complete as soon as its closing tag begins),
- a line break, or the closing tag, with or without further words in between ("yes, it is", "yes it is</Judgement>"),
- the end of the sequence (`ended`).

An answer that could still grow into a longer one ("4." into "4.5", "not" into "not_entailment") is not complete until
the next character decides. A number is complete with its third decimal, and what follows is not read. With
`strict_format` only the word and its closing tag count, with nothing but white space between them.

Three properties hold for every text and are tested:

- `is_complete` is exactly "`parse` gives a label" for the same arguments;
- once complete, no continuation changes the label or its position;
- when `is_hopeless`, no continuation has a label; otherwise some continuation has one.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tasks import Task
from tasks.labels import fold, unit_of_number

JUDGEMENT = "<Judgement>"
JUDGEMENT_END = "</Judgement>"
ANALYSIS = "<Analysis>"
ANALYSIS_END = "</Analysis>"

LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines breaks
# Punctuation that joins words instead of ending them. U+FFFD is part of a character whose other bytes are to come.
JOINING = "-\u2010\u2011'\u2018\u2019`\u00b4\ufffd"
LINE_BREAK_OR_END = re.compile(f"[{LINE_BREAKS}]|{re.escape(JUDGEMENT_END)}")


@dataclass(frozen=True)
class _Numbers:
    """How the answers of a number task are written: with a minus only if its range has negative numbers."""

    number: re.Pattern
    prefix: re.Pattern  # what may become a number, and a longer one
    whole: re.Pattern  # a number with all its decimals
    low: float
    high: float


@lru_cache(maxsize=128)
def _numbers(words: tuple[str, ...]) -> _Numbers:
    """The same for all tasks with these words. At most three decimals, or as many as the words have: leaderboards take
    three, and a policy that may write more learns to, as they cost it nothing."""
    low, high = float(words[0]), float(words[-1])
    most, minus = max(3, len(words[0].partition(".")[2])), "-?" if low < 0 else ""
    return _Numbers(
        re.compile(rf"{minus}[0-9]+(?:\.[0-9]{{1,{most}}})?"),
        re.compile(rf"{minus}(?:[0-9]+(?:\.[0-9]{{0,{most - 1}}})?)?"),
        re.compile(rf"{minus}[0-9]+\.[0-9]{{{most}}}"),
        low,
        high,
    )


@lru_cache(maxsize=128)
def _folded(words: tuple[str, ...]) -> tuple[int, list[tuple[str, int]]]:
    """The longest word's length, and the folded words with their class ids, longest first."""
    folded = sorted(((fold(word), label) for label, word in enumerate(words)), key=lambda pair: -len(pair[0]))
    return max(map(len, words), default=0), folded


def _is_punctuation(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "PS" and category != "Pc" and character not in JOINING


def _judgement_start(text: str, use_CoT: bool) -> int | None:
    """Where the judgement's text begins; None while the analysis is still going on."""
    if not use_CoT:
        return 0
    analysis_end = text.find(ANALYSIS_END)
    tag = text.find(JUDGEMENT, analysis_end) if analysis_end >= 0 else -1
    return tag + len(JUDGEMENT) if tag >= 0 else None


def _whole_label(task: Task, text: str, start: int) -> tuple[int | float, int] | None:
    """The longest label that is a whole word at `start`, and where it ends."""
    if task.number:
        numbers = _numbers(task.words)
        number = numbers.number.match(text, start)
        found = [(min(max(float(number[0]), numbers.low), numbers.high), number.end())] if number else []
    else:
        longest, words = _folded(task.words)
        head = fold(text[start : start + longest])
        found = [(label, start + len(word)) for word, label in words if head.startswith(word)]
    for label, end in found:
        if end == len(text) or text[end].isspace() or _is_punctuation(text[end]) or _decided(task, text, start, end):
            return label, end
    return None


def _decided(task: Task, text: str, start: int, end: int) -> bool:
    """Whether nothing that follows can change the label: it is a number with all its decimals."""
    return task.number and _numbers(task.words).whole.fullmatch(text, start, end) is not None


def _may_grow(task: Task, text: str, start: int) -> bool:
    """Whether everything from `start` on is the beginning of a label (the empty text is)."""
    if task.number:
        return _numbers(task.words).prefix.fullmatch(text, start) is not None
    longest, words = _folded(task.words)
    if len(text) - start > longest:
        return False
    head = fold(text[start:])
    return any(word.startswith(head) for word, _ in words)


def _read(
    task: Task, text: str, ended: bool, strict_format: bool, use_CoT: bool
) -> tuple[int | float | None, int | None, bool]:
    """The label, the position where its word ends, and whether no continuation can have a label."""
    if not ended:
        text = text.rstrip("\ufffd")  # not yet decided which characters these are
    start = _judgement_start(text, use_CoT)
    if start is None:
        return None, None, ended
    start = len(text) - len(text[start:].lstrip())
    whole = _whole_label(task, text, start)
    may_grow = not ended and _may_grow(task, text, start)
    if whole is None:
        return None, None, not may_grow
    label, end = whole
    if strict_format:
        rest = text[end:].lstrip()
        complete = rest.startswith(JUDGEMENT_END)
        hopeless = not complete and (ended or not (may_grow or JUDGEMENT_END.startswith(rest)))
    else:
        punctuated = end < len(text) and _is_punctuation(text[end])
        settled = punctuated or _decided(task, text, start, end) or LINE_BREAK_OR_END.search(text, end) is not None
        complete = ended or (not may_grow and settled)
        hopeless = False
    return (label, end, False) if complete else (None, None, hopeless)


def parse(
    task: Task, text: str, ended: bool = True, strict_format: bool = False, use_CoT: bool = False
) -> int | float | None:
    """The answer in `text`: a class id, a number in its range for a number task, or None if there is no valid answer.

    `text` is what the model generated after `<Judgement>`, or with `use_CoT` after `<Analysis>`: the judgement then
    starts at the first `<Judgement>` after `</Analysis>`. `ended` says that the model itself ended the sequence; a
    text that was cut off counts only if its answer is already complete. Never raises, whatever the text.
    """
    return _read(task, text, ended, strict_format, use_CoT)[0]


def is_complete(task: Task, text: str, ended: bool = False, strict_format: bool = False, use_CoT: bool = False) -> bool:
    """Whether there is an answer that nothing generated after it can change: generation may stop."""
    return parse(task, text, ended, strict_format, use_CoT) is not None


def is_hopeless(task: Task, text: str, ended: bool = False, strict_format: bool = False, use_CoT: bool = False) -> bool:
    """Whether no continuation of `text` can be parsed; a training episode may end here."""
    return _read(task, text, ended, strict_format, use_CoT)[2]


def label_length(
    task: Task, text: str, ended: bool = True, strict_format: bool = False, use_CoT: bool = False
) -> int | None:
    """Characters of `text` up to the end of the answer's word; None where `parse` gives None.

    The token that holds the last of them is the one that earned the reward for correctness.
    """
    return _read(task, text, ended, strict_format, use_CoT)[1]


def is_correct(task: Task, label: int | float | None, gold: int | float) -> bool:
    """Whether a parsed answer equals the gold label, numbers included. ValueError if the row has no gold label."""
    if gold is None:
        raise ValueError(f"{task.name}: a row without a gold label has no reward; use a labelled split")
    return label is not None and label == gold


def reward(
    task: Task,
    label: int | float | None,
    gold: int | float,
    correct: float = 1.0,
    wrong: float = -1.0,
    invalid: float = -3.0,
    number_correct: float = 2.5,
) -> float:
    """The reward of a parsed answer: `correct`, `wrong` or `invalid` (https://arxiv.org/abs/2410.11020).

    For a number task it is `number_correct` - |label - gold|, the distance in fifths of the task's range, and
    -`number_correct` without a number. ValueError if the row has no gold label.
    """
    hit = is_correct(task, label, gold)
    if task.number:
        return number_correct - abs(label - gold) / unit_of_number(task) if label is not None else -number_correct
    return invalid if label is None else correct if hit else wrong


def reward_function(
    task: Task,
    correct: float = 1.0,
    wrong: float = -1.0,
    invalid: float = -3.0,
    number_correct: float = 2.5,
    strict_format: bool = False,
    use_CoT: bool = False,
) -> Callable[..., list[float]]:
    """`reward` with the signature of TRL's reward functions, for PPOTrainer, trl.GRPOTrainer and trl.RLOOTrainer.

    The function takes `completions` (strings, or conversations of {"role", "content"} whose last message is the answer)
    and the dataset's `label` column, and returns one float per completion. An optional column `ended` (a bool for each)
    says which completions the model itself ended; the default is all. A conversational completion may begin with the
    tag that its prompt began the assistant's turn with; the tag is removed.
    """
    opening = ANALYSIS if use_CoT else JUDGEMENT

    def label_reward(
        completions: Sequence, label: Sequence, ended: Sequence[bool] | None = None, **columns
    ) -> list[float]:
        if ended is None:
            ended = [True] * len(completions)
        rewards = []
        for completion, gold, done in zip(completions, label, ended, strict=True):
            text = completion if isinstance(completion, str) else completion[-1]["content"].removeprefix(opening)
            answer = parse(task, text, done, strict_format, use_CoT)
            rewards.append(reward(task, answer, gold, correct, wrong, invalid, number_correct))
        return rewards

    return label_reward
