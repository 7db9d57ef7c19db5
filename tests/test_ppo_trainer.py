"""PPO's parts against plain computations, its gradients against autograd, and a task that it has to learn."""

import contextlib
import copy
import math
import random
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import EOS, VOCABULARY, plain_label_log_probs, tiny_model, with_lora, word_tokenizer
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

import rewards
import tasks
from engine import models
from engine.decoding import Sampling
from engine.trees import Answer, Tree
from evaluation.answer_spaces import AnswerFormat
from machine.errors import TrainingError
from run.checkpoints import step_of
from run.progress import quiet_trainer
from tasks import Task
from training import expected_step, sampled_step
from training.objectives import (
    clipped_surrogate,
    clipped_value_loss,
    explained_variance,
    gae,
    leave_one_out_advantages,
    whiten,
)
from training.ppo_step import KL_SHARE, Step
from training.ppo_trainer import VALUE_HEAD_FILE, PPOConfig, PPOTrainer
from training.sampler import StratifiedSampler

WORDS = ("no", "yes")
LONG_WORDS = ("not", "not at all", "yes")


@dataclass(frozen=True)
class OpenFormat(AnswerFormat):
    """Free answers end where `stop` says, else at the end-of-sequence token or the last token there may be."""

    stop: Callable[[str], bool] = lambda text: False
    credit: Callable[[str, bool], int | None] | None = None

    def stop_rule(self, early: bool = False) -> Callable[[str], bool]:
        return self.stop

    def label_length(self, text: str, ended: bool = True) -> int | None:
        if self.credit is not None:
            return self.credit(text, ended)
        return len(text) if text in self.task.words else None


def answer_format(words: tuple[str, ...], **how) -> OpenFormat:
    return OpenFormat(Task("colours", folder="", files={}, columns={}, fields=(), metrics=(), words=words), **how)


@pytest.fixture(autouse=True)
def an_analysis_ends_with_a_word_of_the_tokenizer(monkeypatch):
    monkeypatch.setattr(rewards, "ANALYSIS_END", "w9")


def tokens(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def make_rows(count: int = 16, labels: int = 2) -> list[dict]:
    """Prompts with a colour somewhere among other words; the label is the colour."""
    draw, rows = random.Random(0), []
    for i in range(count):
        words = [f"w{draw.randint(0, 31)}" for _ in range(draw.randint(1, 4))]
        words.insert(draw.randint(0, len(words)), ("red", "blue", "all")[i % labels])
        rows.append({"id": i, "prompt_ids": tokens(f"Text: {' '.join(words)} Answer:"), "label": i % labels})
    return rows


def word_reward(words: tuple[str, ...] = WORDS):
    def right_word(completions, label, **columns) -> list[float]:
        given = [text.removesuffix(rewards.JUDGEMENT_END) for text in completions]
        return [-3.0 if word not in words else 1.0 if word == words[gold] else -1.0 for word, gold in zip(given, label)]

    return right_word


def noisy_reward(completions, id, **columns) -> list[float]:
    """Any number, always the same one for the same text."""
    return [random.Random(f"{row} {text}").uniform(-1, 1) for text, row in zip(completions, id)]


def make_config(folder: Path, **changes) -> PPOConfig:
    settings = dict(
        output_dir=str(folder),
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        use_cpu=True,
        per_device_train_batch_size=8,
        dataloader_drop_last=True,
        max_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        max_response_length=4,
        seed=0,
    )
    return PPOConfig(**{**settings, **changes})


def make_trainer(
    folder: Path, model=None, reward=None, rows=None, words=WORDS, config=None, how=None, **arguments
) -> PPOTrainer:
    """how: options of OpenFormat."""
    trainer = PPOTrainer(
        with_lora(tiny_model()) if model is None else model,
        reward or word_reward(words),
        make_config(folder, **(config or {})),
        rows or make_rows(),
        word_tokenizer(),
        answer_format(words, **(how or {})),
        **arguments,
    )
    quiet_trainer(trainer)
    return trainer


MODES = {
    "labels": dict(answer_space="labels", policy_gradient="sampled"),
    "free": dict(answer_space="free", policy_gradient="sampled"),
    "analysis": dict(answer_space="labels", policy_gradient="sampled"),
}


def mode_trainer(folder: Path, mode: str, config=None, how=None, **arguments) -> PPOTrainer:
    how = {"use_CoT": mode == "analysis", **(how or {})}
    config = {**MODES[mode], "samples_per_prompt": 3, **(config or {})}
    return make_trainer(folder, reward=noisy_reward, words=LONG_WORDS, config=config, how=how, **arguments)


def policy_weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and "value_head" not in n}


def policy_gradient(model) -> torch.Tensor:
    return torch.cat(
        [p.grad.flatten() for n, p in model.named_parameters() if p.requires_grad and "value_head" not in n]
    )


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())


def step_logs(trainer: PPOTrainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "policy/loss" in line]


# ---------------------------------------------------------------------------------------------------- pure functions


def test_gae_against_the_sum_of_its_definition():
    draw = random.Random(0)
    for _ in range(50):
        length, gamma, lam = draw.randint(1, 6), draw.choice([1.0, 0.9]), draw.choice([1.0, 0.95, 0.0])
        r = [draw.uniform(-1, 1) for _ in range(length)]
        v = [draw.uniform(-1, 1) for _ in range(length)]
        delta = [r[t] + gamma * (v[t + 1] if t + 1 < length else 0.0) - v[t] for t in range(length)]
        expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]
        advantages, returns = gae(r, v, gamma, lam)
        assert advantages == pytest.approx(expected)
        assert returns == pytest.approx([a + b for a, b in zip(expected, v)])
    # With gamma and lambda 1 the return is what is still to come.
    assert gae([1.0, 2.0, 3.0], [5.0, 5.0, 5.0], 1.0, 1.0)[1] == [6.0, 5.0, 3.0]
    assert gae([], [], 1.0, 1.0) == ([], [])


