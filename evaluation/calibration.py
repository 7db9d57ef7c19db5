"""Label probabilities corrected for what a prompt favours whatever its row says (docs/prompting.md).

A correction divides every label's probability by a prior, what the prompt gives it without a row's evidence:

- contextual: the mean over content-free inputs (https://arxiv.org/abs/2102.09690, with W = diag(prior)^-1)
- pmi: that of empty texts, of likelihoods among all tokens (domain-conditional PMI, https://arxiv.org/abs/2104.08315)
- batch: the mean over all answered rows (https://arxiv.org/abs/2309.17249)
"""

from collections.abc import Callable

import numpy as np

import prompts
from engine.batches import common_prefix
from engine.engine import Engine
from evaluation import predict
from evaluation.answer_spaces import AnswerFormat
from evaluation.predictions import Prediction

CONTENT_FREE = {"contextual": ("N/A", "", "[MASK]"), "pmi": ("",)}  # what stands in every field of the prompt


def prior_of(
    kind: str,
    engine: Engine,
    answer_format: AnswerFormat,
    shots: list[list[dict]],
    answer_space: str,
    max_prompt_length: int,
) -> Callable[[np.ndarray], np.ndarray]:
    """(rows, labels) probabilities of all rows -> the prior that `--calibration` `kind` divides them by, (labels,), or
    (rows, labels) if the rows have demonstrations of their own.

    shots: every row's demonstrations; they stand in the content-free prompts too. Raises PromptError.
    """
    if kind == "batch":
        return lambda probabilities: probabilities.mean(axis=0)
    task = answer_format.task
    rows = [{"id": f"content-free {text!r}", **dict.fromkeys(task.fields, text)} for text in CONTENT_FREE[kind]]
    different = {id(shown): shown for shown in shots}  # equal demonstrations are one list
    asked: list[list[int]] = []
    for shown in different.values():
        asked += prompts.build_all(task, rows, engine.tokenizer, False, max_prompt_length, shown)[0]
    engine.shared_length = common_prefix(asked)
    found = predict.predict(engine, answer_format, asked, answer_space, 1)
    of_texts = probabilities_of(found).reshape(len(different), len(rows), -1)
    means = dict(zip(different, of_texts.mean(axis=1)))
    if len(means) == 1:
        return lambda probabilities: means[id(shots[0])]
    return lambda probabilities: np.stack([means[id(shown)] for shown in shots])


def probabilities_of(found: list[Prediction]) -> np.ndarray:
    """(rows, labels) probabilities of all labels; none is 0, as they are to be divided."""
    return np.maximum(np.array([p.probabilities for p in found], dtype=float), np.finfo(np.float32).tiny)


def corrected(probabilities: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """(rows, labels) and a prior, (labels,) or (rows, labels) -> (rows, labels) p / prior, normalised."""
    weights = probabilities / prior
    return weights / weights.sum(axis=-1, keepdims=True)


def corrected_predictions(
    answer_format: AnswerFormat, found: list[Prediction], prior: Callable[[np.ndarray], np.ndarray]
) -> list[Prediction]:
    """What all rows' answers are by the corrected probabilities: the label that is then the likeliest, or the mean.

    prior: see `prior_of`.
    """
    probabilities = probabilities_of(found)
    rows = corrected(probabilities, prior(probabilities))
    return [predict.as_prediction(answer_format, int(row.argmax()), row) for row in rows]
