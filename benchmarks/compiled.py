"""The effect of `torch.compile`: a Llama-like model's elementwise operations as compiled kernels.

Matrix products and attention are not compiled: they are library calls, which a compiler does not make faster, and the
engine's own functions would break the graph. A C++ compiler is needed. `ours_ppo.py --compiled` measures with it.
"""

import torch
from torch import nn
from transformers.models.llama import modeling_llama


def compile_elementwise() -> None:
    """Compile RMSNorm, rotary embeddings, and the gated activation of every Llama model from now on."""
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
