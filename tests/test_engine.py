"""The engine against the plain forward of transformers: states, gradients, answers, and the trie of labels."""

import contextlib
import copy
import math
import random
from itertools import pairwise
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import BASE, EOS, PAD, SIZE, SIZES, VOCABULARY, tiny_model, with_lora
from transformers import MixtralConfig, MixtralForCausalLM

from engine import attention
from engine.batches import common_prefix, grouped, micro_batches
from engine.decoding import Sampling
from engine.engine import Engine, LastingPrefix
from engine.judging import generate_then_classify
from engine.loading import check
from engine.network import Network
from engine.trees import MASKED, Answer, LabelTrie, Tree
from machine.memory import inference_token_budget, training_token_budget

KINDS = ["llama", "qwen2", "neox", "gpt2", "mpt"]


def tokens(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


PREFIX = tokens("Text: w0 w1 w2 w3 w4 w5")
ENDS = ["w6 w7 Answer:", "w8 Answer:", "w9 w10 w11 w12 w13 Answer:", "w6 w8 Answer:", "w31 Answer:"]
PROMPTS = {
    "prefix": [PREFIX + tokens(end) for end in ENDS],
    "no prefix": [tokens(f"w{i} {end}") for i, end in enumerate(ENDS)],
    "one row": [PREFIX + tokens(ENDS[0])],
    "equal rows": [PREFIX, PREFIX, PREFIX],
    "one token": [[7], [9]],
    "prefix of another": [PREFIX, PREFIX + tokens("w6"), PREFIX + tokens("w6 w7")],
}


def branched() -> Tree:
    """0
    (w20)  1    2 (w21)
    (w22) 3 4 (w23)   5 (w22) - 6 (w24)"""
    return Tree([-1, *tokens("w20 w21 w22 w23 w22 w24")], [-1, 0, 0, 1, 1, 2, 5], [0, 1, 1, 2, 2, 2, 3])


def chain() -> Tree:
    return Tree([-1, *tokens("w25 w26")], [-1, 0, 1], [0, 1, 2])


def trees_for(prompts: list) -> list[Tree]:
    """Trees of unequal size, that of a prompt alone too."""
    kinds = (branched, Tree, chain)
    return [kinds[i % 3]() for i in range(len(prompts))]


def plain_logits(model, prompts: list[list[int]], trees: list[Tree]) -> list[torch.Tensor]:
    """(nodes, vocabulary) logits per prompt from one padded batch with a row of its own for every node."""
    rows = [prompt + tree.path(node) for prompt, tree in zip(prompts, trees) for node in range(len(tree))]
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask).logits
    last = logits[torch.arange(len(rows)), mask.sum(1) - 1]
    return list(last.split([len(tree) for tree in trees]))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())


def never(text: str) -> bool:
    return False


# ------------------------------------------------------------------------------------------------- states, gradients


@pytest.fixture(params=["packed", "flex", "expanded", "separate"])
def any_prefix(request, monkeypatch):
    """How rows and their shared prefix are laid out: packed, also as on a card, or padded with the prefix's keys and
    values expanded over them, or padded with a separate prefix."""
    make = Network.__init__

    def made(self, *arguments):
        make(self, *arguments)
        if self.packed:
            self.packed = request.param in ("packed", "flex")
            self.min_separate_prefix = None if request.param == "expanded" else 1

    if request.param == "flex":
        request.getfixturevalue("as_on_a_card")

    monkeypatch.setattr(Network, "__init__", made)


@pytest.mark.usefixtures("any_prefix")
@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_states_equal_the_plain_forward(kind, case, tokenizer):
    model, prompts = with_lora(tiny_model(kind)), PROMPTS[case]
    trees = trees_for(prompts)
    expected = plain_logits(model, prompts, trees)
    for budget in (1, 40, 10_000):
        engine = Engine(model, tokenizer, budget)
        states = engine.states(prompts, trees)
        assert [len(s) for s in states] == [len(t) for t in trees]
        for state, logits in zip(states, expected):
            found = engine.logits(state)
            assert error(found, logits) < 1e-4
            assert error(torch.log_softmax(found, -1), torch.log_softmax(logits, -1)) < 1e-4
            some = [4, 1, 30]
            assert error(engine.logits(state, some), logits[:, some]) < 1e-4


WINDOW = dict(sliding_window=16, use_sliding_window=True, max_window_layers=0)


def test_rows_are_packed_only_where_every_token_sees_all_before_it(tokenizer):
    model = tiny_model("qwen2")
    assert Engine(model, tokenizer).network.packed
    model.set_attn_implementation("eager")
    assert not Engine(model, tokenizer).network.packed
    assert not Engine(tiny_model("qwen2", **WINDOW), tokenizer).network.packed


