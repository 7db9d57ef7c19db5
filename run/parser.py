"""The command line of a dataclass: an option for each field, with the field's default and help.

`--name value` and `--name=value` are read, also with hyphens for the underscores of a name. A boolean takes True or
False (yes and no, 1 and 0, ...); without a value it is True. A field's metadata holds its help and its group.
"""

import argparse
import dataclasses
import difflib
import re
import sys
import typing
from typing import NoReturn

GROUPS = (  # as --help shows
    "run", "model", "endpoint", "adapter", "training", "PPO", "SFT", "prompting", "answers", "evaluation and saving"
)  # fmt: skip
METAVARS = {int: "N", float: "X", str: "TEXT", list: "TEXT", bool: "True|False"}
WORDS = {"true": True, "yes": True, "t": True, "y": True, "1": True}
WORDS |= {"false": False, "no": False, "f": False, "n": False, "0": False}


def option(default, group: str, help: str) -> dataclasses.Field:
    """A field of a dataclass of arguments."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help})


def fixed(value) -> dataclasses.Field:
    """A field that shared code reads, with the only value that it has in this script: it is no option here."""
    return dataclasses.field(default=value, init=False)


def options_of(kind: type) -> list[dataclasses.Field]:
    """The fields that can be set on the command line."""
    return [field for field in dataclasses.fields(kind) if field.init]


def option_types(kind: type) -> dict[str, type]:
    """The type of every field's value; of `int | None` it is int, of `list[str] | None` list."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: next(
            typing.get_origin(t) or t
            for t in (*typing.get_args(hints[field.name]), hints[field.name])
            if t is not type(None)
        )
        for field in dataclasses.fields(kind)
    }


class Parser(argparse.ArgumentParser):
    """Parses the options of a dataclass, and says what is wrong in one sentence, without the list of all options."""

    def __init__(self, kind: type, description: str, prog: str | None = None):
        super().__init__(
            prog,
            usage="%(prog)s [--option value ...]",
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
        )
        self._groups: dict[str, argparse._ArgumentGroup] = {}
        types = option_types(kind)
        for field in sorted(options_of(kind), key=lambda f: GROUPS.index(f.metadata["group"])):
            self.add_option(field.name, types[field.name], field.default, **field.metadata)

    def add_option(self, name: str, type_: type, default, group: str, help: str) -> None:
        """Add `--name`."""
        if group not in self._groups:
            self._groups[group] = self.add_argument_group(group)
        shown = help + ("" if default in (None, "") else f" (default: {default})")
        how = dict(dest=name, default=default, metavar=METAVARS[type_], help=shown.replace("%", "%%"))
        if type_ is bool:
            self._groups[group].add_argument(f"--{name}", type=_boolean, nargs="?", const=True, **how)
            if default:
                self.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
        elif type_ is list:  # an option that may be repeated
            self._groups[group].add_argument(f"--{name}", action="append", **how)
        else:
            self._groups[group].add_argument(f"--{name}", type=type_, **how)

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(
            [self._canonical(a) for a in (sys.argv[1:] if args is None else args)], namespace
        )

    def _canonical(self, argument: str) -> str:
        """`--output-dir=x` -> `--output_dir=x`."""
        name, equals, value = argument.partition("=")
        canonical = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
        return canonical + equals + value if canonical in self._option_string_actions else argument

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        meant = f"did you mean {near[0]}? " if near else ""
        print(f"{self.prog}: error: {message.rstrip('.')}; {meant}--help lists all options", file=sys.stderr)
        raise SystemExit(2)


def _boolean(word: str | bool) -> bool:
    value = word if isinstance(word, bool) else WORDS.get(word.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return value
