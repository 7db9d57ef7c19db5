"""Answers to prompts: the same code before, during and after training, and for all baselines."""

import torch

import rewards
from engine.batches import grouped
from engine.engine import Engine
from engine.trees import LabelTrie, row_seeds
from evaluation.answer_spaces import analysis_closed, judgement_link, label_of, label_trie, stop_rule
from evaluation.predictions import Prediction
from machine import processes
from tasks import Task


@torch.no_grad()
def predict(
    engine: Engine,
    task: Task,
    prompts: list[list[int]],
    answer_space: str,
    max_response_length: int,
    use_CoT: bool = False,
    strict_format: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Prediction]:
    """One answer per prompt, greedy unless temperature > 0.

    labels: token by token among the labels' spellings; free: any token; score: the label with the highest
    log-likelihood among all tokens (as lm-evaluation-harness does it). Every process answers its share; all get all.
    """
    generator = torch.Generator().manual_seed(seed) if temperature > 0 else None
    mine = processes.share(len(prompts))
    prompts, draws = prompts[mine], (temperature, generator, mine.start)
    return processes.all_gather(
        _predict(engine, task, prompts, answer_space, max_response_length, use_CoT, strict_format, draws)
    )


def _predict(
    engine: Engine, task: Task, prompts: list[list[int]], answer_space: str, max_response_length: int, use_CoT: bool,
    strict_format: bool, draws: tuple[float, torch.Generator | None, int],
) -> list[Prediction]:  # fmt: skip
    """`predict` of this process's prompts. draws: temperature, the rows' random stream, the first row's number."""
    temperature, generator, first = draws
    if answer_space == "free":
        stop = stop_rule(task, use_CoT, strict_format)
        _, answers, _ = engine.generate(prompts, stop, max_response_length, 1, *draws)
        return [Prediction(a.text, rewards.parse(task, a.text, a.ended, strict_format, use_CoT)) for (a,) in answers]
    trie = label_trie(task, engine.tokenizer)
    if answer_space == "score":
        if use_CoT:
            raise ValueError("--answer_space score reads the label's likelihood at once; leave --use_CoT at False")
        return _most_likely(engine, task, trie, prompts)
    if use_CoT:
        link = judgement_link(engine.tokenizer)
        _, answers, _ = engine.generate_then_classify(
            prompts, analysis_closed, max_response_length, 1, trie, task.words, link, *draws
        )
        return [Prediction(a.text, label_of(task, a.label)) for (a,) in answers]
    predictions = []
    seeds = row_seeds(len(prompts), generator, first) if generator else [None] * len(prompts)
    states = engine.states(prompts, [trie.tree] * len(prompts))
    for group in grouped(states):
        logits = engine.logits(torch.stack([states[i] for i in group]), trie.vocabulary)
        log_probs = trie.log_probs(logits, temperature or 1.0).cpu()
        for i, row, yes in zip(group, log_probs, trie.label_log_probs(log_probs)[:, -1].exp().tolist()):
            label, _ = trie.choose(row, None if seeds[i] is None else torch.Generator().manual_seed(seeds[i]))
            predictions.append(Prediction(task.words[label], label_of(task, label), yes))
    return predictions


def _most_likely(engine: Engine, task: Task, trie: LabelTrie, prompts: list[list[int]]) -> list[Prediction]:
    """The label whose spelling has the highest sum of log-probabilities over the whole vocabulary."""
    tree, steps = trie.full_tree()
    predictions = []
    states = engine.states(prompts, [tree] * len(prompts))
    for group in grouped(states):
        log_probs = torch.log_softmax(engine.logits(torch.stack([states[i] for i in group])), dim=-1)
        totals = torch.stack([sum(log_probs[:, node, token] for node, token in path) for path in steps], dim=-1)
        for label, chances in zip(totals.argmax(-1).tolist(), torch.softmax(totals, -1).tolist()):
            predictions.append(Prediction(task.words[label], label_of(task, label), chances[-1]))
    return predictions
