"""Packed rows as on a card: what flex_attention is told that tokens see, and what every model family makes of it.

The engine's own tests take flex_attention as one of their layouts (test_engine.py, test_ppo_trainer.py).
"""

import math
import random
import shutil

import pytest
import torch
from conftest import tiny_model, with_lora, word_tokenizer
from test_engine import PROMPTS, error, plain_logits, trees_for
from test_families import FAMILIES, each_case

from engine import attention, flex, loading
from engine.attention import Packing, Row
from engine.engine import Engine
from engine.loading import check


def random_parents(draw: random.Random, nodes: int) -> tuple[int, ...]:
    return (-1, *(draw.randrange(node) for node in range(1, nodes + 1)))


def random_packing(draw: random.Random, kind: str) -> tuple[Packing, int, int]:
    """A packing, and how many tokens of a prefix and of a past are in front of it."""
    rows, at = [], 0
    inside = draw.randint(1, 9) if kind == "inside" else 0
    if inside:
        rows.append(Row(0, inside))
        at = inside
    for _ in range(draw.randint(1, 6)):
        nodes = draw.randint(kind == "past", 9)
        prompt = 0 if kind == "past" else draw.randint(1, 9)
        branched = nodes and draw.random() < 0.7
        rows.append(Row(at, at + prompt + nodes, random_parents(draw, nodes) if branched else None))
        at += prompt + nodes
    if kind != "past":
        return Packing(rows, inside), draw.choice([0, 7]) if kind == "prefix" else 0, 0
    spans, past = [], draw.randint(0, 5)  # the first ones belong to no row
    for _ in rows:
        size = draw.randint(1, 9)
        spans.append((past, past + size))
        past += size + draw.choice([0, 3])
    return Packing(rows, before=spans), draw.choice([0, 7]), past


def seen_and_positions(packing: Packing, prefix: int, past: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, keys) what sees what, token by token and ancestor by ancestor, and the positions (keys,)."""
    tokens, own = packing.rows[-1].stop, prefix + past
    seen, positions = torch.zeros(tokens, own + tokens, dtype=torch.bool), torch.zeros(own + tokens, dtype=torch.long)
    seen[:, :prefix] = True
    positions[:prefix] = torch.arange(prefix)
    shared = prefix + packing.inside
    for i, row in enumerate(packing.rows):
        if i == 0 and packing.inside:
            seen[:, own : own + row.stop] = True
            seen[: row.stop, own : own + row.stop] = torch.ones(row.stop, row.stop, dtype=torch.bool).tril()
            positions[own : own + row.stop] = torch.arange(row.stop)
            continue
        before = [prefix + at for at in range(*packing.before[i])] if packing.before else []
        places = before + [own + at for at in range(row.start, row.stop)]
        parents = row.parents or tuple(range(-1, 0))
        root = len(places) - len(parents)
        for at, place in enumerate(places):
            above, depth = [], 0  # places in this row that it sees
            if at > root:
                node = at - root
                while node:
                    above.append(root + node)
                    node, depth = parents[node], depth + 1
                above += range(root + 1)
                positions[place] = shared + root + depth
            else:
                above = list(range(at + 1))
                positions[place] = shared + at
            if place >= own:
                seen[place - own, [places[other] for other in above]] = True
    return seen, positions


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", ["inside", "prefix", "past"])
def test_tokens_see_their_ancestors_and_blocks_leave_none_of_them_out(kind, window, monkeypatch):
    monkeypatch.setattr(flex, "BLOCK", 4)
    draw = random.Random(0)
    skipped = whole_blocks = 0
    for _ in range(60):
        packing, prefix, past = random_packing(draw, kind)
        expected, positions = seen_and_positions(packing, prefix, past)
        tokens, keys = expected.shape
        if window:
            expected &= positions[prefix + past :, None] - positions < window
        mask = flex.block_mask(flex.numbered(packing, prefix, past), window)
        queries, all_keys = mask.seq_lengths
        assert (queries, all_keys) == tuple(max(8, 4 * math.ceil(size / 4)) for size in (tokens, keys))
        q, k = torch.arange(queries)[:, None], torch.arange(all_keys)
        found = mask.mask_mod(0, 0, q, k)
        assert torch.equal(found[:tokens, :keys], expected)
        assert not found[:, keys:].any() and found.any(dim=1).all()  # fillers are not seen, and see something
        tiles = found.view(queries // 4, 4, all_keys // 4, 4)
        partly = listed(mask.kv_num_blocks, mask.kv_indices)
        whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        assert not (tiles.any(3).any(1) & ~partly & ~whole).any()
        assert torch.equal(whole & ~tiles.all(3).all(1), torch.zeros_like(whole)) and not (whole & partly).any()
        assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), partly.T)
        skipped, whole_blocks = skipped + int((~partly & ~whole).sum()), whole_blocks + int(whole.sum())
    assert skipped and (whole_blocks or window)


def listed(numbers: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(blocks, blocks) booleans of a BlockMask's lists."""
    result = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, (number, places) in enumerate(zip(numbers[0, 0], indices[0, 0])):
        result[row, places[:number].long()] = True
    return result


