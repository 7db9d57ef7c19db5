"""What can happen to a run from outside, and how the run ends: signals, a lost terminal, a full disk.

SIGTERM, SIGHUP, Ctrl-C    a checkpoint at the end of the step, exit code 143, 129 or 130; a second Ctrl-C: at once
                           (the evaluation after the last step is not waited for: a resume does it)
                           (inference.py and fewshot.py always end at once: all answers so far are on the disk)
nobody reads the output    the run goes on without output
anything that stops it     one sentence and the command that resumes; exit code 1, or 2 for bad input
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
    """A signal that does not wait for the end of the step. Not an Exception, so that no handler on the way takes it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Guard:
    """Stands around a run and ends it when a signal comes: training after the step (stopping.py), all else at once."""

    def __init__(self, program: str):
        self.program = program
        self.folder: Path | None = None  # the run's, once there is one
        self.saved = ""  # what a run without checkpoints has saved
        self.training = False
        self.received: int | None = None  # the signal after which training shall end
        self.at_exit: list[Callable[[int], None]] = []  # called with the exit code

    def handle(self, number: int, frame) -> None:
        """The handler of all SIGNALS."""
        again = self.received is not None
        if not self.training or (again and number == signal.SIGINT):
            for other in SIGNALS:  # a further one must not interrupt the clean-up
                signal.signal(other, signal.SIG_IGN)
            raise Stopped(number)
        if not again:
            self.received = number
            more = "; once more: at once" if number == signal.SIGINT else ""
            # print would fail if the signal came in the middle of another print.
            with contextlib.suppress(OSError):
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: saving a checkpoint at the end of this step, then stopping{more}.\n".encode())

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """In here a signal, or one that came before, does not wait: Stopped is raised."""
        training, self.training = self.training, False
        try:
            if self.received is not None:
                raise Stopped(self.received)
            yield
        finally:
            self.training = training

    def end_training(self, step: int) -> None:
        """After training, which got to this step: SystemExit if a signal ended it."""
        if self.received is not None:
            self.leave(self.received, f"at step {step}")

    def leave(self, number: int, when: str) -> None:
        """Say what is saved and how to resume; SystemExit with 128 plus the signal's number."""
        name = signal.Signals(number).name
        if processes.is_main():
            print(
                f"{self.program}: stopped {when} by {name}; {self.what_is_saved()}{self.resume_command()}",
                file=sys.stderr,
            )
        raise SystemExit(128 + number)

    def what_is_saved(self) -> str:
        """What of the run is on the disk."""
        if self.saved:
            return self.saved
        found = checkpoints_of(self.folder) if self.folder else []
        return f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    def resume_command(self) -> str:
        """The command that resumes the run, if there is a run yet."""
        if self.folder is None:
            return ""
        return f". Go on with:\n  bash scripts/{Path(self.program).stem}.sh --resume {self.folder}"


@contextlib.contextmanager
def guard(program: str) -> Iterator[Guard]:
    """Everything that a run does once its arguments are parsed happens in here."""
    self = Guard(program)
    code = 1
    with surviving_streams(), contextlib.ExitStack() as handlers:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it for SIGHUP
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
            print(f"{program}: stopped: {error}{self.resume_command()}", file=sys.stderr)
            raise SystemExit(1) from error
        except OSError as error:
            if self.folder is None:
                raise
            reason = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
            print(f"{program}: stopped: {reason}; {self.what_is_saved()}{self.resume_command()}", file=sys.stderr)
            raise SystemExit(1) from error


class Survivor:
    """A text stream that discards what is written once nobody can read it any more."""

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
            os.dup2(nothing, self.stream.fileno())  # the buffer is flushed there too
            os.close(nothing)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextlib.contextmanager
def surviving_streams() -> Iterator[None]:
    """In here, output that nobody reads does not end the program."""
    with contextlib.redirect_stdout(Survivor(sys.stdout)), contextlib.redirect_stderr(Survivor(sys.stderr)):
        yield
