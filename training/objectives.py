"""PPO's arithmetic: advantages, the clipped objective and value loss, and how much of the returns the critic explains.

PPO: Schulman et al. 2017, https://arxiv.org/abs/1707.06347. GAE: Schulman et al. 2016, https://arxiv.org/abs/1506.02438.
"""

import torch


def gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Advantages and returns of one answer of T tokens; after the last token the value is 0. (GAE, equation 16.)"""
    advantages, following, value = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * value - values[t]
        following = delta + gamma * lam * following
        advantages[t], value = following, values[t]
    return advantages, [a + v for a, v in zip(advantages, values)]


def whiten(x: torch.Tensor, among: torch.Tensor | None = None) -> torch.Tensor:
    """x, scaled so that `among` (default x itself) has zero mean and unit variance.

    Fewer than two values, or values that are all equal, leave it as it is.
    """
    among = x if among is None else among
    if among.numel() < 2 or float(among.std()) < 1e-6:
        return x
    return (x - among.mean()) / among.std()


def leave_one_out_advantages(
    advantages: torch.Tensor, returns: torch.Tensor, prompt: torch.Tensor, node: torch.Tensor
) -> torch.Tensor:
    """Advantages (actions,) against the mean return of the other samples that stood at the same state.

    A state that only one sample reached keeps its advantage against the critic. Leaving the own sample out keeps the
    gradient unbiased (RLOO: Kool et al. 2019, https://openreview.net/forum?id=r1lgTGL5DE).
    """
    _, state = torch.unique(torch.stack([prompt, node]), dim=1, return_inverse=True)
    count = torch.zeros(int(state.max()) + 1).index_add_(0, state, torch.ones_like(returns))[state]
    total = torch.zeros(int(state.max()) + 1).index_add_(0, state, returns)[state]
    others = (total - returns) / (count - 1).clamp(min=1)
    return torch.where(count > 1, returns - others, advantages)


def clipped_surrogate(ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """PPO's objective per action, to be maximised. (PPO, equation 7.)"""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def clipped_value_loss(new: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Half the squared error per state, the larger one of the value and of its clipped change."""
    clipped = old + (new - old).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((new - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); 0 if the returns do not vary."""
    variance = float(returns.var(unbiased=False))
    return 1 - float((returns - values).var(unbiased=False)) / variance if variance > 1e-12 else 0.0
