"""Several processes on one run (accelerate launch, torchrun): which share each has, and their collectives.

With a single process the same calls return what they are given, and torch is imported only where a device is asked for:
whoever misspells an option should not wait for it.
"""

from __future__ import annotations

import atexit
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

T = TypeVar("T")
SHARDING = ("FSDP", "ZeRO-3")  # the launch modes that shard the frozen weights


def _launched_for() -> str:
    """What accelerate's configuration asks for beside processes: FSDP, ZeRO-3, ZeRO-2, ..., or nothing.

    It is taken out of the environment: Trainer would shard the adapter too, with checkpoints that must be unpickled,
    and would all-gather weights for a whole model's forward only. See sharding.py.
    """
    asked = {name: os.environ.pop(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED")}
    if asked["DEEPSPEED"]:
        return f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2)}"
    return "FSDP" if asked["FSDP"] else ""


LAUNCHED_FOR = _launched_for()


def _launched() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _state() -> PartialState:
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())  # on a CPU they talk by gloo


@atexit.register
def _destroy_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")  # not imported: nothing to destroy
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def run(main: Callable[[], None]) -> None:
    """Run a script's `main()`. One of several processes then ends at once, with the exit code that it would have.

    Gloo's threads may still run while the interpreter shuts down, and would end a process whose work is done with
    "terminate called without an active exception", even if its process group was destroyed before.
    """
    if _launched() == 1:
        main()
        return
    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    atexit._run_exitfuncs()  # what was registered to be done at the end, as wandb's, is done
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def device() -> torch.device:
    """The card of this process, or the CPU."""
    return _state().device


def count() -> int:
    """How many processes there are."""
    return _state().num_processes if _launched() > 1 else 1


def number() -> int:
    """The rank of this process, from 0."""
    return _state().process_index if _launched() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return number() == 0


def quiet_others() -> None:
    """From here on only the main process writes to standard output."""
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def peak_memory_bytes() -> int:
    """The most memory this process has held: on its card if there is one, else in all."""
    torch = sys.modules.get("torch")  # not imported: nothing was computed here
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def share(size: int) -> slice:
    """This process's part of `size` rows: the parts lie one behind the other and differ by at most one row."""
    bounds = [size * i // count() for i in (number(), number() + 1)]
    return slice(*bounds)


def all_gather(items: list[T]) -> list[T]:
    """The items of all processes, the first process's first. Every process must call this, and gets them all."""
    if count() == 1:
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def broadcast_from_main(make: Callable[[], T]) -> T:
    """What `make()` returns, or raises, in the main process; the others do not call it and get the same."""
    if count() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    outcome: list = [None, None]
    if is_main():
        try:
            outcome[0] = make()
        except Exception as error:  # the others wait for an answer, whatever it is
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def add_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its sum over all processes. A process without a gradient counts as zero."""
    if count() == 1:
        return
    import torch

    kept = [p for p in parameters if p.requires_grad]
    for parameter in kept:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in kept:
        by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_type.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message, not one per weight
        torch.distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))
