"""A PPO step that sums over all labels in place of sampling answers.

Sum over all actions: Asadi et al. 2017 (https://arxiv.org/abs/1709.00503), Ciosek and Whiteson 2018
(https://arxiv.org/abs/1801.05134). An advantage is a label's reward minus the mean reward under the old policy, so no
critic is needed.
"""

import functools
from dataclasses import dataclass

import torch

from machine import processes
from training.objectives import clipped_surrogate, is_clipped, success_weight
from training.policy import label_batches, label_log_probs
from training.ppo_step import Step, add


@dataclass
class LabelTable:
    """What is known of every prompt's labels, each (prompts, labels) on the model's device."""

    rewards: torch.Tensor
    reference: torch.Tensor  # log-probabilities; 0 for a prompt that is not measured
    old: torch.Tensor  # log-probabilities under the policy of the rollout
    known: set[int]  # the prompts whose old log-probabilities are there


def expected_step(step: Step) -> float:
    """The clipped surrogate summed over all labels, weighted by the old policy. Returns the mean loss."""
    # 1. roll out: nothing is sampled, and the first update's own forward gives the old policy, as nothing has changed.
    texts = step.task.label_texts

    # 2. rewards of all labels
    count, rows = len(texts), len(step.rows)
    places = [place for place in range(rows) for _ in texts]
    flat = step.rewards(list(texts) * rows, step.task.label_ids * rows, places, [True] * (count * rows))
    label_rewards = torch.tensor(flat).view(rows, count)
    rewards = step.engine.to_device(label_rewards)

    # 3. KL: the reference's log-probabilities
    table = LabelTable(rewards, reference_log_probs(step, rewards), torch.zeros_like(rewards), set())

    # 4. and 5. advantages and updates
    sums = step.update(functools.partial(add_gradient, step, table))

    # 6. log
    log(step, table, sums)
    words = step.task.label_words
    for place, best in enumerate(table.old.argmax(-1).tolist()):
        step.keep_episode(place, words[best], float(label_rewards[place, best]), place * count + best)
    return sums["loss"] / passes(step)


@torch.no_grad()
def reference_log_probs(step: Step, like: torch.Tensor) -> torch.Tensor:
    """(prompts, labels), as `like`: log-probabilities under the reference, 0 for a prompt that is not measured."""
    found, reference = torch.zeros_like(like), step.task.reference
    if reference is None:
        return found
    for i, states in enumerate(step.reference_states([reference.trie.tree] * step.measured)):
        found[i] = label_log_probs(reference.engine, reference.trie, states[None], step.args.temperature)[0]
    return found


def add_gradient(step: Step, table: LabelTable, mine: list[int], minibatch: list[int]) -> dict:
    """The gradient of a minibatch (see Step.update). Returns sums over its prompts."""
    args, sums = step.args, {}
    clip = args.clip_range, args.clip_range_high
    prompts = [step.prompts[i] for i in mine]
    for places, new in label_batches(step.engine, step.policy.trie, prompts, args.temperature):
        numbers = [mine[p] for p in places]
        index = step.engine.to_device(torch.tensor(numbers))
        if not table.known.issuperset(numbers):  # only in a row's first update, whose policy is the old one
            table.old[index] = new.detach()
            table.known.update(numbers)
        old = table.old[index]
        q = table.rewards[index] - step.kl_coef * (old - table.reference[index])
        advantage = q - (old.exp() * q).sum(-1, keepdim=True)
        advantage = advantage * success_weight(success_probability(old.exp(), table.rewards[index]), args.success_order)
        ratio = torch.exp(new - old)
        surrogate = (old.exp() * clipped_surrogate(ratio, advantage, *clip)).sum(-1)
        entropy = -(new.exp() * new).sum(-1)
        loss = -(surrogate + step.entropy_coef * entropy).sum() / len(minibatch)
        step.trainer.accelerator.backward(loss)
        with torch.no_grad():
            figures = {
                "loss": loss * len(minibatch),
                "entropy": entropy.sum(),
                "clip": (old.exp() * is_clipped(ratio, *clip)).sum(),
                "approx_kl": (old.exp() * (old - new)).sum(),
            }
            add(sums, figures)
    return sums


def success_probability(chance: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """(prompts, labels) probabilities and rewards -> (prompts, 1) expected reward, on a scale from the prompt's lowest
    reward (0) to its highest (1): where only one label is right, its probability.

    Summed over rewards of that scale, as the expected reward itself has too few digits for a small probability.
    """
    lowest, highest = rewards.amin(-1, keepdim=True), rewards.amax(-1, keepdim=True)
    scaled = (rewards - lowest) / (highest - lowest)
    scaled = torch.where(highest > lowest, scaled, torch.ones_like(scaled))  # equal rewards: every label is right
    return (chance * scaled).sum(-1, keepdim=True)


def log(step: Step, table: LabelTable, sums: dict[str, float]) -> None:
    """The step's figures, over the prompts of all processes."""
    chance = table.old.exp()
    drift = (chance * (table.old - table.reference)).sum(-1)[: step.measured]
    here = chance, table.rewards, drift, expected_correct(step, chance)
    chance, rewards, drift, correct = (torch.cat(processes.all_gather([x.cpu()])) for x in here)
    reward = (chance * rewards).sum(-1)
    step.log(
        reward=reward,
        spread=float((chance * (rewards - reward[:, None]) ** 2).sum(-1).mean().sqrt()),
        entropy=sums["entropy"] / passes(step),
        shares={word: float(share) for word, share in zip(step.task.label_words, chance.mean(0))},
        accuracy=float(correct.mean()) if len(correct) else None,
    )
    if step.task.reference is not None:
        step.metrics["objective/kl"] = float(drift.mean())
    step.metrics |= {
        "policy/clip_fraction": sums["clip"] / passes(step),
        "policy/approx_kl": sums["approx_kl"] / passes(step),
    }


def passes(step: Step) -> int:
    """How often a prompt of any process was part of an update in this step, all prompts together."""
    return step.args.ppo_epochs * len(step.prompts) * processes.count()


def expected_correct(step: Step, chance: torch.Tensor) -> torch.Tensor:
    """(prompts, labels) probabilities -> (labelled prompts,) probability of a correct label, on the CPU."""
    labelled = [i for i, row in enumerate(step.rows) if row.get("label") is not None]
    correct = [[float(step.is_correct(text, True, step.rows[i])) for text in step.task.label_texts] for i in labelled]
    return (chance.cpu()[labelled] * torch.tensor(correct).reshape(len(labelled), chance.shape[1])).sum(-1)