def test_rows_that_are_shorter_than_the_window_are_packed(tokenizer):
    for longest, packed in ((16, True), (17, False)):
        engine = Engine(tiny_model("qwen2", **WINDOW), tokenizer)
        assert check(engine, longest) is None
        assert engine.network.packed == packed and not engine.network.plain


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_long_prefix_is_attended_to_separately(kind, tokenizer, monkeypatch):
    attend, seen = attention._attend, []
    monkeypatch.setattr(attention, "_attend", lambda *inputs: seen.append(inputs) or attend(*inputs))
    engine = Engine(tiny_model(kind), tokenizer)
    for shortest, times in ((len(PREFIX), 2), (len(PREFIX) + 1, 0), (attention.SHORTEST, 0)):
        seen.clear()
        with engine.network.layout(packed=False, min_separate_prefix=shortest):
            engine.states(PROMPTS["prefix"], trees_for(ENDS))
        assert len(seen) == times * engine.model.config.num_hidden_layers


@pytest.mark.usefixtures("any_prefix")
@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_plain_forward(kind, case, tokenizer):
    model, prompts = with_lora(tiny_model(kind)), PROMPTS[case]
    trees = trees_for(prompts)
    torch.manual_seed(3)
    weights = [torch.randn(len(tree), SIZE) for tree in trees]

    def gradients() -> list[torch.Tensor]:
        found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return found

    log_probs = [torch.log_softmax(logits, -1) for logits in plain_logits(model, prompts, trees)]
    sum((w * lp).sum() for w, lp in zip(weights, log_probs)).backward()
    expected = gradients()
    # Each weight by itself; one that has next to no gradient (a row of one token has nothing to attend to) by the mean.
    typical = torch.cat([x.flatten() for x in expected]).square().mean().sqrt()
    allowed = [1e-4 * max(x.norm(), 1e-2 * typical * x.numel() ** 0.5) for x in expected]
    for budget in (1, 40, 10_000):
        engine, seen = Engine(model, tokenizer, budget), []
        for rows, states in engine.training_batches(prompts, trees):
            seen += rows
            # What pads a smaller tree must not send a gradient: it has no weight here, as in the trainer.
            loss = sum(
                (weights[i] * torch.log_softmax(engine.logits(state[: len(trees[i])]), -1)).sum()
                for i, state in zip(rows, states)
            )
            loss.backward()
        assert sorted(seen) == list(range(len(prompts)))
        assert all((x - y).norm() < most for x, y, most in zip(gradients(), expected, allowed))


