"""What may happen to a run from outside, and how it ends then: signals, a lost terminal, a full disk.

SIGTERM, SIGHUP, Ctrl-C    a checkpoint at the end of the step, exit code 143, 129 or 130; a second Ctrl-C: at once
                           (in inference.py and fewshot.py always at once: what was answered is on the disk)
nobody reads the output    the run goes on without it
anything that stops it     one sentence, and how to go on; exit code 1, or 2 for bad input
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from machine import processes
from machine.errors import TrainingError, clear_errors
from run.checkpoints import checkpoints_of

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Stopped(BaseException):
    """A signal that does not wait for the end of the step. No Exception, so that nothing on its way swallows it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Guard:
    """Stands around a run and ends it when a signal comes: training after the step (stopping.py), all else at once."""

    def __init__(self, program: str):
        self.program = program
        self.folder: Path | None = None  # the run's, once there is one
        self.kept = ""  # what a run without checkpoints leaves
        self.training = False
        self.received: int | None = None
        self.at_exit: list[Callable[[int], None]] = []  # called with the exit code

    def handle(self, number: int, frame) -> None:
        """The signals' handler."""
        again = self.received is not None
        if not self.training or (again and number == signal.SIGINT):
            for other in SIGNALS:  # from here on nothing may cut short the way out
                signal.signal(other, signal.SIG_IGN)
            raise Stopped(number)
        if not again:
            self.received = number
            more = "; once more: at once" if number == signal.SIGINT else ""
            # print would fail if the signal came in the middle of another print.
            with contextlib.suppress(OSError):
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: saving a checkpoint at the end of this step, then stopping{more}.\n".encode())

    def trained(self, trainer) -> None:
        """After training: end here if a signal asked for it."""
        if self.received is not None:
            self.leave(self.received, f"at step {trainer.state.global_step}")

    def leave(self, number: int, when: str) -> None:
        """Say where the run stands and how to go on; SystemExit with 128 and the signal's number."""
        name = signal.Signals(number).name
        if processes.is_main():
            print(f"{self.program}: stopped {when} by {name}; {self.where()}{self.way_on()}", file=sys.stderr)
        raise SystemExit(128 + number)

    def where(self) -> str:
        """Where the run stands."""
        if self.kept:
            return self.kept
        found = checkpoints_of(self.folder) if self.folder else []
        return f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    def way_on(self) -> str:
        """The command that goes on with the run, if there is one."""
        if self.folder is None:
            return ""
        return f". Go on with:\n  bash scripts/{Path(self.program).stem}.sh --resume {self.folder}"


@contextlib.contextmanager
def guard(program: str) -> Iterator[Guard]:
    """Everything of a run between its arguments and its end happens in here."""
    self = Guard(program)
    code = 1
    with surviving_streams(), contextlib.ExitStack() as handlers:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup, say, ignores SIGHUP, and so it shall stay
                    handlers.callback(signal.signal, number, signal.signal(number, self.handle))
        try:
            try:
                with clear_errors(program):
                    yield self
                code = 0
            finally:
                for action in reversed(self.at_exit):
                    action(code)
        except Stopped as stopped:
            self.leave(stopped.number, "at once")
        except TrainingError as error:
            print(f"{program}: stopped: {error}{self.way_on()}", file=sys.stderr)
            raise SystemExit(1) from error
        except OSError as error:
            if self.folder is None:
                raise
            reason = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
            print(f"{program}: stopped: {reason}; {self.where()}{self.way_on()}", file=sys.stderr)
            raise SystemExit(1) from error


class Survivor:
    """A text stream that is written to for as long as somebody can read it, and into nothing from then on."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        with self.surviving():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.surviving():
            self.stream.flush()

    @contextlib.contextmanager
    def surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # EIO: the terminal is gone; EPIPE: the program that read the pipe
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())  # what is buffered goes there too
            os.close(nothing)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextlib.contextmanager
def surviving_streams() -> Iterator[None]:
    """Printing cannot end the program in here."""
    with contextlib.redirect_stdout(Survivor(sys.stdout)), contextlib.redirect_stderr(Survivor(sys.stderr)):
        yield
