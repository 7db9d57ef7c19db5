"""Answers that are labels of a trie: right after the prompt, or after a free analysis."""

from collections.abc import Callable, Iterator

import torch

from engine.batches import grouped
from engine.decoding import Sampling
from engine.engine import Engine
from engine.trees import Answer, LabelTrie, Tree, random_stream


def draw_labels(
    engine: Engine, trie: LabelTrie, states: list[torch.Tensor], sampling: Sampling, draws: int = 1
) -> Iterator[tuple[list[tuple[int, list[tuple[int, int]]]], torch.Tensor]]:
    """Per prompt the states (rows, nodes, hidden) of the trie's nodes -> the labels drawn, `draws` for each row, with
    their decisions [(node, column), ...]; and the (rows, labels) probabilities of all labels.

    Temperature 0 takes the most probable token each time. All draws of a prompt come from its own random stream.
    """
    seeds = sampling.seeds(len(states))
    for group in grouped([state.flatten(0, 1) for state in states]):
        logits = engine.logits(torch.cat([states[i] for i in group]), trie.vocabulary)
        log_probs = trie.log_probs(logits, sampling.temperature or 1.0).cpu()  # (rows, nodes, columns)
        chances = trie.label_log_probs(log_probs).exp()
        sizes = [len(states[i]) for i in group]
        for i, rows, probabilities in zip(group, log_probs.split(sizes), chances.split(sizes)):
            stream = random_stream(seeds[i])
            yield [trie.choose(row, stream) for row in rows for _ in range(draws)], probabilities


@torch.no_grad()
def classify(
    engine: Engine,
    prompts: list[list[int]],
    sampling: Sampling,
    trie: LabelTrie,
    words: tuple[str, ...],
    keep: bool = False,
) -> tuple[list[Tree], list[list[Answer]], list[torch.Tensor]]:
    """Answer every prompt `sampling.samples` times with a label of the trie, whose text is the label's in `words`.

    Returns trees, answers and states per prompt, as `Engine.generate` does. keep: see `Engine.states`.
    """
    trees = [trie.tree] * len(prompts)
    states = engine.states(prompts, trees, keep=keep)
    answers = []
    for labels, (probabilities,) in draw_labels(engine, trie, [s[None] for s in states], sampling, sampling.samples):
        answers.append([])
        for label, path in labels:
            tokens, nodes = [trie.vocabulary[column] for _, column in path], [node for node, _ in path]
            answers[-1].append(Answer(tokens, nodes, True, words[label], label, probabilities))
    return trees, answers, states


@torch.no_grad()
def generate_then_classify(
    engine: Engine,
    prompts: list[list[int]],
    sampling: Sampling,
    trie: LabelTrie,
    words: tuple[str, ...],
    link: Callable[[Answer], tuple[list[int], str]],
    keep: bool = False,
) -> tuple[list[Tree], list[list[Answer]], list[torch.Tensor]]:
    """`Engine.generate`, and every answer ends with a label of the trie: its analysis is free, its judgement is masked.

    `link` gives the tokens (and their text) that lead from an answer's text to its label; nobody chooses them, so they
    are nodes but no actions. `sampling.stop` and `sampling.max_new_tokens` are those of the analysis.
    """
    label_nodes: list[list[list[int]]] = []  # per prompt and answer the nodes of its label's tree

    def extend(trees: list[Tree], answers: list[list[Answer]]) -> None:
        label_nodes.clear()  # of an attempt that ran out of memory
        for tree, group in zip(trees, answers):
            label_nodes.append([])
            for answer in group:
                node = answer.nodes[-1]
                if answer.tokens[-1] != engine.tokenizer.eos_token_id:
                    node = tree.child(node, answer.tokens[-1])
                tokens, text = link(answer)
                for token in tokens:
                    node = tree.child(node, token)
                nodes = [node]
                for token, parent in zip(trie.tree.tokens[1:], trie.tree.parents[1:]):
                    nodes.append(tree.child(nodes[parent], token))
                tree.allowed |= {nodes[inner]: tokens for inner, tokens in trie.allowed.items()}
                label_nodes[-1].append(nodes)
                answer.text += text

    trees, answers, states = engine.generate(prompts, sampling, keep=keep, extend=extend)
    at_labels = [state[torch.tensor(nodes)] for state, nodes in zip(states, label_nodes)]  # (answers, nodes, hidden)
    drawn = draw_labels(engine, trie, at_labels, sampling)
    for group, nodes_of, (labels, probabilities) in zip(answers, label_nodes, drawn):
        for answer, nodes, (label, path), chances in zip(group, nodes_of, labels, probabilities):
            answer.label, answer.probabilities = label, chances
            answer.nodes += [nodes[inner] for inner, _ in path]
            answer.tokens += [trie.vocabulary[column] for _, column in path]
            answer.text += words[label]
            answer.ended = True
    return trees, answers, states