@pytest.mark.usefixtures("any_prefix")
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_exact_as_in_the_plain_forward(kind, tokenizer):
    prompts = PROMPTS["prefix"]
    trees = trees_for(prompts)
    torch.manual_seed(3)
    weights = torch.randn(sum(map(len, trees)), SIZE)
    exact = tiny_model(kind).to(torch.bfloat16).float()  # the same weights, computed with in float32
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    exact, rounded = with_lora(exact), with_lora(rounded)

    def gradient(model, logits: torch.Tensor) -> torch.Tensor:
        (weights * torch.log_softmax(logits.float(), -1)).sum().backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
        return found

    def both(model, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits.detach().float(), gradient(model, logits)

    expected = both(exact, torch.cat(plain_logits(exact, prompts, trees)))
    plain = both(rounded, torch.cat(plain_logits(rounded, prompts, trees)))
    engine, parts = Engine(rounded, tokenizer, 40), weights.split(list(map(len, trees)))
    logits = [torch.empty(0)] * len(prompts)
    for rows, states in engine.training_batches(prompts, trees):
        for i, state in zip(rows, states):
            logits[i] = engine.logits(state[: len(trees[i])])
        mine = torch.cat([parts[i] for i in rows])
        (mine * torch.log_softmax(torch.cat([logits[i] for i in rows]), -1)).sum().backward()
    total = torch.cat([p.grad.flatten() for p in rounded.parameters() if p.requires_grad])
    for found, usual, wanted in zip((torch.cat(logits), total), plain, expected):
        assert error(found, wanted) < 1.5 * error(usual, wanted)


def model_of(kind: str) -> torch.nn.Module:
    """`tiny_model`, or "patched": one that takes position ids and does not use them, as some remote code does."""
    if kind != "patched":
        return tiny_model(kind)
    model = tiny_model()
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    return model


def short_of_memory(engine: Engine, tokens_that_fit: int) -> None:
    """Let every forward of more tokens (rows x columns) fail as a full card does."""
    backbone = engine.network.backbone.forward

    def forward(ids, **more):
        if ids.numel() > tokens_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return backbone(ids, **more)

    engine.network.backbone.forward = forward


def test_out_of_memory_halves_the_budget_and_changes_nothing(tokenizer, capsys):
    prompts = PROMPTS["prefix"]
    trees = trees_for(prompts)
    expected = Engine(with_lora(tiny_model()), tokenizer, 400)
    engine = Engine(with_lora(tiny_model()), tokenizer, 400)
    short_of_memory(engine, 12)
    for found, state in zip(engine.states(prompts, trees), expected.states(prompts, trees)):
        assert error(found, state) < 1e-5
    assert engine.tokens_per_micro_batch < 400 and "Out of memory: going on with" in capsys.readouterr().out
    engine.tokens_per_micro_batch = 400
    _, answers, _ = engine.generate(prompts, Sampling(never, 4, 3, 1.0, torch.Generator().manual_seed(5)))
    _, others, _ = expected.generate(prompts, Sampling(never, 4, 3, 1.0, torch.Generator().manual_seed(5)))
    assert [[a.tokens for a in group] for group in answers] == [[a.tokens for a in group] for group in others]
    assert engine.tokens_per_micro_batch < 400


def test_a_row_that_does_not_fit_alone_ends_in_a_memory_error(tokenizer):
    engine = Engine(tiny_model(), tokenizer, 400)
    short_of_memory(engine, 3)
    with pytest.raises(MemoryError, match="one row at a time"):
        engine.states(PROMPTS["prefix"], [Tree() for _ in ENDS])


def test_other_errors_are_not_taken_for_a_full_memory(tokenizer):
    engine = Engine(tiny_model(), tokenizer, 400)
    with pytest.raises(RuntimeError, match="shape"):
        engine.retry_with_smaller_batches(lambda: torch.zeros(2).view(3))
    assert engine.tokens_per_micro_batch == 400


def test_the_budget_follows_free_memory(monkeypatch):
    model = tiny_model()  # 2 layers x (32 x 32 + 12 x 64 numbers) x 4 bytes = 14,336 bytes a token
    for free, tokens_that_fit in ((2 * 14_336 * 100, 64), (2 * 14_336 * 128, 128), (2**40, 512), (0, 16)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert training_token_budget(model) == tokens_that_fit
        assert training_token_budget(model, keep_rollout=True) == (2048 if tokens_that_fit == 512 else tokens_that_fit)
    # Without gradients one layer's numbers, and keys and values of both: (1,792 + 2 x 2 x 32) x 4 bytes.
    for free, tokens_that_fit in ((2 * 7_680 * 100, 64), (2 * 7_680 * 128, 128), (2**40, 2048), (0, 16)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert inference_token_budget(model) == tokens_that_fit


def test_full_weights_get_the_same_gradients_too(tokenizer):
    model, prompts = tiny_model(), PROMPTS["prefix"]
    trees = trees_for(prompts)
    sum(torch.log_softmax(x, -1)[:, 3].sum() for x in plain_logits(model, prompts, trees)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    engine = Engine(model, tokenizer, 30)
    for rows, states in engine.training_batches(prompts, trees):
        sum(
            torch.log_softmax(engine.logits(s[: len(trees[i])]), -1)[:, 3].sum() for i, s in zip(rows, states)
        ).backward()
    assert error(torch.cat([p.grad.flatten() for p in model.parameters()]), expected) < 1e-4


def test_the_prefix_is_pushed_through_the_network_once(tokenizer):
    engine, prompts = Engine(tiny_model(), tokenizer, 1), PROMPTS["prefix"]
    engine.states(prompts, [Tree() for _ in prompts])
    assert engine.tokens_computed == len(PREFIX) + sum(len(p) - len(PREFIX) for p in prompts)
    before = engine.tokens_computed
    for _, states in engine.training_batches(prompts, [Tree() for _ in prompts]):
        states.sum().backward()
    assert engine.tokens_computed == 2 * before


@pytest.mark.usefixtures("any_prefix")
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_feed_forward_layer_computes_only_what_is_read(kind, tokenizer):
    model, prompts = tiny_model(kind), PROMPTS["prefix"]
    engine, trees, seen = Engine(model, tokenizer, 30), trees_for(PROMPTS["prefix"]), []
    whole = engine.network.last_feedforward.whole
    engine.network.last_feedforward.whole = lambda hidden, *more: seen.append(hidden.shape[-2]) or whole(hidden, *more)
    engine.states(prompts, trees)
    nodes = sum(map(len, trees))
    assert nodes <= sum(seen) < engine.tokens_computed
    if engine.network.packed:
        assert sum(seen) == nodes
    # The model itself still computes all of it.
    seen.clear()
    model(torch.tensor([prompts[0]]))
    assert seen == [len(prompts[0])]
    assert Engine(model, tokenizer).network.last_feedforward is engine.network.last_feedforward


def test_a_model_with_another_kind_of_block_computes_all_of_it(tokenizer):
    sizes = {**BASE, **SIZES, "num_key_value_heads": 2}
    experts = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)).eval()
    engine, prompts = Engine(experts, tokenizer), PROMPTS["prefix"]
    assert engine.network.last_feedforward is None and check(engine) is None
    trees = trees_for(prompts)
    for state, logits in zip(engine.states(prompts, trees), plain_logits(experts, prompts, trees)):
        assert error(engine.logits(state), logits) < 1e-4


def test_a_branched_tree_takes_less_than_its_paths(tokenizer):
    engine, prompts = Engine(tiny_model(), tokenizer, 10_000), PROMPTS["prefix"]
    engine.states(prompts[:1], [branched()])
    assert engine.tokens_computed == len(prompts[0]) + 6


def test_the_reference_is_the_model_without_its_adapter(tokenizer):
    model, prompts = with_lora(tiny_model()), PROMPTS["prefix"]
    trees = trees_for(prompts)
    engine = Engine(model, tokenizer)
    with model.disable_adapter():
        expected = plain_logits(model, prompts, trees)
    for state, logits in zip(engine.states(prompts, trees, reference=True), expected):
        assert error(engine.logits(state), logits) < 1e-4
    computed = engine.tokens_computed
    # Another batch with a shorter prefix, and an adapter that has moved on: the prefix that is kept still serves.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    other = [PREFIX[:5] + tokens("w30 Answer:"), PREFIX[:5] + tokens("w29 w28 Answer:")]
    other_trees = [chain(), Tree()]
    with model.disable_adapter():
        expected = plain_logits(model, other, other_trees)
    for state, logits in zip(engine.states(other, other_trees, reference=True), expected):
        assert error(engine.logits(state), logits) < 1e-4
    assert engine.tokens_computed - computed == 2 + 3 + 2  # two rows, and two nodes
    # Prompts with another beginning do not take it.
    other = [tokens(f"w20 w21 w22 {end}") for end in ENDS]
    with model.disable_adapter():
        expected = plain_logits(model, other, trees)
    for state, logits in zip(engine.states(other, trees, reference=True), expected):
        assert error(engine.logits(state), logits) < 1e-4
    # And the policy has not been mixed up with it.
    for state, logits in zip(engine.states(prompts, trees), plain_logits(model, prompts, trees)):
        assert error(engine.logits(state), logits) < 1e-4


@pytest.mark.parametrize("kind", ["reference", "frozen"])
def test_what_all_prompts_share_is_computed_once_per_run(kind, tokenizer):
    model, prompts = with_lora(tiny_model()), [*PROMPTS["prefix"], PREFIX + tokens("w5 w6")]
    engine = Engine(model, tokenizer)
    engine.frozen, engine.lasting_prefix = kind == "frozen", LastingPrefix(common_prefix(prompts))
    assert engine.lasting_prefix.length == len(PREFIX)
    context = model.disable_adapter() if kind == "reference" else contextlib.nullcontext()
    with context:
        expected = plain_logits(model, prompts, [Tree()] * len(prompts))
    # One prompt at a time shares nothing with others, two may share more than all do by chance.
    for rows in ([0], [1], [0, 1], [2, 3], [*range(len(prompts))]):
        before = engine.tokens_computed
        found = engine.states([prompts[i] for i in rows], [Tree()] * len(rows), reference=kind == "reference")
        for i, state in zip(rows, found):
            assert error(engine.logits(state), expected[i]) < 1e-4
        own = sum(len(prompts[i]) - len(PREFIX) for i in rows)
        assert engine.tokens_computed - before == own + (0 if before else len(PREFIX))


def test_states_meet_the_vocabulary_in_groups():
    states = [torch.zeros(nodes, 4) for nodes in (3, 1, 9, 2, 2, 1)]
    assert list(grouped(states, most=4)) == [range(0, 2), range(2, 3), range(3, 5), range(5, 6)]
    assert list(grouped(states)) == [range(6)] and list(grouped([])) == []


# -------------------------------------------------------------------------------------------------------- generation


@pytest.mark.usefixtures("any_prefix")
@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_equal_those_of_transformers(kind, case, tokenizer):
    model, prompts = with_lora(tiny_model(kind)), PROMPTS[case]
    trees, answers, states = Engine(model, tokenizer).generate(prompts, Sampling(never, 8))
    for prompt, tree, (answer,), state in zip(prompts, trees, answers, states):
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=PAD
        )
        assert answer.tokens == output[0, len(prompt) :].tolist()
        assert answer.ended == (answer.tokens[-1] == EOS)
        assert answer.text == tokenizer.decode([t for t in answer.tokens if t != EOS])
        assert [tree.path(node) for node in answer.nodes] == [answer.tokens[:t] for t in range(len(answer.tokens))]
        assert len(state) == len(tree)


def test_generation_ends_at_end_of_sequence_and_the_rest_goes_on(tokenizer):
    """Rows leave the batch at different steps, whoever stands beside them."""
    model, prompts = tiny_model(seed=4), [PREFIX + tokens(f"w{i} Answer:") for i in range(12)]
    with torch.no_grad():  # end-of-sequence is about as probable as any other token
        model.lm_head.weight[EOS] *= 1.6
    _, answers, _ = Engine(model, tokenizer).generate(prompts, Sampling(never, 12))
    lengths = {len(a.tokens) for (a,) in answers}
    assert any(a.ended for (a,) in answers) and len(lengths) > 2
    for prompt, (answer,) in zip(prompts, answers):
        output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
        assert answer.tokens == output


def test_the_stop_rule_sees_the_text_and_ends_the_answer(tokenizer):
    engine, prompts = Engine(tiny_model(), tokenizer), PROMPTS["prefix"]
    _, free, _ = engine.generate(prompts, Sampling(never, 6))
    wanted = free[0][0].text.split()[2]
    seen = []

    def stop(text: str) -> bool:
        seen.append(text)
        return wanted in text.split()

    _, answers, _ = engine.generate(prompts, Sampling(stop, 6))
    assert answers[0][0].ended and answers[0][0].text.split()[-1] == wanted and len(answers[0][0].tokens) <= 3
    assert free[0][0].text.startswith(answers[0][0].text)
    assert answers[0][0].text in seen


@pytest.mark.usefixtures("any_prefix")
@pytest.mark.parametrize("kind", KINDS)
def test_states_of_generation_are_those_of_its_trees(kind, tokenizer):
    """Sampling with several answers per prompt: what the cache gave equals a forward over the finished trees."""
    engine, prompts = Engine(with_lora(tiny_model(kind)), tokenizer), PROMPTS["prefix"]
    generator = torch.Generator().manual_seed(0)
    trees, answers, states = engine.generate(prompts, Sampling(never, 5, 6, 1.0, generator))
    assert any(len(tree) > 6 for tree in trees)
    for tree, group in zip(trees, answers):
        for answer in group:
            assert [tree.path(node) for node in answer.nodes] == [answer.tokens[:t] for t in range(len(answer.tokens))]
            assert len(answer.tokens) == 5 or answer.ended
    for found, expected in zip(states, engine.states(prompts, trees)):
        assert error(found, expected) < 1e-4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_rows_wait_together_for_their_next_tokens(temperature, tokenizer, monkeypatch):
    """One copy to the CPU per token of the answers, not one per row or sample."""
    engine, copies = Engine(with_lora(tiny_model()), tokenizer), []
    prompts = [tokens("Text: red w1 Answer:"), tokens("Text: blue Answer:"), tokens("Text: w4 w5 w6 Answer:")]
    to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor) or to_cpu(tensor))
    generator = torch.Generator().manual_seed(0)
    _, answers, _ = engine.generate(prompts, Sampling(never, 5, 4 if temperature else 1, temperature, generator))
    assert len(copies) == max(len(a.tokens) for group in answers for a in group) == 5


