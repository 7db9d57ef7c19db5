"""What `torch.compile` would bring: a Llama-like model's elementwise work as compiled kernels.

Matrix products and attention stay as they are: they are library calls, which a compiler does not make faster, and the
engine's own functions would break its graphs. It needs a C++ compiler. `ours_ppo.py --compiled` measures with it.
"""

import torch
from torch import nn
from transformers.models.llama import modeling_llama


def compile_elementwise() -> None:
    """From now on RMSNorm, rotary positions, and the activation with its product are compiled in every Llama model."""
    compiled = {"dynamic": True}  # one kernel for all numbers of tokens

    @torch.compile(**compiled)
    def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))

    @torch.compile(**compiled)
    def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(gate) * up

    modeling_llama.LlamaRMSNorm.forward = lambda self, x: norm(x, self.weight, self.variance_epsilon)
    modeling_llama.LlamaMLP.forward = lambda self, x: self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
    modeling_llama.apply_rotary_pos_emb = torch.compile(modeling_llama.apply_rotary_pos_emb, **compiled)
