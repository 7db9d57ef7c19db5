"""Answers to prompts: the same code before, during and after training, and for all baselines."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

import metrics
import models
import processes
import prompts
import rewards
import sharding
from arguments import Arguments
from engine import Engine, grouped
from memory import asking_tokens
from models import ModelError
from tasks import Task
from trees import Answer, LabelTrie, row_seeds

ANSWER_SPACES = ("labels", "free", "score")


@dataclass
class Prediction:
    """One answer: its text, its label (None if it does not parse), and P(the last label) where that is known."""

    text: str
    label: int | float | None
    yes: float | None = None


def load_model(name: str, tokenizer, arguments: Arguments) -> tuple[PreTrainedModel, str | None]:
    """The model, cut up if it was launched for that, and why its engine must use the plain forward (None: it need not).

    Raises ModelError, also if the model cannot read as many tokens as the arguments allow.
    """
    how = arguments.from_local, arguments.load_in_8bit
    model = models.load_model(name, *how, trust_remote_code=arguments.trust_remote_code)
    check_length(model, name, arguments.max_prompt_length + arguments.max_response_length)
    try:
        problem = Engine(model, tokenizer).check(arguments.max_prompt_length + arguments.max_response_length)
        sharding.cut(model)
    except ValueError as error:
        raise ModelError(f"--train_model_name {name}: {error}") from error
    if problem:
        print(f"This model does not fit the shared-prefix forward ({problem}); the plain one is used, which is slower.")
    return model, problem


def load_engine(name: str, arguments: Arguments) -> Engine:
    """The engine of a model that is only asked. Raises ModelError."""
    tokenizer = models.load_tokenizer(name, arguments.from_local, arguments.trust_remote_code)
    model, problem = load_model(name, tokenizer, arguments)
    engine = Engine(model, tokenizer, arguments.tokens_per_micro_batch or asking_tokens(model))
    engine.plain, engine.frozen = problem is not None, True
    return engine


def check_length(model, name: str, tokens: int) -> None:
    """ModelError if a prompt and its answer, of so many tokens together, are more than the model can read."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and tokens > longest:
        raise ModelError(
            f"--max_prompt_length and --max_response_length make {tokens} tokens, more than the {longest} tokens that "
            f"{name} can read; lower them"
        )


def score(task: Task, rows: list[dict], predictions: list[Prediction]) -> dict[str, float]:
    """Every official metric of the task, their mean and the invalid rate, as `metrics.score` gives them."""
    return metrics.score(task, rows, [p.label for p in predictions], yes_scores(predictions))


def details(task: Task, rows: list[dict], predictions: list[Prediction], majority: int | float) -> dict:
    """For summary.json, of labelled rows: every metric's interval, the metrics of answering always with the majority's
    label, and with classes their names and the counts of gold by predicted ones."""
    labels = [p.label for p in predictions]
    found = {
        "intervals": metrics.bootstrap_interval(task, rows, labels, yes_scores(predictions)),
        "majority": metrics.score(task, rows, [majority] * len(rows)),
    }
    if not task.number:
        found |= {"labels": task.labels, "confusion": metrics.confusion_counts(task, rows, labels).tolist()}
    return found


def yes_scores(predictions: list[Prediction]) -> list[float] | None:
    """P(the last label) of every row, by which ReCoRD's entity is chosen; None where generation did not yield it."""
    scores = [p.yes for p in predictions]
    return None if None in scores else scores


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
    """For `Engine.judge`: the tokens between an answer's analysis and its label."""

    def link(answer: Answer) -> tuple[list[int], str]:
        text = ("" if analysis_closed(answer.text) else rewards.ANALYSIS_END) + "\n" + rewards.JUDGEMENT
        return tokenizer(text, add_special_tokens=False).input_ids, text

    return link


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
    return processes.together(
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
        _, answers, _ = engine.judge(prompts, analysis_closed, max_response_length, 1, trie, task.words, link, *draws)
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


def results_text(task: Task, figures: dict[str, float], more: dict, counted_in: str) -> str:
    """A table of every metric with its interval and the majority class's, and of gold labels by predicted ones.

    more: `intervals`, `majority` and, with classes, `confusion`, as the functions of metrics.py give them.
    """
    lines = [f"{'':14}{'':>8}  95% interval     majority class ({counted_in})"]
    for name, value in figures.items():
        low, high = more["intervals"].get(name, (None, None))
        interval = "" if low is None else f"{low:.3f} to {high:.3f}"
        lines.append(f"{name:14}{value:8.3f}  {interval:15}  {more['majority'][name]:.3f}")
    if "confusion" in more:
        columns = [*task.labels, "invalid"]
        width, first = max(map(len, columns)) + 2, max(map(len, (*columns, "gold \\ answer")))
        lines += ["", "gold \\ answer".ljust(first) + "".join(name.rjust(width) for name in columns)]
        for name, counts in zip(task.labels, more["confusion"]):
            lines.append(name.ljust(first) + "".join(str(count).rjust(width) for count in counts))
    return "\n".join(lines)
