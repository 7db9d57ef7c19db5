"""Memory: how many tokens of a model fit into it, what the C library does with freed memory, and whether it ran out."""

import ctypes
import os

import psutil
import torch
from torch import nn

OF_ALL_WEIGHTS = 3  # times their own memory: gradients, and Adam's two moments
SMALLEST_BUDGET = 16  # tokens: less than any prompt, so one row at a time


def ran_out(error: BaseException) -> bool:
    """Whether this error says that memory ran out, on the card or off it."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in ("allocate memory", "CUDA error: out of memory"))


def training_token_budget(model: nn.Module, keep_rollout: bool = False, copies: int = 0) -> int:
    """How many tokens may go through the network at once in training: as many as half the free memory holds.

    copies: how many times the weights' own memory is still to be taken (see OF_ALL_WEIGHTS).

    A token keeps at most 32 hidden and 12 feed-forward vectors a layer (SmolLM2-135M-Instruct with LoRA on all linear
    layers: half of that on a CPU). On a CPU more than 512 tokens only cost memory, unless the forward of a rollout is
    kept for its first update (`keep_rollout`): then up to 2,048 tokens save a second forward. On a card more than
    16,384 gain nothing.
    """
    hidden, inner, layers = _sizes(model)
    return _fitting_tokens(model, layers * (32 * hidden + 12 * inner), 16384, 2048 if keep_rollout else 512, copies)


def inference_token_budget(model: nn.Module) -> int:
    """The same without gradients: a token keeps its keys and values, and one layer's activations at a time."""
    hidden, inner, layers = _sizes(model)
    return _fitting_tokens(model, 2 * layers * hidden + 32 * hidden + 12 * inner, 8192, 2048)


def _sizes(model: nn.Module) -> tuple[int, int, int]:
    """Hidden size, size of the feed-forward layer, and number of layers."""
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return config.hidden_size, inner, config.num_hidden_layers


def _fitting_tokens(model: nn.Module, numbers: int, most_on_card: int, most_on_cpu: int, copies: int = 0) -> int:
    """How many tokens of so many numbers each fit into half the free memory, rounded down to a power of two, so that
    the same machine gives the same micro-batches."""
    weight = model.get_input_embeddings().weight
    cuda = weight.device.type == "cuda"
    free = torch.cuda.mem_get_info(weight.device)[0] if cuda else psutil.virtual_memory().available
    free = max(free - copies * sum(p.numel() * p.element_size() for p in model.parameters()), 0)
    fits = free // 2 // (numbers * weight.element_size())
    return 1 << (int(min(max(fits, SMALLEST_BUDGET), most_on_card if cuda else most_on_cpu)).bit_length() - 1)


def keep_freed() -> None:
    """Let glibc keep freed memory (elsewhere this does nothing).

    Otherwise it returns a micro-batch's memory to the system when its backward ends, and the next micro-batch gets it
    back page by page, each filled with zeros: a tenth of a training step's time on two cores.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
        # Older versions take no more than 32 MiB; setting only the trim threshold would leave this one at 128 KiB.
        if mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25):
            mallopt(trim_threshold, 2**31 - 1)
