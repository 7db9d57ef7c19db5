"""What a model does to its logits after the output layer: a factor (Cohere, Granite), a cap (Gemma 2), or both.

The configuration names it, in words that differ between families and do not say whether a factor multiplies or
divides. So it is verified on one forward of the model: its last hidden state against its own logits.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

# Factors by their names in configurations: those that usually divide, and those that multiply.
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
CAP = "final_logit_softcapping"


@dataclass(frozen=True)
class Transform:
    """logits -> cap * tanh(logits * factor / cap); without a cap logits * factor."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def transforms(config: PretrainedConfig) -> Iterator[Transform]:
    """All that a model of this configuration may do, the most likely one first."""

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value else None

    cap = number(CAP)
    factors = [1 / value for name in DIVISORS if (value := number(name))]
    factors += [value for name in MULTIPLIERS if (value := number(name))]
    factors += [1 / factor for factor in factors]
    caps = [cap, None] if cap else [None]
    for factor, cap in itertools.product([*factors, 1.0], caps):
        yield Transform(factor, cap)


@torch.no_grad()
def verified(network, ids: list[int]) -> Transform | None:
    """The transform with which the network's last hidden states give the model's own logits for these tokens, in one
    and the same forward; None if there is none."""
    states: list[torch.Tensor] = []
    # OPT's output layer takes the state of a part of the backbone.
    parts = {network.backbone, network.causal_lm.get_decoder()}
    hooks = [part.register_forward_hook(lambda module, inputs, result: states.append(result[0])) for part in parts]
    inputs = torch.tensor([ids], device=network.device)
    try:
        logits = network.causal_lm(inputs).logits.float()
        if not states:  # code of its own that calls neither
            network.backbone(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    found = network.head(states[-1]).float()
    tolerance = 1e-4 if states[-1].dtype == torch.float32 else 2e-2
    for transform in transforms(network.causal_lm.config.get_text_config()):
        if float((transform(found) - logits).norm()) < tolerance * float(logits.norm()):
            return transform
    return None