@pytest.mark.usefixtures("any_prefix")
@pytest.mark.parametrize("case", ["prefix", "no prefix", "one row"])
@pytest.mark.parametrize("kind", [*KINDS, "patched"])
def test_a_forward_that_is_kept_has_the_gradients_of_a_second_one(kind, case, tokenizer):
    """Of generation with all its steps, and of states; rows leave the batch at different steps."""
    model, prompts = with_lora(model_of(kind)), PROMPTS[case]
    engine = Engine(model, tokenizer)
    check(engine)
    sampling = lambda: Sampling(lambda text: "w3" in text, 5, 3, 1.5, torch.Generator().manual_seed(2))  # noqa: E731
    trees, answers, states = engine.generate(prompts, sampling(), keep=True)
    _, others, without = engine.generate(prompts, sampling())
    assert [[a.tokens for a in group] for group in answers] == [[a.tokens for a in group] for group in others]
    torch.manual_seed(3)
    weights = [torch.randn(len(tree), SIZE) for tree in trees]

    def gradients(parts) -> torch.Tensor:
        for weight, state in parts:
            (weight * torch.log_softmax(engine.logits(state[: len(weight)]), -1)).sum().backward(retain_graph=True)
        found = [p.grad.flatten().clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return torch.cat(found)

    def second():
        for rows, batch in engine.training_batches(prompts, trees):
            yield from ((weights[i], state) for i, state in zip(rows, batch))

    expected = gradients(second())
    kept = engine.states(prompts, trees, keep=True)
    assert error(gradients(zip(weights, kept)), expected) < 1e-4
    # Rows that grow padded would hold their keys in every step anew.
    packed = engine.network.packed and not engine.network.plain
    if packed:
        assert error(gradients(zip(weights, states)), expected) < 1e-4
    for state, other in zip(states, kept):
        assert state.requires_grad == packed and error(state, other) < 1e-4
    # It is kept only where one pass is enough, of the prompts and of what they have grown to, and only if asked for.
    assert not any(state.requires_grad for state in without)
    length = 0 if engine.network.plain else common_prefix(prompts)
    everything = sum(len(p) - length + len(tree) for p, tree in zip(prompts, trees))
    for budget in (1, everything - 1, everything):
        engine.tokens_per_micro_batch = budget
        grown = engine.generate(prompts, sampling(), keep=True)[2]
        fits = case == "one row" or budget == everything
        assert all(state.requires_grad == (packed and fits) for state in grown)
        if engine.network.packed:
            assert all(state.requires_grad == fits for state in engine.states(prompts, trees, keep=True))


def answers_of(engine, prompts, **settings) -> list[list[list[int]]]:
    settings = {"stop": never, "max_new_tokens": 6, **settings}
    return [[answer.tokens for answer in group] for group in engine.generate(prompts, Sampling(**settings))[1]]


@pytest.mark.usefixtures("any_prefix")
@pytest.mark.parametrize("kind", [*KINDS, "patched"])
def test_a_batch_of_one_answers_as_a_batch_of_many(kind, tokenizer):
    model = model_of(kind)
    engine = Engine(model, tokenizer)
    check(engine)
    prompts = PROMPTS["prefix"] + PROMPTS["no prefix"]
    together = answers_of(engine, prompts)
    assert together == [answers_of(engine, [prompt])[0] for prompt in prompts]
    assert [[one] * 3 for (one,) in together] == answers_of(engine, prompts, samples=3)


def test_what_is_sampled_does_not_depend_on_micro_batches(tokenizer):
    model, prompts = tiny_model(), PROMPTS["prefix"] + PROMPTS["no prefix"]

    def sample(budget: int, seed: int = 0) -> list:
        generator = torch.Generator().manual_seed(seed)
        return answers_of(Engine(model, tokenizer, budget), prompts, samples=4, temperature=1.0, generator=generator)

    assert sample(1) == sample(30) == sample(10_000)
    assert sample(1) != sample(1, seed=1)


@torch.no_grad()
def test_samples_follow_the_distribution(tokenizer):
    model, prompt = tiny_model(), PROMPTS["prefix"][0]
    engine, temperature, count = Engine(model, tokenizer), 2.0, 4000
    found = answers_of(
        engine,
        [prompt],
        max_new_tokens=1,
        samples=count,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    shares = torch.bincount(torch.tensor([tokens[0] for tokens in found[0]]), minlength=SIZE) / count
    expected = torch.softmax(plain_logits(model, [prompt], [Tree()])[0][0] / temperature, -1)
    assert float((shares - expected).abs().max()) < 4 * math.sqrt(0.25 / count)


# ------------------------------------------------------------------------------------------------------ the fallback


@pytest.mark.parametrize("kind", KINDS)
def test_check_finds_nothing_where_the_shared_prefix_fits(kind, tokenizer):
    engine = Engine(with_lora(tiny_model(kind)), tokenizer)
    assert check(engine) is None and not engine.network.plain


def test_check_falls_back_to_the_plain_forward(tokenizer):
    model = with_lora(model_of("patched"))
    engine, prompts = Engine(model, tokenizer, 30), PROMPTS["prefix"] + PROMPTS["no prefix"]
    reason = check(engine)
    assert reason and "\n" not in reason and engine.network.plain
    trees = trees_for(prompts)
    expected = plain_logits(model, prompts, trees)
    for state, logits in zip(engine.states(prompts, trees), expected):
        assert error(engine.logits(state), logits) < 1e-4
    with model.disable_adapter():
        reference = plain_logits(model, prompts, trees)
    for state, logits in zip(engine.states(prompts, trees, reference=True), reference):
        assert error(engine.logits(state), logits) < 1e-4
    # gradients
    weighted = [torch.log_softmax(logits, -1)[:, 5:9] for logits in expected]
    sum(x.square().sum() for x in weighted).backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    for rows, states in engine.training_batches(prompts, trees):
        part = [torch.log_softmax(engine.logits(s[: len(trees[i])]), -1)[:, 5:9] for i, s in zip(rows, states)]
        sum(x.square().sum() for x in part).backward()
    assert error(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]), wanted) < 1e-4
    # generation
    for prompt, (found,) in zip(prompts, answers_of(engine, prompts)):
        sequence = list(prompt)
        for _ in range(6):
            sequence.append(int(plain_logits(model, [sequence], [Tree()])[0][0].argmax()))
            if sequence[-1] == EOS:
                break
        assert found == sequence[len(prompt) :]
    trees, answers, states = engine.generate(prompts, Sampling(never, 4, 3, 1.0, torch.Generator().manual_seed(0)))
    for found, logits in zip(states, plain_logits(model, prompts, trees)):
        assert error(engine.logits(found), logits) < 1e-4


