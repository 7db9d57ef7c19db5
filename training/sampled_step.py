"""A PPO step on sampled answers: sample, estimate advantages, update on the clipped surrogate.

As published the advantages are GAE's, against a critic; objectives.py has the others. PPO: Schulman et al. 2017
(https://arxiv.org/abs/1707.06347). Implementation details follow https://arxiv.org/abs/2403.17031.
"""

import functools
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from engine.decoding import Sampling
from engine.judging import classify, generate_then_classify
from engine.trees import Answer, Tree
from evaluation.answer_spaces import analysis_closed, judgement_link
from machine import processes
from tasks.labels import fold
from training.arguments import GROUP_ADVANTAGES
from training.objectives import (
    batch_advantages,
    clipped_surrogate,
    clipped_value_loss,
    explained_variance,
    gae,
    group_advantages,
    group_mean_advantages,
    is_clipped,
    leave_one_out_advantages,
    whiten,
)
from training.ppo_step import Step, add

WITH_CRITIC = ("critic", "leave_one_out")  # the advantages that the value head is trained for


@dataclass
class Rollout:
    """One step's answers. The actions (chosen tokens) of all answers are concatenated, prompt by prompt; an action's
    state is a node of its prompt's tree."""

    prompts: list[list[int]]
    trees: list[Tree]  # per prompt
    answers: list[tuple[int, Answer]]  # each with its prompt's number
    prompt: torch.Tensor  # (actions,) the prompt's number; this and the next always on the CPU
    node: torch.Tensor  # (actions,) the node at which the action was chosen
    column: torch.Tensor  # (actions,) the token, as a column of the policy's distributions
    log_probs: torch.Tensor  # (actions,) under the policy that chose it
    values: torch.Tensor  # (actions,)
    kept: list[torch.Tensor] | None  # per prompt (nodes, hidden) with gradient, until the first update uses them up
    advantages: torch.Tensor | None = None  # (actions,), this and the next once the rewards are known
    returns: torch.Tensor | None = None  # (actions,)

    @property
    def actions_per_prompt(self) -> list[int]:
        return torch.bincount(self.prompt, minlength=len(self.prompts)).tolist()


def sampled_step(step: Step) -> float:
    """One PPO step on sampled answers. Returns the mean loss over all actions."""
    # 1. roll out
    rollout = roll_out(step)

    # 2. rewards
    scores = judge(step, rollout)

    # 3. KL
    kl = kl_to_reference(step, rollout)

    # 4. advantages
    all_scores = processes.all_gather(scores)
    equal = max(all_scores) - min(all_scores) < 1e-6
    advantages, returns = estimate_advantages(step, rollout, scores, kl, equal)
    rollout.advantages, rollout.returns = advantages.to(step.args.device), returns.to(step.args.device)

    # 5. updates
    actions_per_prompt = processes.all_gather(rollout.actions_per_prompt)
    sums = step.update(functools.partial(add_gradient, step, rollout, actions_per_prompt))

    # 6. log
    log_answers(step, rollout, scores, entropy=sums["entropy"] / max(sums["paid"], 1))
    log_updates(step, rollout, sums)
    step.metrics["policy/equal_rewards"] = float(equal)
    return sums["loss"] / sums["actions"]


# ------------------------------------------------------------------------------------------------------------- roll out


@torch.no_grad()
def roll_out(step: Step) -> Rollout:
    """Sample answers with the current policy; their log-probabilities and values come from the same forward."""
    policy, device = step.policy, step.args.device
    trees, answers, states = sample(step)
    flat = [(p, answer) for p, group in enumerate(answers) for answer in group]
    prompt = torch.tensor([p for p, answer in flat for _ in answer.nodes])
    node = torch.tensor([n for _, answer in flat for n in answer.nodes])
    column = torch.tensor(policy.columns([t for _, answer in flat for t in answer.tokens])).to(device)
    actions = [sum(len(answer.nodes) for answer in group) for group in answers]  # per prompt
    nodes, columns = node.to(device).split(actions), column.split(actions)
    distributions = policy.log_distributions(states, trees)
    log_probs = torch.cat([found[n, c] for found, n, c in zip(distributions, nodes, columns)])
    values = torch.cat([policy.values(state)[n] for state, n in zip(states, nodes)])
    kept = states if all(state.requires_grad for state in states) else None
    return Rollout(step.prompts, trees, flat, prompt, node, column, log_probs, values, kept)


