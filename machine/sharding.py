"""Models larger than one card: every process keeps a shard of each block's frozen weights.

    accelerate launch --config_file scripts/accelerate/fsdp.yaml  ppo.py ...    torch's fully_shard
    accelerate launch --config_file scripts/accelerate/zero3.yaml ppo.py ...    DeepSpeed's ZeRO stage 3

A block's weights are all-gathered when it computes, forward and backward, so all processes must run the same number of
blocks: the engine keeps them in lockstep. The adapter, a few percent of the weights, stays whole in every process, and
so do its gradient and optimizer state: checkpoints are those of a single process. Embeddings, output layer and value
head stay whole too, as the engine reads single columns of them. (ZeRO: https://arxiv.org/abs/1910.02054)
"""

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from machine import processes


def active() -> bool:
    """Whether the weights are sharded in this run."""
    return processes.LAUNCHED_FOR in processes.SHARDING and processes.count() > 1


def notice() -> str:
    """One line on what is made of accelerate's configuration; empty if that asks for nothing but processes."""
    if active():
        return f"{processes.LAUNCHED_FOR}: each of {processes.count()} processes keeps a shard of the frozen weights."
    if processes.LAUNCHED_FOR and processes.LAUNCHED_FOR not in processes.SHARDING:
        return (
            f"{processes.LAUNCHED_FOR} would shard gradients and optimizer state; an adapter's are small, and stay "
            "whole in every process, as the weights do."
        )
    return ""


def shard(model: PreTrainedModel) -> None:
    """Freeze the model, leave this process its shard of the blocks' weights, and move what it has to its device.

    model: a causal language model, no adapter on it yet. Does nothing in a run that was not launched for it. Raises
    ValueError for a model that does not name its blocks.
    """
    if not active():
        return
    model.requires_grad_(False)
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if not blocks:
        raise ValueError(f"{type(model).__name__} does not say what its blocks are, so its weights cannot be sharded")
    if processes.LAUNCHED_FOR == "FSDP":
        mesh = init_device_mesh(processes.device().type, (processes.count(),))
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    else:
        model.zero = _zero_3(blocks)
    model.to(processes.device())


def _zero_3(blocks: list[nn.Module]) -> tuple:
    """DeepSpeed's engine, in a tuple so that it is no submodule of the model: its hooks all-gather every layer's
    weights and release them again. It has no optimizer: nothing that it holds is trained."""
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    settings = {"stage": 3, "stage3_param_persistence_threshold": 0}  # by default small weights stay whole
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": settings}
    return (deepspeed.initialize(model=nn.ModuleList(blocks), config=config)[0],)


def hide_frozen(model: nn.Module) -> None:
    """Keep DistributedDataParallel, which needs whole weights, away from those that are not trained."""
    if active():
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