# --------------------------------------------------------------------------------------------------------- the labels

LABELS = {
    "one token": ["no", "yes", "maybe"],
    "prefix of another": ["not", "not at all", "yes"],
    "shared beginnings": ["very good", "very bad", "good", "not at all good", "not at all bad"],
    "forced ends": ["no w0 w1", "yes w2 w3 w4"],
}


def brute_force(model, prompt: list[int], spellings: list[list[int]], temperature: float) -> list[float]:
    """Log-probability of every label: at each token all that no label goes on with is ruled out."""
    closed = [[*spelling, EOS] for spelling in spellings]
    totals = []
    for spelling in closed:
        total = 0.0
        for t, token in enumerate(spelling):
            allowed = sorted({other[t] for other in closed if len(other) > t and other[:t] == spelling[:t]})
            logits = model(torch.tensor([prompt + spelling[:t]])).logits[0, -1, allowed] / temperature
            total += float(torch.log_softmax(logits, -1)[allowed.index(token)])
        totals.append(total)
    return totals


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("case", LABELS)
@torch.no_grad()
def test_label_probabilities_against_enumeration(case, temperature, tokenizer):
    model, prompts = with_lora(tiny_model()), PROMPTS["prefix"]
    spellings = [tokens(words) for words in LABELS[case]]
    trie = LabelTrie(spellings, EOS)
    engine = Engine(model, tokenizer, 60)
    states = torch.stack(engine.states(prompts, [trie.tree] * len(prompts)))
    log_probs = trie.log_probs(engine.logits(states, trie.vocabulary), temperature)
    labels = trie.label_log_probs(log_probs)
    assert torch.allclose(labels.exp().sum(-1), torch.ones(len(prompts)), atol=1e-5)
    for row, prompt in zip(labels, prompts):
        assert torch.allclose(row, torch.tensor(brute_force(model, prompt, spellings, temperature)), atol=1e-4)


