"""Answers to prompts: the same code before, during and after training, and for all baselines."""

import numpy as np
import torch

from engine.batches import grouped
from engine.decoding import Sampling
from engine.engine import Engine
from engine.judging import classify, generate_then_classify
from engine.trees import LabelTrie
from evaluation.answer_spaces import AnswerFormat, analysis_closed, judgement_link, label_of, label_trie, mean_number
from evaluation.predictions import Prediction
from machine import processes
from tasks.labels import exact_text


@torch.no_grad()
def predict(
    engine: Engine,
    answer_format: AnswerFormat,
    prompts: list[list[int]],
    answer_space: str,
    max_response_length: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Prediction]:
    """One answer per prompt, greedy unless temperature > 0.

    labels: token by token among the labels' spellings; free: any token; score: the label with the highest
    log-likelihood among all tokens (as lm-evaluation-harness does it). In the first and the last `answer_format` may
    ask for the mean of numbers. Every process answers its share; all get all. ValueError for score with an analysis.
    """
    mine = processes.share(len(prompts))
    generator = torch.Generator().manual_seed(seed) if temperature > 0 else None
    masked_analysis = answer_space == "labels" and answer_format.use_CoT
    stop = analysis_closed if masked_analysis else answer_format.stop_rule()
    sampling = Sampling(stop, max_response_length, 1, temperature, generator, mine.start)
    return processes.all_gather(_predict(engine, answer_format, prompts[mine], answer_space, sampling))


def _predict(
    engine: Engine, answer_format: AnswerFormat, prompts: list[list[int]], answer_space: str, sampling: Sampling
) -> list[Prediction]:
    """`predict` of this process's prompts."""
    task = answer_format.task
    if answer_space == "free":
        _, answers, _ = engine.generate(prompts, sampling)
        return [Prediction(a.text, answer_format.parse(a.text, a.ended)) for (a,) in answers]
    trie = label_trie(task, engine.tokenizer)
    if answer_space == "score":
        if answer_format.use_CoT:
            raise ValueError("--answer_space score reads the label's likelihood at once; leave --use_CoT at False")
        return _most_likely(engine, answer_format, trie, prompts)
    if answer_format.use_CoT:
        link = judgement_link(engine.tokenizer)
        _, answers, _ = generate_then_classify(engine, prompts, sampling, trie, task.words, link)
    else:
        _, answers, _ = classify(engine, prompts, sampling, trie, task.words)
    return [as_prediction(answer_format, a.label, a.probabilities.numpy(), a.text) for (a,) in answers]


def as_prediction(
    answer_format: AnswerFormat, label: int, probabilities: np.ndarray, text: str | None = None
) -> Prediction:
    """What the chosen label (its number) and the (labels,) probabilities of all labels answer.

    text: all of the answer, which ends with the label's word; default: that word alone. A mean takes the place of the
    chosen number, with three decimals, as leaderboards have it.
    """
    task = answer_format.task
    text, chosen = task.words[label] if text is None else text, label_of(task, label)
    # Behind an analysis of its own, no row's probability can be compared with another's.
    last = None if answer_format.use_CoT else float(probabilities[-1])
    if not (task.number and answer_format.number_answer == "mean"):
        return Prediction(text, chosen, last, probabilities)
    number = exact_text(task, mean_number(task, probabilities.tolist()))
    return Prediction(text.removesuffix(task.words[label]) + number, float(number), last, probabilities, chosen)


def _most_likely(
    engine: Engine, answer_format: AnswerFormat, trie: LabelTrie, prompts: list[list[int]]
) -> list[Prediction]:
    """The label whose spelling has the highest sum of log-probabilities over the whole vocabulary."""
    tree, steps = trie.full_tree()
    predictions = []
    states = engine.states(prompts, [tree] * len(prompts))
    for group in grouped(states):
        log_probs = torch.log_softmax(engine.logits(torch.stack([states[i] for i in group])), dim=-1)
        totals = torch.stack([sum(log_probs[:, node, token] for node, token in path) for path in steps], dim=-1)
        for label, chances in zip(totals.argmax(-1).tolist(), torch.softmax(totals, -1).cpu().numpy()):
            predictions.append(as_prediction(answer_format, label, chances))
    return predictions
