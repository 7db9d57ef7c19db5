"""Objectives: their arithmetic by hand, and that a step's gradient is the objective's."""

import math

import pytest
import torch
from conftest import VOCABULARY, plain_label_log_probs
from test_ppo_trainer import (
    LONG_WORDS,
    MODES,
    At,
    caught_rollout,
    error,
    figures,
    make_rows,
    make_trainer,
    mode_trainer,
    plain_log_probs,
    policy_gradient,
    policy_weights,
    step_logs,
    tokens,
    word_reward,
)

from rewards import JUDGEMENT_END
from training import expected_step, sampled_step
from training.objectives import (
    adapted_kl_coef,
    batch_advantages,
    clipped_surrogate,
    group_advantages,
    group_mean_advantages,
    is_clipped,
    number_weights,
    smoothed,
    success_weight,
)
from training.ppo_trainer import PPOConfig

# --------------------------------------------------------------------------------------------------------- arithmetic


def test_group_advantages_by_hand():
    rewards, prompt = torch.tensor([1.0, 5.0, -1.0, 3.0, -1.0, -1.0]), torch.tensor([0, 1, 0, 0, 1, 2])
    # Prompt 0: 1, -1, 3, mean 1, deviation 2. Prompt 1: 5, -1, mean 2, deviation 3 sqrt(2). Prompt 2 has one answer.
    assert group_mean_advantages(rewards, prompt).tolist() == pytest.approx([0, 3, -2, 2, -3, 0])
    root = math.sqrt(0.5)
    assert group_advantages(rewards, prompt).tolist() == pytest.approx([0, root, -1, 1, -root, 0])
    equal = torch.tensor([0.1, 0.1, 0.1])
    assert group_advantages(equal, torch.tensor([0, 0, 0])).tolist() == [0, 0, 0]


def test_batch_advantages_by_hand():
    # Of the whole batch 1, 2, 3 the mean is 2 and the deviation 1; this process has two of them.
    assert batch_advantages(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-1, 1])


@pytest.mark.parametrize("order", [1, 1.5, 2, 16, 1e6, math.inf])
def test_the_weight_of_a_success_probability(order):
    p = torch.tensor([0.0, 1e-30, 1e-7, 1e-3, 0.3, 0.999, 1.0])
    found = success_weight(p, order)
    assert torch.isfinite(found).all() and float(found[-1]) == 1.0
    if order == 1:
        assert torch.equal(found, torch.ones_like(p))
    if order < math.inf:
        assert found[:2].tolist() == pytest.approx([order, order], rel=1e-5)
    exact = [-math.expm1(order * math.log1p(-x)) / x for x in p[2:-1].double().tolist()]
    assert found[2:-1].tolist() == pytest.approx(exact, rel=1e-5)


def test_the_upper_clip_range_is_one_of_its_own():
    ratio = torch.tensor([1.1, 1.4, 1.6, 0.7, 0.9], requires_grad=True)
    ones = torch.ones(5)
    found = clipped_surrogate(ratio, ones, 0.2, 0.5)
    assert found.tolist() == pytest.approx([1.1, 1.4, 1.5, 0.7, 0.9])
    found.sum().backward()
    assert ratio.grad.tolist() == [1, 1, 0, 1, 1]
    assert clipped_surrogate(ratio, -ones, 0.2, 0.5).tolist() == pytest.approx([-1.1, -1.4, -1.6, -0.8, -0.9])
    assert is_clipped(ratio, 0.2, 0.5).tolist() == [False, False, True, True, False]


def test_the_kl_coefficient_follows_the_error_but_not_too_fast():
    assert adapted_kl_coef(0.5, kl=0.11, target=0.1) == pytest.approx(0.5 * 1.01)
    assert adapted_kl_coef(0.5, kl=0.3, target=0.1) == pytest.approx(0.5 * 1.02)
    assert adapted_kl_coef(0.5, kl=-0.1, target=0.1) == pytest.approx(0.5 * 0.98)


def test_targets_of_numbers():
    listed = torch.tensor([0.0, 0.5, 1.0])
    assert number_weights(listed, 0.7, soft=False).tolist() == [0, 1, 0]
    weights = [math.exp(-1.4), math.exp(-0.4), math.exp(-0.6)]
    assert number_weights(listed, 0.7, soft=True).tolist() == pytest.approx([w / sum(weights) for w in weights])
    assert smoothed(torch.tensor([0.0, 1.0, 0.0, 0.0]), 0.2).tolist() == pytest.approx([0.05, 0.85, 0.05, 0.05])


# ---------------------------------------------------------------------------------------------- MaxRL, expected PPO


