"""Several processes on one run (accelerate launch, torchrun): who has which share, and what is brought together.

With a single process the same calls give back what they are given.
"""

import atexit
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed

T = TypeVar("T")


def _launched_for() -> str:
    """What else than processes accelerate's configuration asks for: FSDP, ZeRO-3, ZeRO-2, ..., or nothing.

    It is taken out of the environment: Trainer would cut up the adapter too, with checkpoints that must be unpickled,
    and would bring weights together for a whole model's forward only. See sharding.py.
    """
    asked = {name: os.environ.pop(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED")}
    if asked["DEEPSPEED"]:
        return f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2)}"
    return "FSDP" if asked["FSDP"] else ""


LAUNCHED_FOR = _launched_for()


def _state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())  # on a CPU they talk by gloo


@atexit.register
def _hang_up() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def run(main: Callable[[], None]) -> None:
    """A script's `main()`. One of several processes then ends at once, with the same exit code.

    Threads of gloo may still run while the interpreter takes everything down: "terminate called without an active
    exception" would be the end of a process whose work is done, even if its group was destroyed before.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
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
    return _state().num_processes


def number() -> int:
    """Which of them this one is, from 0."""
    return _state().process_index


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return number() == 0


def quiet_others() -> None:
    """From here on only the main process writes to standard output."""
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def peak_memory_bytes() -> int:
    """The most memory this process has held: on its card if there is one, else in all."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def share(size: int) -> slice:
    """This process's part of `size` rows: the parts lie one behind the other and differ by at most one row."""
    bounds = [size * i // count() for i in (number(), number() + 1)]
    return slice(*bounds)


def all_gather(items: list[T]) -> list[T]:
    """The items of all processes, the first process's first. Every process must call this, and gets them all."""
    return gather_object(items) if count() > 1 else items


def broadcast_from_main(make: Callable[[], T]) -> T:
    """What `make()` returns, or raises, in the main process; the others do not call it and get the same."""
    if count() == 1:
        return make()
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
    kept = [p for p in parameters if p.requires_grad]
    for parameter in kept:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in kept:
        by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_type.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message, not one per weight
        distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))