def test_whiten():
    x = torch.tensor([1.0, 2.0, 6.0])
    assert float(whiten(x).mean()) == pytest.approx(0, abs=1e-6) and float(whiten(x).std()) == pytest.approx(1)
    for same in (torch.tensor([]), torch.tensor([3.0]), torch.tensor([2.0, 2.0, 2.0])):
        assert torch.equal(whiten(same), same)


def test_clipped_surrogate():
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5, 1.1])
    advantage = torch.tensor([2.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    assert clipped_surrogate(ratio, advantage, 0.2, 0.2).tolist() == pytest.approx([2.0, 1.2, 0.5, -1.5, -0.8, -1.1])
    # Outside of the clip range, on the side the advantage asks for, nothing pushes any further.
    ratio = torch.tensor([1.5, 0.5, 1.5], requires_grad=True)
    clipped_surrogate(ratio, torch.tensor([1.0, -1.0, -1.0]), 0.2, 0.2).sum().backward()
    assert ratio.grad.tolist() == [0.0, 0.0, -1.0]


def test_clipped_value_loss():
    old, returns = torch.zeros(3), torch.tensor([1.0, 1.0, 0.1])
    new = torch.tensor([0.1, 0.9, 0.9], requires_grad=True)
    loss = clipped_value_loss(new, old, returns, 0.2)
    # Inside: plain. Jumped towards the return: the loss of the clipped value stands. Jumped past it: the larger one.
    assert loss.tolist() == pytest.approx([0.5 * 0.9**2, 0.5 * 0.8**2, 0.5 * 0.8**2])
    loss.sum().backward()
    assert new.grad.tolist() == pytest.approx([-0.9, 0.0, 0.8])


def test_explained_variance():
    returns = torch.tensor([1.0, -1.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.zeros(3), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(torch.randn(3), torch.ones(3)) == 0.0


def test_leave_one_out_advantages_against_a_plain_loop():
    torch.manual_seed(0)
    for _ in range(20):
        n = int(torch.randint(1, 30, ()))
        prompt, node = torch.randint(3, (n,)), torch.randint(4, (n,))
        advantages, returns = torch.randn(n), torch.randn(n)
        found = leave_one_out_advantages(advantages, returns, prompt, node)
        for i in range(n):
            others = [float(returns[j]) for j in range(n) if j != i and prompt[j] == prompt[i] and node[j] == node[i]]
            expected = float(returns[i]) - sum(others) / len(others) if others else float(advantages[i])
            assert float(found[i]) == pytest.approx(expected, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------- sampler


def test_every_batch_has_the_shares_of_the_data():
    labels = ["a"] * 300 + ["b"] * 100
    sampler = StratifiedSampler(labels, seed=0)
    orders = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(400)) and len(sampler) == 400
        counts = [sum(labels[i] == "b" for i in order[k : k + 16]) for k in range(0, 400, 16)]
        assert all(2 <= count <= 6 for count in counts)  # 4 on average; plain shuffling gives 0 to 10
        orders.append(order)
    assert len(set(map(tuple, orders))) == 5
    sampler.set_epoch(0)
    assert list(sampler) == orders[0]
    assert list(StratifiedSampler(labels, seed=1)) != orders[0]


def test_an_epoch_takes_every_row_once_and_the_next_another_order(tmp_path):
    seen = []

    def watching(completions, id, label, **columns):
        seen.append(list(dict.fromkeys(id)))
        return word_reward()(completions, label)

    trainer = make_trainer(tmp_path, reward=watching, rows=make_rows(24), config={"max_steps": 6})
    trainer.train()
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == list(range(24)) and first != second
    assert all(abs(sum(i % 2 for i in batch) - 4) <= 1 for batch in seen)


def test_labels_may_be_numbers_or_missing(tmp_path):
    rows = [{**row, "label": (0.3, 4.9, None)[i % 3]} for i, row in enumerate(make_rows())]
    trainer = make_trainer(tmp_path, rows=rows)
    assert sorted(trainer._get_train_sampler()) == list(range(16))


# ------------------------------------------------------------------------------------------ log-probs, ratio, rewards


def caught_rollout(trainer: PPOTrainer, rows: list[dict]) -> sampled_step.Rollout:
    """One training step without the optimizer's; returns its rollout."""
    caught, roll_out = [], sampled_step.roll_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled_step, "roll_out", lambda step: caught.append(roll_out(step)) or caught[-1])
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, {"rows": rows})
    return caught[0]


def plain_log_probs(trainer: PPOTrainer, rollout: sampled_step.Rollout) -> torch.Tensor:
    """(actions,) log-probabilities, each from a forward of its own over the whole sequence."""
    found, temperature = [], trainer.args.temperature
    trie = trainer.tasks[0].policy.trie
    for p, node, column in zip(rollout.prompt.tolist(), rollout.node.tolist(), rollout.column.tolist()):
        tree = rollout.trees[p]
        ids = torch.tensor([rollout.prompts[p] + tree.path(node)])
        logits = trainer.model(input_ids=ids).logits[0, -1] / temperature
        allowed, token = tree.allowed.get(node, list(range(len(logits)))), column
        if trainer.tasks[0].policy.only_labels:
            allowed = [t for t, free in zip(trie.vocabulary, trie.mask[node] == 0) if free]
            token = trie.vocabulary[column]
        found.append(torch.log_softmax(logits[allowed], -1)[allowed.index(token)])
    return torch.stack(found)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("mode", MODES)
def test_one_distribution_for_sampling_updates_and_reference(mode, temperature, tmp_path):
    """Old log-probs, the ratio, the gradient and the KL all agree with plain forwards at the same temperature."""
    trainer = mode_trainer(tmp_path, mode, {"temperature": temperature, "kl_coef": 0.1, "tokens_per_micro_batch": 40})
    ratios, surrogate = [], sampled_step.clipped_surrogate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled_step, "clipped_surrogate", lambda r, *rest: ratios.append(r) or surrogate(r, *rest))
        rollout = caught_rollout(trainer, make_rows(8))
    ratio = torch.cat(ratios)
    assert len(ratios) > 1 and len(ratio) == len(rollout.node)
    assert float((ratio - 1).abs().max()) < 1e-5

    found = policy_gradient(trainer.model).clone()
    trainer.model.zero_grad()
    log_probs = plain_log_probs(trainer, rollout)
    assert torch.allclose(rollout.log_probs, log_probs.detach(), atol=1e-4)
    (-(rollout.advantages * log_probs).mean()).backward()
    assert error(found, policy_gradient(trainer.model)) < 1e-4
    with trainer.model.disable_adapter():
        reference = plain_log_probs(trainer, rollout)
    kl = float((log_probs - reference).mean().detach())
    assert trainer.step_metrics["objective/kl"] == pytest.approx(kl, abs=1e-4) and abs(kl) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_only_the_first_update_has_a_ratio_of_one(mode, tmp_path, monkeypatch):
    ratios, surrogate = [], sampled_step.clipped_surrogate
    monkeypatch.setattr(sampled_step, "clipped_surrogate", lambda r, *rest: ratios.append(r) or surrogate(r, *rest))
    trainer = mode_trainer(tmp_path, mode, {"ppo_epochs": 2, "num_minibatches": 2, "learning_rate": 1e-2})
    trainer.train()
    assert len(ratios) == 4
    first, later = (float((ratio.detach() - 1).abs().max()) for ratio in (ratios[0], ratios[2]))
    assert first < 1e-5 and later > 1e-3


@pytest.mark.parametrize("mode", ["labels", "free"])
def test_gradients_do_not_depend_on_micro_batches(mode, tmp_path):
    """The loss is a mean over all actions of the batch, not over those of a micro-batch."""
    found = []
    for budget in (1, 50, 10_000):
        config = {"tokens_per_micro_batch": budget, "entropy_coef": 0.1}
        trainer = mode_trainer(tmp_path, mode, config)
        rollout = caught_rollout(trainer, make_rows(8))
        found.append((rollout, policy_gradient(trainer.model), trainer.model.value_head.weight.grad))
    for rollout, gradient, head in found[1:]:
        assert torch.equal(rollout.column, found[0][0].column)
        assert error(gradient, found[0][1]) < 1e-4 and error(head, found[0][2]) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_the_first_update_takes_the_forward_of_the_rollout(mode, tmp_path):
    """Two updates on one rollout: the same weights after them, whether the first had a forward of its own or not."""
    found = []
    for keeps in (True, False):
        trainer = mode_trainer(tmp_path, mode, {"ppo_epochs": 2, "entropy_coef": 0.1})
        batches, begun = trainer.engine.training_batches, []
        trainer.engine.training_batches = lambda *rows, batches=batches, begun=begun: begun.append(1) or batches(*rows)
        if not keeps:
            states = trainer.engine.states
            trainer.engine.states = lambda *rows, keep=False, states=states, **more: states(*rows, **more)
            generate = trainer.engine.generate
            trainer.engine.generate = lambda *rows, keep=False, generate=generate, **more: generate(*rows, **more)
        trainer.train()
        assert len(begun) == (1 if keeps else 2)
        found.append(torch.cat([weight.flatten() for weight in policy_weights(trainer.model).values()]))
    assert error(found[0], found[1]) < 1e-5


@pytest.mark.parametrize("mode", [*MODES, "expected"])
def test_an_update_that_runs_out_of_memory_is_begun_again(mode, tmp_path):
    """Half of the gradients are there when memory runs out; they are dropped, and the step is as any other."""
    found = []
    for fails in (False, True):
        trainer = make_trainer(tmp_path) if mode == "expected" else mode_trainer(tmp_path, mode)
        batches, begun = trainer.engine.training_batches, []

        def fail_once(prompts, trees, batches=batches, begun=begun):
            for number, batch in enumerate(batches(prompts, trees)):
                if number == 1 and not begun:
                    begun.append(number)
                    raise torch.OutOfMemoryError("CUDA out of memory")
                yield batch

        trainer.engine.tokens_per_micro_batch = 40
        if fails:
            trainer.engine.training_batches = fail_once
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model, {"rows": make_rows(8)})
        found.append((float(loss), policy_gradient(trainer.model).clone()))
        assert trainer.engine.tokens_per_micro_batch == (20 if fails else 40)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4, abs=1e-5) and error(found[1][1], found[0][1]) < 1e-4


