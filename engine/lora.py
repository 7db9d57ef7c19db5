"""LoRA's linear layer with less work: in float32 the same numbers as peft's, in fewer passes over memory.

peft computes `base(x) + lora_B(lora_A(x)) * scaling` as five operations, each with an output of its own that autograd
may keep. Here the low-rank part is added in place to the base layer's output, its gradient in place to the input's, and
only the input and the (tokens, r) middle are kept. Over a base in bfloat16, as on a card, peft converts every layer's
input to float32 and multiplies it by A and B in float32. Here A and B are rounded to the base's type, as under
autocast; so are their gradients, which are summed and applied in float32. (LoRA: https://arxiv.org/abs/2106.09685)

The down projection of a gated feed-forward layer, down(silu(gate) * up), takes gate and up in place of their product:
autograd would keep the product and silu(gate) too, almost a third of all activations. They are recomputed in the
backward pass. (SwiGLU: https://arxiv.org/abs/2002.05202)
"""

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.distributed.tensor import DTensor


class LowRankLinear(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T, or with a gate the same of silu(gate) * x.

    x (..., in); gate like x or None; frozen: W (out, in) and bias (out,) or None, of x's type; trained: A (r, in) and
    B (out, r), of that type or float32.
    """

    @staticmethod
    def forward(ctx, x, gate, weight, bias, a, b, scaling):
        flat = (x if gate is None else nn.functional.silu(gate).mul_(x)).reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = flat @ a.T
        ctx.save_for_backward(flat if gate is None else x, gate, weight, a, b, low)
        ctx.scaling = scaling
        result = nn.functional.linear(flat, weight, bias).addmm_(low, b.T, alpha=scaling)
        return result.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, gradient):
        x, gate, weight, a, b, low = ctx.saved_tensors
        shape = *gradient.shape[:-1], weight.shape[1]
        gradient = gradient.reshape(-1, gradient.shape[-1])
        low_gradient = (gradient @ b).mul_(ctx.scaling)
        activated = None if gate is None else nn.functional.silu(gate)
        flat = x if gate is None else (activated * x).view(-1, shape[-1])
        of_a, of_b = low_gradient.T @ flat, (gradient.T @ low).mul_(ctx.scaling)
        of_x = of_gate = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            of_x = (gradient @ weight).addmm_(low_gradient, a).view(shape)
            if gate is not None:
                of_gate = torch.ops.aten.silu_backward(of_x * x, gate)
                of_x = activated.mul_(of_x)
        return of_x, of_gate, None, None, of_a, of_b, None


def fuse(model: nn.Module) -> int:
    """Let the LoRA layers of a peft model compute in this way. Returns how many.

    A layer with more to it stays as it is: several adapters, dropout, 8-bit weights, a variant such as DoRA, a base
    layer sharded by DeepSpeed, or data types other than one for all or float32 over bfloat16. While an adapter is
    disabled or merged, its layers compute in peft's way.
    """
    fused = 0
    for layer in model.modules():
        if type(layer) is Linear and _plain(layer):
            layer.forward = _Forward(layer)
            fused += 1
    for layer in model.modules():
        if "forward" not in vars(layer) and _gated(layer):
            layer.forward = _GatedForward(layer)
    return fused


def _plain(layer: Linear) -> bool:
    if len(layer.active_adapters) != 1 or len(layer.lora_A) != 1 or type(layer.base_layer) is not nn.Linear:
        return False
    (name,) = layer.active_adapters
    base, trained = layer.base_layer.weight.dtype, {layer.lora_A[name].weight.dtype, layer.lora_B[name].weight.dtype}
    return (
        layer.lora_B[name].bias is None
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and name not in layer.lora_variant
        and not layer.base_layer.weight.requires_grad
        and not hasattr(layer.base_layer.weight, "ds_id")  # DeepSpeed's: gathered only while the base layer computes
        and (trained == {base} or trained == {torch.float32} and base == torch.bfloat16)
    )


@torch.no_grad()
def _gated(layer: nn.Module) -> bool:
    """Whether this is down(silu(gate) * up) of fused layers: by the names of its parts, and by its output."""
    parts = [getattr(layer, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    fused = all(isinstance(part, Linear) and isinstance(part.forward, _Forward) for part in parts)
    if not fused or not hasattr(layer, "act_fn"):
        return False
    weight = parts[0].base_layer.weight
    if isinstance(weight, DTensor):  # sharded by FSDP: gathered only while its block computes, so nothing can be tried
        return False
    example = torch.linspace(-3, 3, weight.shape[1], device=weight.device, dtype=weight.dtype)[None, None]
    if not torch.allclose(layer.act_fn(example), nn.functional.silu(example), atol=1e-2):
        return False
    expected, found = layer(example).float(), _GatedForward(layer)(example).float()
    return bool((found - expected).norm() < (1e-4 if weight.dtype == torch.float32 else 5e-2) * expected.norm())


class _GatedForward:
    """A gated feed-forward layer's `forward`."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        if not isinstance(layer.down_proj.forward, _Forward):  # the adapter has been taken off or merged for good
            return type(layer).forward(layer, x)
        return layer.down_proj(layer.up_proj(x), gate=layer.gate_proj(x))


class _Forward:
    """A fused layer's `forward`. gate: see LowRankLinear."""

    def __init__(self, layer: Linear):
        self.layer, (self.name,) = layer, layer.active_adapters

    def __call__(self, x: torch.Tensor, *args, gate: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        layer, name = self.layer, self.name
        a, b, base = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.base_layer
        as_usual = args or kwargs or layer.disable_adapters or layer.merged or x.dtype != base.weight.dtype
        if as_usual or torch.is_autocast_enabled(x.device.type):
            x = x if gate is None else nn.functional.silu(gate) * x
            return type(layer).forward(layer, x, *args, **kwargs)
        return LowRankLinear.apply(x, gate, base.weight, base.bias, a, b, layer.scaling[name])
