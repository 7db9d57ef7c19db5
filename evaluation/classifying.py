"""Rows as a classification head reads them, and its logits as the answers that all methods give.

A head reads the row's texts and nothing else: no instruction, question or chat template. One text stands alone. Two are
a pair as the tokenizer joins pairs, where it has a separator (encoders); other tokenizers, and three or more texts, get
lines of the form "name: text".
"""

import re

import torch

import prompts
from engine.classifier import Classifier
from evaluation.predictions import Prediction
from machine import processes
from tasks import Task
from tasks.labels import exact_text, number_range, to_units, unit_of_number


def build_inputs(
    task: Task, rows: list[dict], tokenizer, max_prompt_length: int
) -> tuple[list[dict[str, list[int]]], int]:
    """What the tokenizer makes of every row (input_ids, attention_mask, ...), and how many rows lost text.

    Of too long a row only the passage is shortened, as in a prompt. Raises PromptError.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - {""}
    marks = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
    texts_of_rows = [prompts.row_texts(task, row, marks) for row in rows]

    def encode(texts_of_rows: list[dict[str, str]]):
        return tokenizer(*zip(*(layout(texts, tokenizer) for texts in texts_of_rows)))

    def tokenize(texts_of_rows: list[dict[str, str]]) -> list[list[int]]:
        ids = []
        for start in range(0, len(texts_of_rows), prompts.TOKENIZED_AT_ONCE):
            ids += encode(texts_of_rows[start : start + prompts.TOKENIZED_AT_ONCE]).input_ids
        return ids

    _, shortened = prompts.fit(task, rows, texts_of_rows, tokenize, tokenizer, max_prompt_length)
    inputs = []
    for start in range(0, len(rows), prompts.TOKENIZED_AT_ONCE):
        batch = encode(texts_of_rows[start : start + prompts.TOKENIZED_AT_ONCE])
        inputs += [dict(zip(batch, columns)) for columns in zip(*batch.values())]
    if not any(any(row.get("token_type_ids", ())) for row in inputs):
        # All 0 is what models assume; some tokenizers give them to models that know no types.
        inputs = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in inputs]
    for row in inputs:
        if not row["input_ids"]:  # an empty text, and a tokenizer that adds nothing: a model must read something
            row |= {"input_ids": [tokenizer.pad_token_id], "attention_mask": [1]}
    return inputs, shortened


def layout(texts: dict[str, str], tokenizer) -> tuple[str, ...]:
    """A row's texts as what the tokenizer is called with: one text, or a pair."""
    single, pair = (tokenizer.num_special_tokens_to_add(pair) for pair in (False, True))
    if len(texts) == 1 or (len(texts) == 2 and tokenizer.sep_token_id is not None and pair > single):
        return tuple(texts.values())
    return ("\n".join(f"{name}: {text}" for name, text in texts.items()),)


def target(task: Task, row: dict) -> int | float:
    """What the head learns of a labelled row: the class id, or the number in fifths of the task's range."""
    return to_units(task, row["label"]) if task.number else row["label"]


def predict(classifier: Classifier, task: Task, inputs: list[dict[str, list[int]]]) -> list[Prediction]:
    """One answer for each row: its likeliest class, or its number. Each process answers its share; all get all."""
    mine = inputs[processes.share(len(inputs))]
    return processes.all_gather(as_predictions(task, classifier.logits(mine)) if mine else [])


def as_predictions(task: Task, logits: torch.Tensor) -> list[Prediction]:
    """(rows, labels) logits as answers. A number, in fifths of the task's range, is clipped to that."""
    if task.number:
        low, unit = number_range(task)[0], unit_of_number(task)
        texts = [exact_text(task, low + unit * number) for number in logits[:, 0].clamp(0, 5).tolist()]
        return [Prediction(text, float(text)) for text in texts]
    chances = torch.softmax(logits, dim=-1)
    return [
        Prediction(task.words[label], label, last, row)
        for label, last, row in zip(chances.argmax(-1).tolist(), chances[:, -1].tolist(), chances.numpy())
    ]
