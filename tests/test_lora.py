"""lora.py against peft's own forward: states, gradients, and every layer that must stay as it is."""

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from engine import lora
from engine.models import lora_config


def with_adapter(kind: str = "llama", model: dict | None = None, **changes) -> nn.Module:
    """A tiny model with an adapter that does something: LoRA's B starts at zero."""
    model = get_peft_model(tiny_model(kind, **(model or {})), lora_config(**changes))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return model.eval()


def logits_and_gradients(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    ids = torch.arange(24).view(3, 8) % 30
    logits = model(ids).logits
    logits.square().sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "neox"])  # qwen2 and neox have biases
def test_logits_and_gradients_are_those_of_peft(kind):
    model = with_adapter(kind)
    logits, gradients = logits_and_gradients(model)
    assert lora.fuse(model) == sum(type(m) is lora.Linear for m in model.modules()) > 0
    fused_logits, fused_gradients = logits_and_gradients(model)
    assert error(fused_logits, logits) < 1e-5
    assert len(fused_gradients) == len(gradients)
    for fused, expected in zip(fused_gradients, gradients):
        assert error(fused, expected) < 1e-4


@pytest.mark.parametrize("gated", [False, True])
def test_the_gradient_by_finite_differences(gated):
    torch.manual_seed(0)
    sizes = dict(x=(2, 3, 5), gate=(2, 3, 5), weight=(4, 5), bias=(4,), a=(2, 5), b=(4, 2))
    tensors = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    for name in ("x", "gate", "a", "b"):
        tensors[name].requires_grad_()
    tensors["gate"] = tensors["gate"] if gated else None
    assert torch.autograd.gradcheck(lambda *given: lora.LowRankLinear.apply(*given, 1.5), tuple(tensors.values()))


def kept(model: nn.Module, width: int) -> int:
    """How many different tensors of this width a forward keeps for its backward, weights not counted."""
    weights, seen = {p.data_ptr() for p in model.parameters()}, {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] == width and x.data_ptr() not in weights:
            seen[x.data_ptr()] = x  # held, so that no other tensor gets its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(torch.arange(8)[None])
    return len(seen)


def test_of_a_gated_feed_forward_layer_gate_and_up_are_kept_and_nothing_else_of_their_width():
    model = with_adapter(model=dict(intermediate_size=72))
    layers = model.config.num_hidden_layers
    assert kept(model, 72) > 2 * layers
    lora.fuse(model)
    assert kept(model, 72) == 2 * layers


def test_a_feed_forward_layer_with_another_activation_is_left_alone():
    model = with_adapter(model=dict(hidden_act="gelu"))
    logits, gradients = logits_and_gradients(model)
    lora.fuse(model)
    fused_logits, fused_gradients = logits_and_gradients(model)
    assert not any(isinstance(getattr(m, "forward", None), lora._GatedForward) for m in model.modules())
    assert error(fused_logits, logits) < 1e-5
    assert all(error(fused, expected) < 1e-4 for fused, expected in zip(fused_gradients, gradients, strict=True))


def test_an_adapter_that_is_switched_off_or_merged_does_what_peft_does():
    model, ids = with_adapter(), torch.arange(8)[None]
    lora.fuse(model)
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            off = model(ids).logits
        expected = tiny_model()(ids).logits
        model.merge_adapter()
        merged = model(ids).logits
    assert error(off, expected) < 1e-6
    assert error(merged, adapted) < 1e-5
    assert error(adapted, expected) > 1e-2


def test_a_model_whose_adapter_was_taken_off_after_that_computes_as_before():
    merged, without, ids = with_adapter(), with_adapter(), torch.arange(8)[None]
    lora.fuse(merged), lora.fuse(without)
    with torch.no_grad():
        adapted = merged(ids).logits
        assert error(merged.merge_and_unload()(ids).logits, adapted) < 1e-5
        assert error(without.unload()(ids).logits, tiny_model()(ids).logits) < 1e-6


@pytest.mark.parametrize("changes", [dict(lora_dropout=0.1), dict(use_dora=True), dict(lora_bias=True)])
def test_layers_with_more_to_them_stay_as_they_are(changes):
    assert lora.fuse(with_adapter(**changes)) == 0


def test_two_adapters_stay_as_they_are():
    model = with_adapter()
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    assert lora.fuse(model) == 0


def test_a_model_without_an_adapter_is_left_alone():
    assert lora.fuse(tiny_model()) == 0


def in_two_types(base: torch.dtype, adapter: torch.dtype) -> nn.Module:
    model = with_adapter().to(base)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(adapter)
    return model


def test_an_adapter_in_float32_over_bfloat16_is_about_as_exact_as_peft_s():
    """As far from float32 throughout as peft's way is, which rounds in other places."""
    exact, (expected, wanted) = with_adapter(), logits_and_gradients(with_adapter())
    model = in_two_types(torch.bfloat16, torch.float32)
    logits, gradients = logits_and_gradients(model)
    assert lora.fuse(model) == sum(type(m) is lora.Linear for m in exact.modules())
    fused_logits, fused_gradients = logits_and_gradients(model)
    assert not torch.equal(fused_logits, logits)
    assert error(fused_logits, expected) < 1.5 * error(logits.float(), expected) < 0.1
    flat, peft_s, right = (torch.cat([g.flatten() for g in each]) for each in (fused_gradients, gradients, wanted))
    assert error(flat, right) < 1.5 * error(peft_s, right) < 0.2


@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_other_pairs_of_data_types_stay_as_they_are(types):
    assert lora.fuse(in_two_types(*types)) == 0


def test_under_autocast_the_layer_computes_in_peft_s_way():
    model = with_adapter()
    ids = torch.arange(8)[None]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(ids).logits
        lora.fuse(model)
        assert torch.equal(model(ids).logits, expected)
