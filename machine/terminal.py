"""Progress of work that takes long: a live bar on a terminal, plain lines in a file or a pipe."""

import sys
import time

from tqdm import tqdm


def progress_bar(total: int, done: int, **options) -> tqdm:
    """A bar on standard error; `disable` is True where that is no terminal, and every move would be another line."""
    return tqdm(total=total, initial=done, dynamic_ncols=True, disable=not sys.stderr.isatty(), **options)


def time_left(seconds: float) -> str:
    """40 s left, 3 min left, 2 h 5 min left."""
    if seconds < 60:
        return f"{seconds:.0f} s left"
    minutes = round(seconds / 60)
    return f"{minutes} min left" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min left"


class Progress:
    """Counts work: with a bar on a terminal, elsewhere with a line for every tenth that is done."""

    def __init__(self, name: str, unit: str, total: int, done: int, show: bool = True):
        """done: of `total`, by an earlier run. show: whether this process shows anything."""
        self.name, self.unit, self.total, self.done, self.show = name, unit, total, done, show
        self.first, self.started = done, time.perf_counter()
        self.bar = progress_bar(total, done, unit=unit, desc=name) if show else None

    def advance(self, count: int) -> None:
        """So much more is done."""
        before, self.done = self.done, self.done + count
        if self.bar is not None:
            self.bar.update(count)
        if self.bar is not None and self.bar.disable and 10 * before // self.total < 10 * self.done // self.total:
            rate = (time.perf_counter() - self.started) / (self.done - self.first)
            left = f", {time_left(rate * (self.total - self.done))}" if self.done < self.total else ""
            print(f"{self.name}: {self.done}/{self.total} {self.unit}s{left}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self.bar is not None:
            self.bar.close()
