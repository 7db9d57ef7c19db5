"""What may be answered: the label trie, the targets that SFT learns, and when generation stops."""

import prompts
import rewards
from engine.trees import Answer, LabelTrie
from machine.errors import ModelError
from tasks import Task

ANSWER_SPACES = ("labels", "free", "score")


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


def stop_rule(task: Task, use_CoT: bool = False, strict_format: bool = False, early: bool = False):
    """When to stop generating a free answer: it is complete, or (`early`, in training) it can never parse any more."""

    def stop(text: str) -> bool:
        return rewards.is_complete(task, text, strict_format=strict_format, use_CoT=use_CoT) or (
            early and rewards.is_hopeless(task, text, strict_format=strict_format, use_CoT=use_CoT)
        )

    return stop


def analysis_closed(text: str) -> bool:
    """The stop rule of a free analysis whose judgement will be masked."""
    return rewards.ANALYSIS_END in text


def judgement_link(tokenizer):
    """For `Engine.generate_then_classify`: the tokens between an answer's analysis and its label."""

    def link(answer: Answer) -> tuple[list[int], str]:
        text = ("" if analysis_closed(answer.text) else rewards.ANALYSIS_END) + "\n" + rewards.JUDGEMENT
        return tokenizer(text, add_special_tokens=False).input_ids, text

    return link