NEEDS_A_CARD = (pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card"))


class OneDevice(TorchDispatchMode):
    """An index on the CPU into a tensor on a card is copied there, which is waited for; the meta device takes it."""

    supports_higher_order_operators = True  # flex_attention

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        if operation not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            assert len({x.device for x in tensors}) <= 1, f"{operation} of tensors on two devices"
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=NEEDS_A_CARD)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "expected"])
def test_nothing_in_an_update_waits_for_a_card(mode, packed, device, tmp_path, monkeypatch, request):
    """Torch's meta device has no numbers, so reading one there is an error; a card also notices copies that wait."""

    class Update(Exception):
        pass

    def stop(self, add_gradient):
        raise Update(add_gradient)

    config = {"policy_gradient": "expected", "entropy_coef": 0.1, "kl_coef": 0.1}
    trainer = make_trainer(tmp_path, config=config) if mode == "expected" else mode_trainer(tmp_path, mode)
    monkeypatch.setattr(Step, "update", stop)
    step = Step(trainer, trainer.tasks[0], make_rows(8))
    with pytest.raises(Update) as caught:
        (expected_step.expected_step if mode == "expected" else sampled_step.sampled_step)(step)
    add_gradient = caught.value.args[0]
    known = add_gradient.args[1]  # what the step knows of its rollout
    if mode == "expected":
        names = ("rewards", "reference", "old")
    else:
        names, known.kept = ("column", "log_probs", "values", "advantages", "returns"), None
    for name in names:
        setattr(known, name, getattr(known, name).to(device))
    trainer.model.to(device)
    if device == "meta":
        request.getfixturevalue("as_on_a_card")
    network = trainer.engine.network
    network.packed, network.flex, network._columns = packed, True, {}
    monkeypatch.setattr(PPOConfig, "device", torch.device(device))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)  # knows no meta device
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with OneDevice() if device == "meta" else contextlib.nullcontext():
            sums = add_gradient(list(range(8)), list(range(8)))
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert sums["loss"].device.type == device
    assert all(p.grad is not None for n, p in trainer.model.named_parameters() if "lora_" in n)