def sample(step: Step) -> tuple[list[Tree], list[list[Answer]], list[torch.Tensor]]:
    """Per prompt its tree, sampled answers and states (nodes, hidden)."""
    args, task, trie = step.args, step.task, step.policy.trie
    keep = args.num_minibatches == 1  # one update takes all of the rollout
    stop = task.answer_format.stop_rule(early=True) if trie is None else analysis_closed
    sampling = Sampling(
        stop, args.max_response_length, args.samples_per_prompt, args.temperature, step.generator, step.row_offset
    )
    if trie is None:
        return step.engine.generate(step.prompts, sampling, keep=keep)
    if step.policy.only_labels:
        return classify(step.engine, step.prompts, sampling, trie, task.label_texts, keep=keep)
    link = judgement_link(step.engine.tokenizer)
    return generate_then_classify(step.engine, step.prompts, sampling, trie, task.label_texts, link, keep=keep)


# -------------------------------------------------------------------------------------------------------------- rewards


def judge(step: Step, rollout: Rollout) -> list[float]:
    """The reward of every answer."""
    places, answers = zip(*rollout.answers)
    texts = [answer.text for answer in answers]
    # Of a label only the tokens that were a choice are kept, so its text is tokenized.
    spelled = step.trainer.token_ids(texts) if step.policy.trie is not None else [answer.tokens for answer in answers]
    return step.rewards(texts, spelled, list(places), [answer.ended for answer in answers])


# ------------------------------------------------------------------------------------------------------- KL, advantages


@torch.no_grad()
def kl_to_reference(step: Step, rollout: Rollout) -> torch.Tensor:
    """(actions,) log-probability minus the reference's (k1), on the CPU; 0 for prompts that are not measured."""
    if step.task.reference is None:
        return torch.zeros(len(rollout.prompt))
    actions = rollout.actions_per_prompt
    nodes = rollout.node.to(step.args.device).split(actions)
    columns, old = rollout.column.split(actions), rollout.log_probs.split(actions)
    trees = rollout.trees[: step.measured]
    states = step.reference_states(trees)
    kl = [torch.zeros_like(x) for x in old]
    for p, log_probs in enumerate(step.task.reference.log_distributions(states, trees)):
        kl[p] = old[p] - log_probs[nodes[p], columns[p]]
    kl = torch.cat(kl)
    measures = processes.all_gather([(float(kl.sum()), sum(actions[: step.measured]))])
    total, measured_actions = (sum(numbers) for numbers in zip(*measures))
    step.metrics["objective/kl"] = total / max(measured_actions, 1)
    return kl.cpu()