@pytest.mark.parametrize("case", LABELS)
def test_only_decisions_are_nodes(case):
    spellings = [tokens(words) for words in LABELS[case]]
    trie = LabelTrie(spellings, EOS)
    allowed = (trie.mask == 0).sum(-1)
    assert set(trie.mask.unique().tolist()) <= {0.0, MASKED}
    # A node where nothing is chosen is there only because a decision comes after it.
    inner = set(trie.tree.parents)
    assert all(count >= 2 or node in inner for node, count in enumerate(allowed.tolist()))
    for path, spelling in zip(trie.paths, spellings):
        for node, column in path:
            depth = trie.tree.depths[node]
            assert allowed[node] >= 2 and trie.mask[node, column] == 0
            assert trie.tree.path(node) == spelling[:depth]
            assert trie.vocabulary[column] == [*spelling, EOS][depth]


def test_forced_tokens_have_no_node():
    assert len(LabelTrie([tokens("no w0 w1"), tokens("yes w2 w3 w4")], EOS).tree) == 1
    assert len(LabelTrie([tokens("no"), tokens("yes"), tokens("maybe")], EOS).tree) == 1
    trie = LabelTrie([tokens("not"), tokens("not at all")], EOS)
    assert len(trie.tree) == 2 and trie.vocabulary == sorted([EOS, *tokens("at")])  # "not" is forced, then a choice