def test_no_memory_at_all_stops_the_run_with_the_step(tmp_path):
    trainer = make_trainer(tmp_path)

    def full(*_args, **_more):
        raise MemoryError("DefaultCPUAllocator: can't allocate memory")

    trainer.engine.training_batches = full
    with pytest.raises(TrainingError, match=r"one row at a time.*step 1; there is no checkpoint yet"):
        trainer.training_step(trainer.model, {"rows": make_rows(8)})


@pytest.mark.parametrize("changes", [{"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}])
def test_settings_of_trainer_that_a_rollout_has_no_use_for_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match=next(iter(changes))):
        make_trainer(tmp_path, config=changes)


@pytest.mark.parametrize("mode", MODES)
def test_only_a_choice_among_labels_earns_the_entropy_bonus(mode, tmp_path):
    trainer = mode_trainer(tmp_path, mode)
    rollout = caught_rollout(trainer, make_rows(8))
    for tree in rollout.trees:
        nodes = torch.arange(len(tree))
        states = [torch.randn(len(tree), trainer.model.config.hidden_size)]
        (log_probs,) = trainer.tasks[0].policy.log_distributions(states, [tree])
        choices = [trainer.tasks[0].policy.label_choice(tree, node) for node in nodes.tolist()]
        entropy, paid = trainer.tasks[0].policy.entropy(log_probs, choices)
        if mode == "labels":
            chosen = set(nodes.tolist())
        elif mode == "free":
            chosen = {0}
        else:
            chosen = set(tree.allowed)
            assert 0 not in chosen and chosen
        assert set(paid.nonzero()[:, 0].tolist()) == set((entropy > 0).nonzero()[:, 0].tolist()) | chosen == chosen


def test_the_critic_learns_returns_and_leaves_the_policy_alone(tmp_path):
    trainer = mode_trainer(tmp_path, "free", {"value_coef": 0.5})
    torch.nn.init.normal_(trainer.model.value_head.weight, std=0.1)
    rollout = caught_rollout(trainer, make_rows(8))
    states = torch.cat([s[None] for s in (plain_state(trainer, rollout, a) for a in range(len(rollout.node)))])
    head = copy.deepcopy(trainer.model.value_head)
    head.zero_grad()
    values = head(states.detach())[:, 0]
    assert torch.allclose(rollout.values, values.detach(), atol=1e-4)
    (0.5 * 0.5 * (values - rollout.returns) ** 2).mean().backward()
    assert error(trainer.model.value_head.weight.grad, head.weight.grad) < 1e-4
    found = policy_gradient(trainer.model)
    trainer.args.value_coef = 50.0
    caught_rollout(trainer, make_rows(8))
    assert torch.equal(found, policy_gradient(trainer.model))


def plain_state(trainer, rollout, action: int) -> torch.Tensor:
    p, node = int(rollout.prompt[action]), int(rollout.node[action])
    ids = torch.tensor([rollout.prompts[p] + rollout.trees[p].path(node)])
    return trainer.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]


def test_the_token_that_completes_the_label_earns_the_reward(tmp_path):
    def credit(text, ended):
        return next((len(word) for word in ("not at all", "yes") if text.startswith(word)), None)

    trainer = make_trainer(
        tmp_path, config={"answer_space": "free", "policy_gradient": "sampled"}, how={"credit": credit}
    )
    step = types.SimpleNamespace(task=trainer.tasks[0], engine=trainer.engine)

    def credited(text: str, ended: bool = False, label: int | None = None) -> int:
        ids = tokens(text)
        answer = Answer(ids, list(range(len(ids))), ended, text.removesuffix(" <eos>"), label)
        return sampled_step.earning_token(step, answer)

    assert credited("yes w1 w2") == 0
    assert credited("not at all w1") == 2
    assert credited("not at w1 all") == 3  # no label: the last token
    assert credited("w1 w2 <eos>", ended=True) == 2
    assert credited("yes <eos>", ended=True) == 0
    assert credited("w1 yes", label=1) == 1  # chosen among the labels: its decision comes last


def test_the_reward_stands_where_it_is_earned(tmp_path):
    """With a discount the returns tell where the reward was put; after it there is nothing left to earn."""
    texts = {}

    def watching(completions, id, **columns):
        scores = noisy_reward(completions, id)
        texts.update(zip(zip(id, completions), scores))
        return scores

    def credit(text, ended):
        first = text.split()[:1]
        return len(first[0]) if first and int(VOCABULARY[first[0]]) % 2 else None

    config = {"answer_space": "free", "policy_gradient": "sampled", "gamma": 0.5, "samples_per_prompt": 4}
    trainer = make_trainer(tmp_path, reward=watching, config=config, how={"credit": credit})
    rollout = caught_rollout(trainer, make_rows(8))
    start, kinds = 0, set()
    decode = trainer.processing_class.decode
    depths = [rollout.trees[p].depths[n] for p, n in zip(rollout.prompt.tolist(), rollout.node.tolist())]
    ends = [i for i in range(1, len(depths) + 1) if i == len(depths) or depths[i] == 0]
    for end in ends:
        ids = [t for t in rollout.column[start:end].tolist() if t != EOS]
        text = decode(ids)
        score = texts[int(rollout.prompt[start]), text]
        place = 0 if credit(text, True) else end - start - 1
        kinds.add(place > 0)
        expected = [0.5 ** (place - t) * score if t <= place else 0.0 for t in range(end - start)]
        assert rollout.returns[start:end].tolist() == pytest.approx(expected, abs=1e-5)
        start = end
    assert len(ends) == 32 and kinds == {True, False}


def test_the_kl_is_subtracted_token_by_token(tmp_path):
    trainer = mode_trainer(
        tmp_path, "free", {"kl_coef": 0.3, "samples_per_prompt": 1}, how={"credit": lambda text, ended: None}
    )
    trainer.tasks[0].reward_funcs = [lambda completions, **columns: [float(i) for i in range(len(completions))]]
    rollout = caught_rollout(trainer, make_rows(8))
    log_probs = plain_log_probs(trainer, rollout)
    with trainer.model.disable_adapter():
        kl = (log_probs - plain_log_probs(trainer, rollout)).detach()
    for p in range(8):
        mine = rollout.prompt == p
        to_come = kl[mine].flip(0).cumsum(0).flip(0)
        assert torch.allclose(rollout.returns[mine], p - 0.3 * to_come, atol=1e-3)


@pytest.mark.parametrize("samples, lam", [(1, 1.0), (4, 1.0), (4, 0.5)])
def test_advantages_are_whitened_over_the_whole_rollout(samples, lam, tmp_path):
    trainer = mode_trainer(tmp_path, "free", {"samples_per_prompt": samples, "lam": lam, "tokens_per_micro_batch": 50})
    torch.nn.init.normal_(trainer.model.value_head.weight, std=0.1)
    rollout = caught_rollout(trainer, make_rows(8))
    depths = [rollout.trees[p].depths[n] for p, n in zip(rollout.prompt.tolist(), rollout.node.tolist())]
    starts = [i for i, depth in enumerate(depths) if depth == 0]
    advantages = []
    for begin, end in zip(starts, [*starts[1:], len(depths)]):
        # Every token's reward but that of the last is 0: the return is the answer's reward.
        values = rollout.values[begin:end].tolist()
        scores = [0.0] * (end - begin - 1) + [noisy_score(trainer, rollout, begin, end)]
        advantages += gae(scores, values, 1.0, lam)[0]
    expected = torch.tensor(advantages)
    if lam == 1.0 and samples > 1:
        expected = leave_one_out_advantages(expected, rollout.returns, rollout.prompt, rollout.node)
    assert torch.allclose(rollout.advantages, (expected - expected.mean()) / expected.std(), atol=1e-4)


def noisy_score(trainer, rollout, begin: int, end: int) -> float:
    text = trainer.processing_class.decode([t for t in rollout.column[begin:end].tolist() if t != EOS])
    return noisy_reward([text], [int(rollout.prompt[begin])])[0]


# --------------------------------------------------------------------------------------------------------- no signal


@pytest.mark.parametrize("mode", MODES)
def test_equal_rewards_leave_the_policy_alone(mode, tmp_path):
    trainer = mode_trainer(tmp_path, mode)
    trainer.tasks[0].reward_funcs = [lambda completions, **columns: [-1.0] * len(completions)]
    torch.nn.init.normal_(trainer.model.value_head.weight)  # a critic with opinions
    before = policy_weights(trainer.model)
    trainer.train()
    assert all(torch.equal(before[name], weight) for name, weight in policy_weights(trainer.model).items())
    assert step_logs(trainer)[0]["policy/equal_rewards"] == 1.0


@pytest.mark.parametrize("term", [{"kl_coef": 0.1}, {"entropy_coef": 0.1}])
def test_equal_rewards_leave_kl_and_entropy(term, tmp_path):
    trainer = mode_trainer(tmp_path, "labels", term)
    trainer.tasks[0].reward_funcs = [lambda completions, **columns: [-1.0] * len(completions)]
    before = policy_weights(trainer.model)
    trainer.train()
    assert any(not torch.equal(before[name], weight) for name, weight in policy_weights(trainer.model).items())


def test_equal_rewards_in_expectation(tmp_path):
    trainer = make_trainer(tmp_path, reward=lambda completions, **columns: [-1.0] * len(completions))
    before = policy_weights(trainer.model)
    trainer.train()
    after = policy_weights(trainer.model)
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-8


# ------------------------------------------------------------------------------------------------- exact expectations


def label_log_probs(model, prompt: list[int], words: tuple[str, ...], temperature: float) -> torch.Tensor:
    """(labels,) with gradient, by enumeration and plain forwards."""
    # This tokenizer has no token for the closing tag.
    spellings = [[*tokens(word), VOCABULARY["<unk>"]] for word in words]
    return plain_label_log_probs(model, prompt, spellings, temperature)


@pytest.mark.parametrize(
    "kl_coef, entropy_coef, temperature", [(0, 0, 1.0), (0.2, 0, 1.0), (0, 0.1, 1.0), (0.2, 0.1, 0.6)]
)
def test_the_expected_gradient_is_that_of_the_expected_reward(kl_coef, entropy_coef, temperature, tmp_path):
    config = dict(kl_coef=kl_coef, entropy_coef=entropy_coef, temperature=temperature, tokens_per_micro_batch=60)
    trainer = make_trainer(tmp_path, reward=word_reward(LONG_WORDS), words=LONG_WORDS, config=config)
    rows, model = make_rows(8, labels=3), trainer.model
    loss = trainer.training_step(model, {"rows": rows})
    found = policy_gradient(model).clone()
    model.zero_grad()
    objective, reward_mean, entropies, kls = 0.0, 0.0, [], []
    for row in rows:
        new = label_log_probs(model, row["prompt_ids"], LONG_WORDS, temperature)
        with torch.no_grad(), model.disable_adapter():
            reference = label_log_probs(model, row["prompt_ids"], LONG_WORDS, temperature)
        reward = torch.tensor(word_reward(LONG_WORDS)(LONG_WORDS, [row["label"]] * 3))
        expected, kl, entropy = (
            (new.exp() * reward).sum(),
            (new.exp() * (new - reference)).sum(),
            -(new.exp() * new).sum(),
        )
        objective = objective + (expected - kl_coef * kl + entropy_coef * entropy) / len(rows)
        reward_mean += float(expected.detach()) / len(rows)
        entropies.append(float(entropy.detach()))
        kls.append(float(kl.detach()))
    (-objective).backward()
    assert error(found, policy_gradient(model)) < 1e-4
    logged = trainer.step_metrics
    assert logged["objective/reward"] == pytest.approx(reward_mean, abs=1e-4)
    assert logged["objective/entropy"] == pytest.approx(sum(entropies) / len(rows), abs=1e-4)
    measured = kls if kl_coef else kls[: len(rows) // KL_SHARE]
    assert logged["objective/kl"] == pytest.approx(sum(measured) / len(measured), abs=1e-4)
    assert sum(value for name, value in logged.items() if "share/" in name) == pytest.approx(1.0, abs=1e-4)
    # At a ratio of 1 the advantages' mean under the policy is 0: what is left of the loss is the entropy.
    assert float(loss) == pytest.approx(-entropy_coef * sum(entropies) / len(rows), abs=1e-4)


@pytest.mark.parametrize("mode", ["expected", *MODES])
def test_epochs_minibatches_and_samples(mode, tmp_path):
    config = {"ppo_epochs": 3, "num_minibatches": 2, "max_steps": 2, "learning_rate": 1e-2, "clip_range": 0.05}
    trainer = make_trainer(tmp_path, config=config) if mode == "expected" else mode_trainer(tmp_path, mode, config)
    before, head = policy_weights(trainer.model), trainer.model.value_head.weight.detach().clone()
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    after = policy_weights(trainer.model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(frozen[n], p) for n, p in trainer.model.named_parameters() if n in frozen)
    assert torch.equal(head, trainer.model.value_head.weight) == (mode == "expected")
    states = [
        state for weight, state in trainer.optimizer.state.items() if weight is not trainer.model.value_head.weight
    ]
    assert {int(state["step"]) for state in states} == {2 * 3 * 2}
    logs = step_logs(trainer)
    assert [line["step"] for line in logs] == [1, 2]
    wanted = {f"objective/{name}" for name in ("reward", "reward_std", "kl", "entropy", "invalid_rate")}
    wanted |= {f"policy/{name}" for name in ("clip_fraction", "approx_kl", "loss", "learning_rate", "grad_norm")}
    wanted |= {f"time/{name}" for name in ("seconds_per_step", "samples_per_second", "tokens_per_second")}
    wanted |= set() if mode == "expected" else {"value/loss", "value/explained_variance", "objective/response_length"}
    assert all(wanted <= set(line) for line in logs)
    assert all(math.isfinite(value) for line in logs for value in line.values())
    assert max(line["policy/clip_fraction"] for line in logs) > 0
    assert trainer.episodes and {"prompt", "answer", "reward", "row", "task"} == set(trainer.episodes[0])


def test_rewards_of_several_functions_add_up_and_take_columns(tmp_path):
    seen = []

    def length(completions, prompt_ids, extra, **columns):
        seen.append(extra)
        return [float(len(ids)) for ids in prompt_ids]

    rows = Dataset.from_list([{**row, "extra": f"column {row['id']}"} for row in make_rows()])
    trainer = make_trainer(tmp_path, reward=[word_reward(), length], rows=rows)
    trainer.train()
    assert seen[0][:2] == [seen[0][0]] * 2 and len(seen[0]) == 16  # every label of 8 prompts
    episode = trainer.episodes[0]
    gold = WORDS[episode["row"]["label"]]
    assert episode["reward"] == len(episode["prompt"]) + (1.0 if episode["answer"] == gold else -1.0)


@pytest.mark.parametrize("mode", ["expected", "free"])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_accuracy_is_logged_where_rows_have_labels(labelled, mode, tmp_path):
    rows = [row if labelled else {"id": row["id"], "prompt_ids": row["prompt_ids"]} for row in make_rows()]
    trainer = make_trainer(tmp_path, reward=noisy_reward, rows=rows, config=MODES.get(mode))
    trainer.train()
    assert ("objective/accuracy" in step_logs(trainer)[0]) == labelled


def test_a_text_prompt_is_tokenized(tmp_path):
    rows = [{"prompt": "Text: red Answer:", "label": 0}, {"prompt": "Text: blue w1 Answer:", "label": 1}] * 4
    trainer = make_trainer(tmp_path, rows=rows)
    trainer.train()
    assert trainer.episodes[0]["prompt"] in (tokens("Text: red Answer:"), tokens("Text: blue w1 Answer:"))


def test_a_model_without_an_adapter_is_trained_whole(tmp_path):
    model = tiny_model()
    before = policy_weights(model)
    trainer = make_trainer(tmp_path, model=model)
    trainer.train()
    assert not torch.equal(before["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_the_fallback_trains_too(tmp_path):
    how = dict(reward=word_reward(LONG_WORDS), words=LONG_WORDS, config={**MODES["labels"], "temperature": 5.0})
    trainer = make_trainer(tmp_path, **how)
    trainer.engine.network.plain = True  # as `loading.check` says of a model that nothing else fits
    rollout = caught_rollout(trainer, make_rows(8))
    found = policy_gradient(trainer.model).clone()
    trainer.model.zero_grad()
    (-(rollout.advantages * plain_log_probs(trainer, rollout)).mean()).backward()
    assert error(found, policy_gradient(trainer.model)) < 1e-4


# ------------------------------------------------------------------------------------------------------------ errors


def test_what_cannot_work_is_refused(tmp_path):
    for config, words, how, message in [
        ({}, (), {}, "at least two words"),
        ({"num_minibatches": 3}, WORDS, {}, "cannot be divided"),
        ({"answer_space": "free"}, WORDS, {}, "needs answer_space='labels'"),
        ({}, WORDS, {"use_CoT": True}, "needs answer_space='labels' without use_CoT"),
        ({}, ("no", "no"), {}, "spells the label 'no' of colours like 'no'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, words=words, config=config, how=how)


@pytest.mark.parametrize("mode", ["expected", "labels", "free"])
@pytest.mark.parametrize("bad", [[1.0], [], [float("nan")] * 100])
def test_a_reward_function_must_return_one_number_each(mode, bad, tmp_path):
    def broken(completions, **columns):
        return bad[: len(completions)]

    trainer = make_trainer(tmp_path, reward=broken, config=MODES.get(mode))
    with pytest.raises(TrainingError, match="the reward function broken must return one finite number per"):
        trainer.train()


class At(TrainerCallback):
    """Do something after a step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


@pytest.mark.parametrize("mode", ["expected", *MODES])
def test_nan_stops_with_the_step_and_the_last_checkpoint(mode, tmp_path):
    config = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **MODES.get(mode, {})}
    trainer = make_trainer(tmp_path, config=config, how={"use_CoT": mode == "analysis"})

    def poison(control):
        weight = next(p for n, p in trainer.model.named_parameters() if "lora_A" in n)
        weight.data[0, 0] = float("nan")

    trainer.add_callback(At(3, poison))
    with pytest.raises(TrainingError, match=f"at step 4; the last checkpoint is {tmp_path}/step-2"):
        trainer.train()


@pytest.mark.parametrize("minibatches", [1, 2])
def test_an_infinite_gradient_stops_before_the_weights_change(minibatches, tmp_path):
    trainer = make_trainer(tmp_path, config={"num_minibatches": minibatches})
    before = policy_weights(trainer.model)
    next(p for n, p in trainer.model.named_parameters() if "lora_B" in n).register_hook(lambda g: g * float("inf"))
    with pytest.raises(TrainingError, match="the gradient is (nan|inf) at step 1; there is no checkpoint yet"):
        trainer.train()
    assert all(torch.equal(before[name], weight) for name, weight in policy_weights(trainer.model).items())


# ---------------------------------------------------------------------------------------------- checkpoints and resume


def figures(trainer: PPOTrainer) -> list[dict]:
    """All that was logged, but for times."""
    lines = trainer.state.log_history
    return [
        {n: v for n, v in line.items() if not n.startswith("time/") and "seconds" not in n}
        for line in lines
        if "train_runtime" not in line
    ]


@pytest.mark.parametrize("mode", ["expected", *MODES])
def test_resume_equals_a_straight_run_bit_for_bit(mode, tmp_path):
    config = {
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        **MODES.get(mode, {}),
    }
    if mode != "expected":
        config |= {"ppo_epochs": 2, "num_minibatches": 2, "samples_per_prompt": 2, "kl_coef": 0.05}

    def trainer_in(name: str) -> PPOTrainer:
        torch.manual_seed(99)  # the adapter's start is another one each time: resuming must not depend on it
        evaluate = lambda engine: {"score": float(engine.states([[5, 6]], [Tree()])[0].sum())}  # noqa: E731
        return make_trainer(
            tmp_path / name,
            model=with_lora(tiny_model()),
            config=config,
            compute_metrics=evaluate,
            how={"use_CoT": mode == "analysis"},
        )

    straight = trainer_in("straight")
    straight.train()
    broken = trainer_in("broken")
    broken.add_callback(At(3, lambda control: setattr(control, "should_training_stop", True)))
    broken.train()
    resumed = trainer_in("broken")
    checkpoint = resumed.last_checkpoint()
    assert checkpoint == tmp_path / "broken" / "step-3" and step_of(checkpoint) == 3
    head = load_file(checkpoint / VALUE_HEAD_FILE)
    assert (float(head["weight"].norm()) > 0) == (mode != "expected")
    torch.manual_seed(7)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert figures(resumed) == figures(straight)
    ours, theirs = resumed.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.state.best_metric == straight.state.best_metric
    names = sorted(path.name for path in (tmp_path / "straight").iterdir())
    assert names == ["best", "step-3", "step-5"]


def test_the_best_evaluation_is_kept(tmp_path):
    scores, saved = iter([0.2, 0.9, 0.5, 0.9]), []
    config = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    trainer = make_trainer(
        tmp_path, config=config, compute_metrics=lambda engine: {"score": next(scores)}, on_save=saved.append
    )
    kept = {}
    trainer.add_callback(At(3, lambda control: kept.update(policy_weights(trainer.model))))
    trainer.train()
    best = load_file(tmp_path / "best" / "adapter_model.safetensors")
    assert all(torch.equal(best[name.replace(".default", "")], weight) for name, weight in kept.items())
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.9, 3)
    assert (tmp_path / "best" / VALUE_HEAD_FILE).exists() and (tmp_path / "best" / "adapter_config.json").exists()
    assert len(saved) == 3  # at the start, and at 0.9; of equal scores the later is the best
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, config=config)
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "step-4"}

    def full(folder):
        raise OSError("disk full")

    trainer.on_save = full
    with pytest.raises(TrainingError, match="step-4 could not be written at step 4 .disk full.; what was there"):
        trainer._save_checkpoint(trainer.model, None)
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "step-4"}
    trainer.on_save = lambda folder: None
    trainer._save_checkpoint(trainer.model, None)  # in the place of the one that is there
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "step-4"}
    # What a killed run left half-written does not count.
    (tmp_path / ".step-6-x").mkdir()
    (tmp_path / ".step-6-x" / "trainer_state.json").write_text('{"global_step": 6}')
    assert trainer.last_checkpoint() == tmp_path / "step-4"


def test_checkpoints_by_epoch(tmp_path):
    config = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "save_methods": "epoch", "epoch_offset": 3}
    trainer = make_trainer(tmp_path, config=config)  # 16 rows, 8 per step: an epoch is two steps
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"epoch-4", "epoch-5", "step-5"}
    assert step_of(tmp_path / "epoch-5") == 4 and step_of(None) == 0


# -------------------------------------------------------------------------------------------------- a task to learn


def answers_validly(model, rows: list[dict]):
    """Make the random model answer with a label word, as instruction-tuned ones do; which one stays random."""
    with torch.no_grad():
        states = [model.model(torch.tensor([row["prompt_ids"]])).last_hidden_state[0, -1] for row in rows]
        mean = torch.stack(states).mean(0)
        for word in WORDS:
            model.lm_head.weight[VOCABULARY[word]] += 5 * mean / mean.norm() ** 2
    return model


SETTINGS = {
    "expected": dict(learning_rate=1e-2, max_steps=20),
    "labels": dict(learning_rate=1e-2, max_steps=20, samples_per_prompt=8, entropy_coef=0.02, **MODES["labels"]),
    "free": dict(learning_rate=5e-3, max_steps=30, samples_per_prompt=16, entropy_coef=0.05, **MODES["free"]),
}


@pytest.mark.parametrize("mode", SETTINGS)
def test_a_toy_task_is_learned(mode, tmp_path):
    rows = make_rows(96)
    config = {"per_device_train_batch_size": 16, "max_response_length": 1, **SETTINGS[mode]}
    model = answers_validly(tiny_model(initializer_range=0.2), rows)

    def accuracy() -> float:
        prompts = [row["prompt_ids"] for row in rows]
        answers = trainer.engine.generate(prompts, Sampling(lambda text: True, 1))[1]
        if mode != "free":
            policy = trainer.tasks[0].policy
            states = trainer.engine.states(prompts, [policy.trie.tree] * len(prompts))
            chosen = [x[0].argmax() for x in policy.log_distributions(states, [policy.trie.tree] * len(states))]
            return sum(WORDS[int(c)] == WORDS[row["label"]] for c, row in zip(chosen, rows)) / len(rows)
        return sum(answer.text == WORDS[row["label"]] for (answer,), row in zip(answers, rows)) / len(rows)

    trainer = make_trainer(
        tmp_path, model, rows=rows, config=config, peft_config=models.lora_config(), how={"stop": lambda text: True}
    )
    before = accuracy()
    trainer.train()
    assert before < 0.8 and accuracy() >= 0.95
    logs = step_logs(trainer)
    assert logs[-1]["objective/accuracy"] > 0.9 > logs[0]["objective/accuracy"]


# ------------------------------------------------------------------------------------------------- TRL's own trainer


def test_the_reward_functions_drive_trl_too(tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    task = tasks.get("MR")
    reward, calls = rewards.reward_function(task), []

    def watched(completions, **columns):
        calls.append((completions, columns, reward(completions=completions, **columns)))
        return calls[-1][2]

    rows = [{"prompt": f"Text: w{i} Answer:", "label": i % 2} for i in range(4)]
    args = GRPOConfig(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=3,
    )
    trainer = GRPOTrainer(
        tiny_model(), [reward, watched], args, train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer()
    )
    quiet_trainer(trainer)
    trainer.train()
    completions, columns, scores = calls[0]
    assert len(completions) == len(scores) == len(columns["label"]) == 2 and "prompts" in columns
    assert set(scores) <= {1.0, -1.0, -3.0}
    positive = task.words[1]
    assert reward(completions=[positive, "what"], label=[1, 1], prompts=["", ""], trainer_state=None) == [1.0, -3.0]
    conversation = [[{"role": "assistant", "content": f"<Judgement>{positive}</Judgement>"}]]
    assert reward(completions=conversation, label=[0]) == [-1.0]
    assert isinstance(reward.__name__, str) and isinstance(reward, types.FunctionType)