def test_order_one_is_the_expected_reward_to_the_bit(tmp_path, monkeypatch):
    found = []
    config = {"max_steps": 2, "kl_coef": 0.1, "entropy_coef": 0.1, "ppo_epochs": 2, "num_minibatches": 2}
    for weight in (success_weight, lambda p, order: 1.0):
        monkeypatch.setattr(expected_step, "success_weight", weight)
        trainer = make_trainer(tmp_path, reward=word_reward(LONG_WORDS), words=LONG_WORDS, config=config)
        trainer.train()
        found.append((figures(trainer), policy_weights(trainer.model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(weight, found[1][1][name]) for name, weight in found[0][1].items())


def closed(words: tuple[str, ...]) -> list[list[int]]:
    return [[*tokens(word), VOCABULARY["<unk>"]] for word in words]  # this tokenizer has no token for the closing tag


def test_a_high_order_has_the_gradient_of_cross_entropy(tmp_path):
    trainer = make_trainer(tmp_path, reward=word_reward(LONG_WORDS), words=LONG_WORDS, config={"success_order": 1e6})
    rows, model = make_rows(8, labels=3), trainer.model
    trainer.training_step(model, {"rows": rows})
    found = policy_gradient(model).clone()
    model.zero_grad()
    logs = [plain_label_log_probs(model, row["prompt_ids"], closed(LONG_WORDS))[row["label"]] for row in rows]
    (-2 * torch.stack(logs).mean()).backward()  # reward_correct - reward_wrong = 2
    assert error(found, policy_gradient(model)) < 1e-4


def test_other_rewards_are_put_on_a_scale_from_lowest_to_highest(tmp_path):
    """As for numbers, whose labels have a reward each."""

    def distance(completions, label, **columns):
        given = [LONG_WORDS.index(text.removesuffix(JUDGEMENT_END)) for text in completions]
        return [2.5 - abs(a - b) for a, b in zip(given, label)]

    trainer = make_trainer(tmp_path, reward=distance, words=LONG_WORDS, config={"success_order": 3})
    rows, model = make_rows(8, labels=3), trainer.model
    trainer.training_step(model, {"rows": rows})
    found = policy_gradient(model).clone()
    model.zero_grad()
    objective = 0.0
    for row in rows:
        chance = plain_label_log_probs(model, row["prompt_ids"], closed(LONG_WORDS)).exp()
        reward = torch.tensor([2.5 - abs(label - row["label"]) for label in range(3)])
        spread = reward.max() - reward.min()
        p = (chance * (reward - reward.min())).sum() / spread
        # The first three terms of log p = -sum of (1 - p)^k / k, whose gradient has the weight of order 3.
        objective = objective - spread * sum((1 - p) ** k / k for k in (1, 2, 3)) / len(rows)
    (-objective).backward()
    assert error(found, policy_gradient(model)) < 1e-4


def test_equal_rewards_have_the_weight_one():
    rewards, chance = torch.full((1, 3), -1.0), torch.tensor([[0.2, 0.3, 0.5]])
    assert expected_step.success_probability(chance, rewards).item() == pytest.approx(1.0)


# --------------------------------------------------------------------------------------------- advantages, sampled PPO


def scores_of(trainer, rollout) -> torch.Tensor:
    rows = make_rows(8)
    return torch.tensor([trainer.tasks[0].reward_funcs[0]([a.text], id=[rows[p]["id"]])[0] for p, a in rollout.answers])


@pytest.mark.parametrize("advantage", ["group", "group_mean", "batch"])
@pytest.mark.parametrize("mode", ["labels", "free"])
def test_advantages_without_a_critic(mode, advantage, tmp_path):
    trainer = mode_trainer(tmp_path, mode, {"advantage": advantage}, how={"credit": lambda text, ended: None})
    torch.nn.init.normal_(trainer.model.value_head.weight)  # a critic with opinions, which nobody asks
    rollout = caught_rollout(trainer, make_rows(8))
    scores = scores_of(trainer, rollout)
    lengths = torch.tensor([len(answer.tokens) for _, answer in rollout.answers])
    prompt = torch.tensor([p for p, _ in rollout.answers])
    if advantage == "batch":
        returns = scores.repeat_interleave(lengths)
        expected = (returns - returns.mean()) / returns.std()
    else:
        of_answers = torch.empty_like(scores)
        for p in range(8):
            group = scores[prompt == p]
            deviation = float(group.std()) if advantage == "group" else 1.0
            of_answers[prompt == p] = (group - group.mean()) / deviation if deviation > 1e-6 else 0.0
        expected = of_answers.repeat_interleave(lengths)
    assert torch.allclose(rollout.advantages, expected, atol=1e-4)
    found = policy_gradient(trainer.model).clone()
    assert trainer.model.value_head.weight.grad is None and trainer.step_metrics["value/loss"] == 0.0
    trainer.model.zero_grad()
    (-(rollout.advantages * plain_log_probs(trainer, rollout)).mean()).backward()
    assert error(found, policy_gradient(trainer.model)) < 1e-4


def test_groups_keep_the_kl_apart(tmp_path):
    trainer = mode_trainer(tmp_path, "free", {"advantage": "group", "kl_coef": 0.3})
    rollout = caught_rollout(trainer, make_rows(8))
    scores, prompt = scores_of(trainer, rollout), torch.tensor([p for p, _ in rollout.answers])
    log_probs = plain_log_probs(trainer, rollout).detach()
    with trainer.model.disable_adapter():
        kl = log_probs - plain_log_probs(trainer, rollout).detach()
    start = 0
    for (_, answer), of_score in zip(rollout.answers, group_advantages(scores, prompt).tolist()):
        to_come = kl[start : start + len(answer.tokens)].flip(0).cumsum(0).flip(0)
        found = rollout.advantages[start : start + len(answer.tokens)]
        assert torch.allclose(found, of_score - 0.3 * to_come, atol=1e-3)
        start += len(answer.tokens)


@pytest.mark.parametrize("samples, lam, usual", [(1, 1.0, "critic"), (4, 1.0, "leave_one_out"), (4, 0.5, "critic")])
def test_the_usual_advantage(samples, lam, usual, tmp_path):
    assert PPOConfig(output_dir=str(tmp_path), samples_per_prompt=samples, lam=lam, use_cpu=True).advantage == usual


def test_objectives_that_cannot_work_are_refused(tmp_path):
    for config, message in [
        ({"success_order": 0.5}, "success_order 0.5 must be at least 1"),
        ({"success_order": 2, **MODES["labels"]}, "success_order 2 must be"),
        ({"advantage": "group", "samples_per_prompt": 1, **MODES["labels"]}, "samples_per_prompt >= 2"),
        ({"kl_target": 0.1}, "kl_target 0.1 adapts kl_coef"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, config=config)


# ------------------------------------------------------------------------------------------- clip range, KL, entropy


@pytest.mark.parametrize("module, mode", [(expected_step, "expected"), (sampled_step, "labels")])
def test_both_steps_take_the_upper_clip_range(module, mode, tmp_path, monkeypatch):
    ranges, surrogate = [], clipped_surrogate
    monkeypatch.setattr(module, "clipped_surrogate", lambda r, a, *clip: ranges.append(clip) or surrogate(r, a, *clip))
    for high in (None, 0.5):
        make_trainer(tmp_path, config={"clip_range_high": high, **MODES.get(mode, {})}).train()
    assert set(ranges[: len(ranges) // 2]) == {(0.2, 0.2)} and set(ranges[len(ranges) // 2 :]) == {(0.2, 0.5)}


@pytest.mark.parametrize("mode", ["expected", "labels"])
def test_the_kl_coefficient_adapts_and_resumes(mode, tmp_path):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, **MODES.get(mode, {})}
    config |= {"kl_coef": 0.05, "kl_target": 0.02}
    straight = make_trainer(tmp_path / "straight", config=config)
    straight.train()
    coefficient = 0.05
    for line in step_logs(straight):
        assert line["objective/kl_coef"] == coefficient
        coefficient = adapted_kl_coef(coefficient, line["objective/kl"], 0.02)
    broken = make_trainer(tmp_path / "broken", config=config)
    broken.add_callback(At(2, lambda control: setattr(control, "should_training_stop", True)))
    broken.train()
    resumed = make_trainer(tmp_path / "broken", config=config)
    resumed.train(resume_from_checkpoint=str(resumed.last_checkpoint()))
    assert len(step_logs(resumed)) == 4 and figures(resumed) == figures(straight)
    assert resumed.kl_coef == straight.kl_coef == coefficient != 0.05


@pytest.mark.parametrize("mode", ["expected", "labels"])
def test_the_entropy_coefficient_falls_to_its_end(mode, tmp_path):
    config = {"max_steps": 3, "entropy_coef": 0.5, "entropy_end": 0.1, **MODES.get(mode, {})}
    trainer = make_trainer(tmp_path, config=config)
    trainer.train()
    assert [line["policy/entropy_coef"] for line in step_logs(trainer)] == pytest.approx([0.5, 0.3, 0.1])
    found = make_trainer(tmp_path, config={**config, "entropy_end": None})
    found.train()
    assert not any("policy/entropy_coef" in line for line in step_logs(found))