def estimate_advantages(
    step: Step, rollout: Rollout, scores: list[float], kl: torch.Tensor, equal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(actions,) advantages as `advantage` says, and returns, on the CPU. Those against the critic, or the other
    samples of a state, are whitened over all processes.

    A token's reward is its KL times -kl_coef, and for the token that earned it the answer's score. Groups compare
    scores alone, so that no difference in KL is blown up to unit variance; the KL's rewards to come are added to that.
    `equal`: the scores of all processes are.
    """
    args = step.args
    lengths = [len(answer.tokens) for _, answer in rollout.answers]
    values = [x.tolist() for x in rollout.values.cpu().split(lengths)]
    costs = [x.tolist() for x in (-step.kl_coef * kl).split(lengths)]
    rewards = [list(cost) for cost in costs]
    for reward, score, (_, answer) in zip(rewards, scores, rollout.answers):
        reward[earning_token(step, answer)] += score
    advantages, returns = gae_of_answers(rewards, values, args.gamma, args.lam)
    no_values = [[0.0] * length for length in lengths]
    of_kl = gae_of_answers(costs, no_values, args.gamma, args.lam)[0]
    if equal:
        # Nothing tells one answer from another: what is left of the advantages would be the critic's noise.
        return of_kl, returns
    if args.advantage in GROUP_ADVANTAGES:
        compared = group_advantages if args.advantage == "group" else group_mean_advantages
        of_scores = compared(torch.tensor(scores), torch.tensor([p for p, _ in rollout.answers]))
        return of_kl + of_scores.repeat_interleave(torch.tensor(lengths)), returns
    if args.advantage == "batch":
        returns = gae_of_answers(rewards, no_values, args.gamma, 1.0)[1]
        return batch_advantages(returns, torch.cat(processes.all_gather([returns]))), returns
    if args.advantage == "leave_one_out":
        advantages = leave_one_out_advantages(advantages, returns, rollout.prompt, rollout.node)
    return whiten(advantages, torch.cat(processes.all_gather([advantages]))), returns


def gae_of_answers(
    rewards: list[list[float]], values: list[list[float]], gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per answer its tokens' rewards and values -> (actions,) advantages and returns of all answers."""
    advantages, returns = [], []
    for reward, value in zip(rewards, values):
        of_answer = gae(reward, value, gamma, lam)
        advantages += of_answer[0]
        returns += of_answer[1]
    return torch.tensor(advantages), torch.tensor(returns)


def earning_token(step: Step, answer: Answer) -> int:
    """Which of the answer's tokens earns the reward: the one that completes the label, else the last."""
    end = step.task.answer_format.label_length(answer.text, answer.ended)
    if answer.label is None and end is not None:
        for t in range(len(answer.tokens)):
            if len(step.engine.tokenizer.decode(answer.tokens[: t + 1])) >= end:
                return t
    return len(answer.tokens) - 1


# -------------------------------------------------------------------------------------------------------------- updates


def add_gradient(
    step: Step, rollout: Rollout, actions_per_prompt: list[int], mine: list[int], minibatch: list[int]
) -> dict:
    """The gradient of a minibatch (see Step.update). Returns sums over its actions.

    actions_per_prompt: of all processes' prompts.
    """
    total = sum(actions_per_prompt[i] for i in minibatch)
    numbers = torch.arange(len(rollout.prompt)).split(rollout.actions_per_prompt)
    numbers = [numbers[i].tolist() for i in mine]  # per prompt of the minibatch its actions
    sums = {"actions": sum(map(len, numbers))}
    if rollout.kept is not None:
        # The network has not changed since the rollout: its forward is this update's too.
        batches = [(range(len(mine)), pad_sequence([rollout.kept[i] for i in mine], batch_first=True))]
        rollout.kept = None
    else:
        prompts, trees = [rollout.prompts[i] for i in mine], [rollout.trees[i] for i in mine]
        batches = step.engine.training_batches(prompts, trees)
    for places, states in batches:
        actions = [(action, line) for line, p in enumerate(places) for action in numbers[p]]
        index, line = (torch.tensor(x) for x in zip(*actions))
        trees = [rollout.trees[mine[p]] for p in places]
        per_action, figures = losses(step, rollout, trees, index, line, states)
        step.trainer.accelerator.backward(per_action.sum() / total)
        add(sums, figures)
    return sums


def losses(
    step: Step, rollout: Rollout, trees: list[Tree], index: torch.Tensor, line: torch.Tensor, states: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(actions,) losses of a micro-batch with gradient, and sums of figures.

    trees, states: of its prompts; (prompts, nodes, hidden). index, line: (actions,) on the CPU, an action's number in
    the rollout and its prompt's in the micro-batch.
    """
    args, policy, to_device = step.args, step.policy, step.engine.to_device
    clip = args.clip_range, args.clip_range_high
    # Samples that agree so far share a state: its distribution is computed once.
    pairs, state = torch.unique(torch.stack([line, rollout.node[index]]), dim=1, return_inverse=True)
    allowed = [trees[p].allowed.get(n) for p, n in pairs.T.tolist()]
    choices = [policy.label_choice(trees[p], n) for p, n in pairs.T.tolist()]
    # All of that is worked out on the CPU, so that it need not wait for a card.
    index, state, pairs = (to_device(x) for x in (index, state, pairs))
    at_node = states[pairs[0], pairs[1]]  # (states, hidden)
    log_probs = policy.log_softmax(at_node, allowed, pairs[1])  # (states, columns)
    new = log_probs[state, rollout.column[index]]  # (actions,)
    old, advantage = rollout.log_probs[index], rollout.advantages[index]
    ratio = torch.exp(new - old)
    surrogate = clipped_surrogate(ratio, advantage, *clip)
    entropy, paid = (x[state] for x in policy.entropy(log_probs, choices))
    loss, value_loss = -surrogate - step.entropy_coef * entropy, torch.zeros_like(surrogate)
    if args.advantage in WITH_CRITIC:
        values = policy.values(at_node)[state]
        value_loss = clipped_value_loss(values, rollout.values[index], rollout.returns[index], args.value_clip_range)
        loss = loss + args.value_coef * value_loss
    with torch.no_grad():
        figures = {
            "loss": loss.sum(),
            "entropy": entropy.sum(),
            "paid": paid.sum(),
            "value_loss": value_loss.sum(),
            "clip": is_clipped(ratio, *clip).sum(),
            "approx_kl": ((ratio - 1) - (new - old)).sum(),
            "ratio": ratio.sum(),
        }
    return loss, figures


# ------------------------------------------------------------------------------------------------------------------ log


def log_answers(step: Step, rollout: Rollout, scores: list[float], entropy: float) -> None:
    """What was answered and what it earned, over all processes."""
    about = []
    for number, ((p, answer), score) in enumerate(zip(rollout.answers, scores)):
        step.keep_episode(p, answer.text, score, number)
        correct = step.is_correct(answer.text, answer.ended, step.rows[p])
        about.append((score, answered(step, answer), len(answer.tokens), correct))
    all_scores, words, lengths, correct = zip(*processes.all_gather(about))
    step.log(
        reward=torch.tensor(all_scores),
        spread=float(torch.tensor(all_scores).std()) if len(all_scores) > 1 else 0.0,
        entropy=entropy,
        shares={word: words.count(word) / len(words) for word in dict.fromkeys(words)},
        accuracy=None if None in correct else sum(correct) / len(correct),
    )
    step.metrics["objective/response_length"] = sum(lengths) / len(lengths)


def answered(step: Step, answer: Answer) -> str:
    """Which of the label words an answer gives: `invalid` if none, `other` for a number that is not listed."""
    words = step.task.label_words
    if answer.label is not None:
        return words[answer.label]
    end = step.task.answer_format.label_length(answer.text, answer.ended)
    if end is None:
        return "invalid"
    text = fold(answer.text[:end])
    # What comes before the word is an analysis.
    return max((word for word in words if text.endswith(fold(word))), key=len, default="other")


def log_updates(step: Step, rollout: Rollout, sums: dict[str, float]) -> None:
    """Means over all actions of all updates, and what the critic explains of the returns."""
    mean = {name: value / sums["actions"] for name, value in sums.items()}
    values, returns = (torch.cat(processes.all_gather([x.cpu()])) for x in (rollout.values, rollout.returns))
    step.metrics |= {
        "policy/clip_fraction": mean["clip"],
        "policy/approx_kl": mean["approx_kl"],
        "policy/ratio": mean["ratio"],
        "value/loss": mean["value_loss"],
        "value/explained_variance": explained_variance(values, returns),
    }