def test_two_labels_cannot_be_spelled_alike():
    for spellings in ([tokens("no"), tokens("no")], [tokens("no"), []]):
        with pytest.raises(ValueError, match="spelling"):
            LabelTrie(spellings, EOS)


@pytest.mark.parametrize("case", LABELS)
def test_choosing_a_label(case):
    spellings = [tokens(words) for words in LABELS[case]]
    trie = LabelTrie(spellings, EOS)
    torch.manual_seed(1)
    log_probs = trie.log_probs(torch.randn(len(trie.tree), len(trie.vocabulary)))
    label, path = trie.choose(log_probs, None)
    assert path == trie.paths[label]
    assert all(log_probs[node, column] == log_probs[node].max() for node, column in path)
    generator, counts, count = torch.Generator().manual_seed(0), torch.zeros(len(spellings)), 2000
    for _ in range(count):
        label, path = trie.choose(log_probs, generator)
        assert path == trie.paths[label]
        counts[label] += 1
    expected = trie.label_log_probs(log_probs[None])[0].exp()
    assert float((counts / count - expected).abs().max()) < 4 * math.sqrt(0.25 / count)


@pytest.mark.parametrize("case", LABELS)
@torch.no_grad()
def test_the_full_tree_scores_whole_spellings(case, tokenizer):
    model, prompts = tiny_model(), PROMPTS["prefix"]
    spellings = [tokens(words) for words in LABELS[case]]
    tree, steps = LabelTrie(spellings, EOS).full_tree()
    if case == "prefix of another":  # only what closes a label tells it from a longer one
        spellings = [[*spelling, EOS] for spelling in spellings]
    assert [[token for _, token in path] for path in steps] == spellings
    engine = Engine(model, tokenizer)
    for prompt, states in zip(prompts, engine.states(prompts, [tree] * len(prompts))):
        log_probs = torch.log_softmax(engine.logits(states), -1)
        for spelling, path in zip(spellings, steps):
            plain = torch.log_softmax(model(torch.tensor([prompt + spelling])).logits[0], -1)
            expected = sum(plain[len(prompt) - 1 + t, token] for t, token in enumerate(spelling))
            assert float(sum(log_probs[node, token] for node, token in path)) == pytest.approx(
                float(expected), abs=1e-4
            )


# ---------------------------------------------------------------------------------------- free analysis, masked label


@pytest.mark.parametrize("kind", ["llama", "patched"])
def test_a_judgement_after_a_free_analysis(kind, tokenizer):
    model, prompts = with_lora(model_of(kind)), PROMPTS["prefix"]
    engine = Engine(model, tokenizer, 60)
    check(engine)
    words = ("no", "not at all", "yes")
    spellings = [tokens(word) for word in words]
    trie = LabelTrie(spellings, EOS)
    sampling = lambda: Sampling(lambda text: "w9" in text, 5, 8, 3.0, torch.Generator().manual_seed(0))  # noqa: E731
    _, analysed, _ = engine.generate(prompts, sampling())
    analyses = [[(a.text, list(a.tokens), a.ended) for a in group] for group in analysed]
    link = tokens("Answer: w30")
    how = trie, words, lambda a: (link, " Answer: w30 ")
    assert generate_then_classify(engine, [], sampling(), *how) == ([], [], [])  # a process may have no rows
    trees, answers, states = generate_then_classify(engine, prompts, sampling(), *how)
    plain = plain_logits(model, prompts, trees)
    ends = set()
    for tree, group, analysed_group, state, logits in zip(trees, answers, analyses, states, plain):
        assert error(engine.logits(state), logits) < 1e-4
        for answer, (text, analysis, _) in zip(group, analysed_group):
            ends.add(analysis[-1] == EOS)
            free = [t for t in analysis if t != EOS]
            decisions = answer.tokens[len(analysis) :]
            assert answer.text == text + " Answer: w30 " + words[answer.label] and answer.ended
            # What was free stays free; where the label is chosen only the labels' tokens are allowed.
            assert not any(node in tree.allowed for node in answer.nodes[: len(analysis)])
            assert len(decisions) == len(trie.paths[answer.label])
            for node, token, (inner, column) in zip(answer.nodes[len(analysis) :], decisions, trie.paths[answer.label]):
                assert tree.path(node) == free + link + trie.tree.path(inner)
                assert token == trie.vocabulary[column] and token in tree.allowed[node]
                before = trie.tree.path(inner)
                closed = [[*spelling, EOS] for spelling in spellings]
                assert set(tree.allowed[node]) == {s[len(before)] for s in closed if s[: len(before)] == before}
    assert ends == {True, False}  # answers that ended themselves, and answers that were cut off


