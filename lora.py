"""LoRA's linear layer with less work: in float32 the same numbers as peft's, in fewer passes over memory.

peft computes `base(x) + lora_B(lora_A(x)) * scaling` as five operations, each with an output of its own that autograd
may keep. Here the low-rank part is added into the base layer's output in place, its gradient into the input's in place,
and only the input and the (tokens, r) middle are kept. Over a base in bfloat16, as on a card, peft turns every
layer's input into float32 and multiplies it with A and B in that. Here these two are rounded to the base's type, as
under autocast, and so are their gradients, which add up and are applied in float32.
(LoRA: https://arxiv.org/abs/2106.09685)
"""

import torch
from peft.tuners.lora import Linear
from torch import nn


class LowRankLinear(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T.

    x (..., in); frozen: W (out, in) and bias (out,) or None, of x's type; trained: A (r, in) and B (out, r), of that
    type or float32.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        flat = x.reshape(-1, x.shape[-1])
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = flat @ a.T
        ctx.save_for_backward(flat, weight, a, b, low)
        ctx.scaling, ctx.shape = scaling, x.shape
        result = nn.functional.linear(flat, weight, bias).addmm_(low, b.T, alpha=scaling)
        return result.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, gradient):
        flat, weight, a, b, low = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        low_gradient = (gradient @ b).mul_(ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(low_gradient, a).view(ctx.shape)
        return of_x, None, None, low_gradient.T @ flat, (gradient.T @ low).mul_(ctx.scaling), None


def fuse(model: nn.Module) -> int:
    """Let the LoRA layers of a peft model compute in this way. Returns how many.

    A layer that has more to it (several adapters, dropout, 8-bit weights, a variant such as DoRA, a base layer cut up
    by DeepSpeed, data types other than one for all or float32 over bfloat16) stays as it is. While an adapter is
    switched off or merged, its layers compute in peft's way.
    """
    fused = 0
    for layer in model.modules():
        if type(layer) is Linear and _plain(layer):
            layer.forward = _Forward(layer)
            fused += 1
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
        and not hasattr(layer.base_layer.weight, "ds_id")  # DeepSpeed's: there only while the base layer computes
        and (trained == {base} or trained == {torch.float32} and base == torch.bfloat16)
    )


class _Forward:
    """A fused layer's `forward`."""

    def __init__(self, layer: Linear):
        self.layer, (self.name,) = layer, layer.active_adapters

    def __call__(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        layer, name = self.layer, self.name
        a, b, base = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.base_layer
        as_usual = args or kwargs or layer.disable_adapters or layer.merged or x.dtype != base.weight.dtype
        if as_usual or torch.is_autocast_enabled(x.device.type):
            return type(layer).forward(layer, x, *args, **kwargs)
        return LowRankLinear.apply(x, base.weight, base.bias, a, b, layer.scaling[name])
