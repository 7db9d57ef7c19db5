"""The arithmetic of training: advantages, the clipped objective and value loss, KL control, the targets of SFT.

Where the policy chooses among the labels, with probability p of the right one, every objective's gradient is a weight
w(p) times that of log p. Cross-entropy: 1. The expected policy gradient, with rewards 1 and -1: 2p. With
`success_weight`: 2 (1 - (1 - p)^T).

PPO: Schulman et al. 2017, https://arxiv.org/abs/1707.06347. GAE: Schulman et al. 2016, https://arxiv.org/abs/1506.02438.
"""

import torch

NUMBER_SCALE = 0.5  # of a soft target: a number so far from the gold one has 1/e of its weight
KL_ERROR_CLIP, KL_GAIN = 0.2, 0.1  # of the adaptive KL coefficient


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


def group_mean_advantages(rewards: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Rewards (answers,) less the mean of all answers to the same prompt; `prompt` is its number, for each answer.

    Dr. GRPO: Liu et al. 2025, https://arxiv.org/abs/2503.20783.
    """
    return rewards - _mean_of_prompt(rewards, prompt)


def group_advantages(rewards: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """`group_mean_advantages` in units of the standard deviation of the prompt's rewards; 0 where they are all equal.

    The deviation is the sample's (n - 1). GRPO: Shao et al. 2024, https://arxiv.org/abs/2402.03300.
    """
    centred = group_mean_advantages(rewards, prompt)
    count = torch.bincount(prompt)[prompt]
    deviation = (_mean_of_prompt(centred**2, prompt) * count / (count - 1).clamp(min=1)).sqrt()
    return torch.where(deviation < 1e-6, torch.zeros_like(centred), centred / deviation)


def _mean_of_prompt(x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """(answers,) -> (answers,) the mean over the answers to the same prompt."""
    count = torch.bincount(prompt)
    return (torch.zeros(len(count)).index_add_(0, prompt, x) / count)[prompt]


def batch_advantages(returns: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Returns (actions,), scaled so that those of the whole batch, `among`, have zero mean and unit variance.

    REINFORCE++: Hu 2025, https://arxiv.org/abs/2501.03262.
    """
    return whiten(returns, among)


def success_weight(p: torch.Tensor, order: float) -> torch.Tensor:
    """(1 - (1 - p)^order) / p: what turns the gradient of success probabilities p into MaxRL's of this order.

    Order 1 (weight 1) maximises the expected reward; the higher the order, the closer it comes to the log-likelihood
    (weight 1 / p). The limit for p = 0 is the order. MaxRL: https://arxiv.org/abs/2602.02710.
    """
    if order == 1:
        return torch.ones_like(p)
    p = p.clamp(torch.finfo(p.dtype).tiny, 1.0)
    return -torch.expm1(order * torch.log1p(-p)) / p


def clipped_surrogate(
    ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float, clip_range_high: float
) -> torch.Tensor:
    """PPO's objective per action, to be maximised: the ratio counts from 1 - clip_range to 1 + clip_range_high.

    PPO, equation 7, has one range for both; two are DAPO's: Yu et al. 2025, https://arxiv.org/abs/2503.14476.
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range_high) * advantage)


def is_clipped(ratio: torch.Tensor, clip_range: float, clip_range_high: float) -> torch.Tensor:
    """Whether a ratio lies outside of the clip range."""
    return (ratio - 1 > clip_range_high) | (ratio - 1 < -clip_range)


def clipped_value_loss(new: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Half the squared error per state, the larger one of the value and of its clipped change."""
    clipped = old + (new - old).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((new - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); 0 if the returns do not vary."""
    variance = float(returns.var(unbiased=False))
    return 1 - float((returns - values).var(unbiased=False)) / variance if variance > 1e-12 else 0.0


def adapted_kl_coef(coef: float, kl: float, target: float) -> float:
    """The KL coefficient of the next step, which rises where the KL is above its target and falls where it is below.

    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593: the error is clipped to +-0.2, the gain is 0.1.
    """
    error = min(max(kl / target - 1, -KL_ERROR_CLIP), KL_ERROR_CLIP)
    return coef * (1 + KL_GAIN * error)


def number_weights(numbers: torch.Tensor, gold: float, soft: bool) -> torch.Tensor:
    """The target (numbers,) of a gold number: all weight on the nearest of the numbers, or (`soft`) weights that fall
    with the distance, exp(-|number - gold| / NUMBER_SCALE), normalised."""
    distance = (numbers - gold).abs()
    if soft:
        return torch.softmax(-distance / NUMBER_SCALE, dim=0)
    return torch.nn.functional.one_hot(distance.argmin(), len(numbers)).to(numbers.dtype)


def smoothed(target: torch.Tensor, smoothing: float) -> torch.Tensor:
    """A target (labels,) with this share of it spread evenly over all labels.

    Label smoothing: Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7.
    """
    return (1 - smoothing) * target + smoothing / len(target)