@pytest.mark.parametrize("case", ["prefix", "no prefix"])
def test_a_judgement_that_is_kept_has_the_gradients_of_a_second_forward(case, tokenizer):
    """Nor does it push the prompts through the network again, if they are one micro-batch."""
    model, prompts = with_lora(tiny_model()), PROMPTS[case]
    engine = Engine(model, tokenizer)
    trie = LabelTrie([tokens("no"), tokens("not at all"), tokens("yes")], EOS)

    def judged(**more):
        sampling = Sampling(never, 4, 2, 1.0, torch.Generator().manual_seed(1))
        how = trie, ("no", "not at all", "yes"), lambda answer: (tokens("Answer:"), " Answer: ")
        return generate_then_classify(engine, prompts, sampling, *how, **more)

    before = engine.tokens_computed
    trees, answers, states = judged(keep=True)
    at_once = engine.tokens_computed - before
    _, others, without = judged()
    length = common_prefix(prompts)
    assert engine.tokens_computed - before - at_once >= at_once + sum(len(prompt) - length for prompt in prompts)
    assert [[a.text for a in group] for group in answers] == [[a.text for a in group] for group in others]
    assert not any(state.requires_grad for state in without)
    torch.manual_seed(3)
    weights = [torch.randn(len(tree), SIZE) for tree in trees]

    def gradients(parts) -> torch.Tensor:
        sum(
            (weight * torch.log_softmax(engine.logits(state[: len(weight)]), -1)).sum() for weight, state in parts
        ).backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
        return found

    ((rows, batch),) = engine.training_batches(prompts, trees)
    expected = gradients([(weights[i], state) for i, state in zip(rows, batch)])
    assert error(gradients(zip(weights, states)), expected) < 1e-4
    # Rows that are more than one micro-batch are pushed through again, and keep nothing.
    engine.tokens_per_micro_batch = 30
    assert not any(state.requires_grad for state in judged(keep=True)[2])


# -------------------------------------------------------------------------------------------------------- small parts


def test_a_tree_finds_its_children_again():
    tree = Tree()
    a = tree.child(0, 5)
    assert tree.child(0, 5) == a and tree.child(a, 5) != a
    assert tree.path(tree.child(a, 5)) == [5, 5] and tree.path(0) == []
    assert branched().child(2, tokens("w22")[0]) == 5


def test_common_prefix():
    assert common_prefix([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3]]) == 2  # one token of every prompt stays outside
    assert common_prefix([[1, 2, 3, 4], [1, 2, 5], [1, 2, 4, 4]]) == 2
    assert common_prefix([[1], [2]]) == common_prefix([[1]]) == common_prefix([[2, 1], [1, 1]]) == 0
    assert common_prefix([[1, 2, 3]]) == 2
    draw = random.Random(0)
    for _ in range(300):
        rows = [[draw.randint(1, 2) for _ in range(draw.randint(1, 6))] for _ in range(draw.randint(1, 5))]
        length = 0
        while length < min(map(len, rows)) - 1 and len({row[length] for row in rows}) == 1:
            length += 1
        assert common_prefix(rows) == length


def test_micro_batches():
    assert micro_batches([3, 10, 4, 4], 8) == [[1], [2, 3], [0]]
    assert micro_batches([50, 60], 10) == [[1], [0]]  # a row that is too long is a micro-batch of its own
    assert micro_batches([], 10) == []
    assert micro_batches([3, 4, 2, 2], 8, packed=True) == [[1, 0], [2, 3]]
    draw = random.Random(0)
    for _ in range(300):
        lengths = [draw.randint(1, 40) for _ in range(draw.randint(1, 20))]
        budget = draw.randint(1, 120)
        for packed in (False, True):
            batches = micro_batches(lengths, budget, packed)
            assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
            sizes = [sum(lengths[i] for i in b) if packed else len(b) * max(lengths[i] for i in b) for b in batches]
            assert all(len(b) == 1 or size <= budget for b, size in zip(batches, sizes))
            ordered = [lengths[i] for batch in batches for i in batch]
            assert all(a >= b for a, b in pairwise(ordered))


def test_answers_are_plain_data():
    assert Answer([1], [0], True, "no").label is None
