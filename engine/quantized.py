"""Base models with 8-bit or 4-bit weights, by bitsandbytes: how they are loaded, and how their layers compute.

LLM.int8 (https://arxiv.org/abs/2208.07339) rounds a layer's input to 8 bits too, and which of its columns are spared
depends on all rows of the batch. So the same prompt has other states in another batch: in SmolLM2-135M-Instruct they
differ by 5 to 7% of their norm, and lie 7% away from float32's. A policy's probability ratio would not be 1 on the
first pass, and packed sequences would not agree with the plain forward. Here an 8-bit layer multiplies by its weights
as they are stored: 2.7% away from float32, and batches agree to six digits.

4-bit layers (NF4, https://arxiv.org/abs/2305.14314) compute as bitsandbytes does on a card. On a CPU with bfloat16
instructions it would reorder the weights for a forward that no gradient passes through, so they multiply by their
dequantized weights, as 8-bit layers do.
"""

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from machine.errors import ModelError

# Round trips of normally distributed weights: in 8 bits a row's largest of 1,000 is 3.2 to 3.9 standard deviations, and
# the step a 127th of it, which is 0.8% of their norm; NF4 in blocks of 64 has 9%. A kernel that fails has about 100%.
LARGEST_ERROR = {8: 0.03, 4: 0.2}
ROWS_TRIED = 64


def configuration(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How `from_pretrained` quantizes a model to 8 or 4 bits; None for 0. dtype: that it computes in."""
    if not bits:
        return None
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def quantize(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A model in memory, quantized as `from_pretrained` does it. The model that was given must not be used any more."""
    dtype, weights = model.dtype, model.state_dict()
    return type(model).from_pretrained(
        None, config=model.config, state_dict=weights, dtype=dtype, quantization_config=configuration(bits, dtype)
    )


def prepare(model: PreTrainedModel, name: str) -> None:
    """Let the quantized layers of a model compute as the top of this file says.

    Raises ModelError if there is none, or if what bitsandbytes computes on this machine is wrong.
    """
    import bitsandbytes as bnb

    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit)]
    if not layers:
        raise ModelError(
            f"{name} has no linear layer that can be quantized; leave --load_in_8bit and its like at False"
        )
    eight, on_cpu = isinstance(layers[0], bnb.nn.Linear8bitLt), layers[0].weight.device.type == "cpu"
    if on_cpu:
        check_round_trip(8 if eight else 4, {layer.in_features for layer in layers})
    if eight or on_cpu:
        for layer in layers:
            layer.forward = Dequantized(layer)


def check_round_trip(bits: int, widths: set[int]) -> None:
    """ModelError unless rows of these widths that are quantized and dequantized are about what they were."""
    import bitsandbytes.functional as bnb

    generator = torch.Generator().manual_seed(0)
    for width in sorted(widths):
        rows = torch.randn(ROWS_TRIED, width, generator=generator)
        if bits == 8:
            stored, largest, _ = bnb.int8_vectorwise_quant(rows.half())
            found = stored * largest[:, None] / 127
        else:
            found = bnb.dequantize_4bit(*bnb.quantize_4bit(rows, quant_type="nf4"))
        error = float((found - rows).norm() / rows.norm())
        if not error < LARGEST_ERROR[bits]:
            raise ModelError(
                f"--load_in_{bits}bit True: bitsandbytes computes wrong {bits}-bit weights on this machine (rows of "
                f"{width} numbers come back with an error of {error:.0%}); leave it at False, or use a CUDA card"
            )


class Dequantized:
    """A quantized layer's `forward`: its input times the weights as they are stored."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.layer.bias
        y = Product.apply(x, self)
        return y if bias is None else y + bias.to(y.dtype)

    def weight(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(out, in) of this type, and the factors (out,) in float32 of its rows, if it has any.

        Integers of 8 bits are exact in bfloat16; their factors would not be.
        """
        if hasattr(self.layer.weight, "quant_state"):
            import bitsandbytes.functional as bnb

            return bnb.dequantize_4bit(self.layer.weight.data, self.layer.weight.quant_state).to(dtype), None
        if self.layer.weight.CB is not None:  # nobody has computed with the layer yet
            self.layer.init_8bit_state()
        state = self.layer.state
        return state.CB.to(dtype), state.SCB.float() / 127


class Product(torch.autograd.Function):
    """x (..., in), and a Dequantized -> (..., out). The weights are frozen, and dequantized once more for the gradient,
    which then holds no copy of them."""

    @staticmethod
    def forward(ctx, x, layer: Dequantized):
        ctx.layer = layer
        weight, factors = layer.weight(x.dtype)
        y = nn.functional.linear(x, weight)
        return y if factors is None else y.mul_(factors)

    @staticmethod
    def backward(ctx, gradient):
        weight, factors = ctx.layer.weight(gradient.dtype)
        if factors is not None:
            gradient = (gradient * factors).to(gradient.dtype)
        return gradient @ weight, None