def test_the_masks_of_both_kinds_of_packed_rows_are_the_same():
    draw = random.Random(1)
    for _ in range(30):
        packing, _, _ = random_packing(draw, "prefix")
        numbers = flex.numbered(packing, 0, 0)
        tokens = torch.arange(packing.rows[-1].stop)
        found = flex.block_mask(numbers).mask_mod(0, 0, tokens[:, None], tokens)
        for row in packing.rows:
            causal = torch.ones(row.stop - row.start, row.stop - row.start, dtype=torch.bool).tril()
            own = causal if row.mask is None else row.mask == 0
            assert torch.equal(found[row.start : row.stop, row.start : row.stop], own)
            assert (
                not found[row.start : row.stop, row.stop :].any() and not found[row.start : row.stop, : row.start].any()
            )


@pytest.mark.usefixtures("as_on_a_card")
@each_case
def test_states_and_gradients_of_every_family_are_those_of_the_model_itself(name, beyond):
    model = with_lora(FAMILIES[name].model(**(dict(sliding_window=5) if beyond else {})))
    engine, prompts = Engine(model, word_tokenizer()), PROMPTS["prefix"]
    assert check(engine) is None
    # With a window too; but for one family that needs eager attention, packed on a CPU is packed on a card.
    assert engine.network.packed == (FAMILIES[name].path == "packed")
    trees = trees_for(prompts)
    expected = [torch.log_softmax(logits, -1) for logits in plain_logits(model, prompts, trees)]
    weights = [torch.sin(torch.arange(x.numel())).view_as(x) for x in expected]

    def gradient(parts) -> torch.Tensor:
        for weight, log_probs in parts:
            (weight * log_probs).sum().backward(retain_graph=True)
        found = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    wanted = gradient(zip(weights, expected))
    for budget in (10_000, 30):
        engine.tokens_per_micro_batch, parts = budget, []
        for rows, states in engine.training_batches(prompts, trees):
            parts = [torch.log_softmax(engine.logits(state[: len(trees[i])]), -1) for i, state in zip(rows, states)]
            assert all(error(x, expected[i]) < 1e-4 for i, x in zip(rows, parts))
            sum((weights[i] * x).sum() for i, x in zip(rows, parts)).backward()
        assert error(gradient([]), wanted) < 1e-4


@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize("fault", ["states", "gradients", "compiler"])
def test_a_kernel_that_is_wrong_or_does_not_run_leaves_padded_rows(fault, monkeypatch):
    attend = flex.flex_attention

    def wrong(query, key, value, **more):
        if fault == "compiler":
            raise ValueError("no Triton") if torch.is_grad_enabled() else RuntimeError("no Triton")
        output = attend(query, key, value, **more)
        return output * 1.1 if fault == "states" else output.detach() + 0 * query.sum()

    monkeypatch.setattr(flex, "flex_attention", wrong)
    engine = Engine(tiny_model(), word_tokenizer())
    assert engine.network.packed and check(engine) is None
    assert not engine.network.packed and not engine.network.plain
    assert loading.layouts(engine.network) == [(False, None)]


def test_attention_by_scores_is_that_of_the_kernel():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, size, 8) for size in (5, 7, 7))
    mask = torch.zeros(2, 1, 5, 7).masked_fill(torch.rand(2, 1, 5, 7) < 0.4, -torch.inf)
    mask[..., 0] = 0
    for masked, scaling in ((None, None), (mask, 0.3)):
        expected = attention.flash(query, key, value, attn_mask=masked, scale=scaling)
        for found, wanted in zip(attention._attend_by_scores(query, key, value, masked, scaling), expected):
            assert error(found, wanted) < 1e-5


MANY = PROMPTS["prefix"] * 20  # several blocks of tokens


def compiled_engine(monkeypatch, **how) -> Engine:
    """An engine whose packed rows attend by flex_attention, compiled like this."""
    torch._dynamo.reset()
    monkeypatch.setattr(flex, "serves", lambda device: True)
    monkeypatch.setattr(flex, "flex_attention", torch.compile(flex.flex_attention, **how))
    engine = Engine(with_lora(tiny_model()), word_tokenizer())
    assert engine.network.packed
    return engine


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_compiled_kernel_goes_by_the_blocks(monkeypatch):
    """On a CPU it has no gradient, and torch 2.13 cannot compile it for all numbers of tokens at once."""
    engine = compiled_engine(monkeypatch, dynamic=False)
    trees = trees_for(MANY)
    for state, logits in zip(engine.states(MANY, trees), plain_logits(engine.model, MANY, trees)):
        assert error(engine.logits(state), logits) < 1e-4


def test_one_kernel_serves_all_numbers_of_tokens(monkeypatch):
    graphs = []
    engine = compiled_engine(monkeypatch, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for prompts in (MANY, PROMPTS["prefix"] * 50, PROMPTS["no prefix"] * 30, PROMPTS["one row"], MANY + MANY):
        engine.states(prompts, trees_for(prompts))
    assert len(graphs) <= 2  # one for the first number, one for all others
