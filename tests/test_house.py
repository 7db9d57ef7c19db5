"""The shape of the code: which room may import which, and how large files, classes and functions may be.

A room is a folder of modules, or a script at the root. Every message names what breaks a rule, and where.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AT_ROOT = sorted(path.stem for path in ROOT.glob("*.py"))
# An import goes down, or stays on its floor in one direction.
FLOORS = (
    ("benchmarks", "scripts"),
    tuple(name for name in AT_ROOT if name not in ("prompts", "rewards")),
    ("training", "reporting"),
    ("evaluation", "run"),
    ("prompts",),
    ("rewards",),
    ("engine", "tasks"),
    ("machine",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TABLES = {"tasks/table.py"}  # tables of data, of any length
TRAINERS = {"training/ppo_trainer.py: PPOTrainer.__init__", "training/sft_trainer.py: Finetuner.__init__"}
MOST_AT_ROOT, MOST_LINES, MOST_OF_CLASS, MOST_OF_FUNCTION, MOST_PARAMETERS = 9, 420, 350, 80, 9

Sources = dict[str, str]  # path below the root -> text


def product() -> Sources:
    paths = [*ROOT.glob("*.py"), *(path for room in FLOOR for path in (ROOT / room).glob("**/*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def room_of(path: str) -> str:
    """`tasks/table.py` -> `tasks`, `prompts.py` -> `prompts`."""
    return path.split("/")[0].removesuffix(".py")


def imports(sources: Sources) -> Iterator[tuple[str, int, str]]:
    """Every import of a product module: the importing file, the line, and the dotted name, wherever it stands."""
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((path, node.lineno, name) for name in names if name.split(".")[0] in FLOOR)


def upward_imports(sources: Sources) -> list[str]:
    return [
        f"{path}:{line} imports {name} from a higher floor"
        for path, line, name in imports(sources)
        if FLOOR[name.split(".")[0]] < FLOOR[room_of(path)]
    ]


def circle(sources: Sources) -> list[str]:
    """The rooms of a circle of imports, each with one import that leads to the next; empty if there is none."""
    graph: dict[str, dict[str, str]] = {room: {} for room in FLOOR}
    for path, line, name in imports(sources):
        room, imported = room_of(path), name.split(".")[0]
        if room != imported:
            graph[room].setdefault(imported, f"{path}:{line} imports {name}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        rooms = error.args[1][::-1]
        return [graph[room][imported] for room, imported in zip(rooms, rooms[1:])]
    return []


def private_names(sources: Sources) -> list[str]:
    """Names with an underscore that are imported from another module, or read from an imported one."""

    def private(name: str) -> bool:
        return name.startswith("_") and not name.startswith("__")

    found = [f"{path}:{line} imports {name}" for path, line, name in imports(sources) if private(name.split(".")[-1])]
    for path, text in sources.items():
        imported = {name.split(".")[-1] for _, _, name in imports({path: text})}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node.value) in imported:
                found.append(f"{path}:{node.lineno} reads {ast.unparse(node)}")
    return found


def definitions(sources: Sources) -> Iterator[tuple[str, ast.AST]]:
    """Every class and function with its name: `engine/engine.py: Engine.generate`."""

    def below(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}{child.name}", child
                yield from below(child, f"{name}{child.name}.")
            else:
                yield from below(child, name)

    for path, text in sources.items():
        yield from below(ast.parse(text), f"{path}: ")


def too_long(sources: Sources) -> list[str]:
    found = [
        f"{path} has {text.count(chr(10))} lines (at most {MOST_LINES})"
        for path, text in sources.items()
        if text.count("\n") > MOST_LINES and path not in TABLES
    ]
    for name, node in definitions(sources):
        kind, most = ("class", MOST_OF_CLASS) if isinstance(node, ast.ClassDef) else ("function", MOST_OF_FUNCTION)
        lines = node.end_lineno - node.lineno + 1
        if lines > most:
            found.append(f"{name}: a {kind} of {lines} lines (at most {most})")
    return found


def too_many_parameters(sources: Sources) -> list[str]:
    found = []
    for name, node in definitions(sources):
        if not isinstance(node, ast.ClassDef) and name not in TRAINERS:
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            number = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))  # ctx: of torch.autograd.Function
            if number > MOST_PARAMETERS:
                found.append(f"{name} has {number} parameters (at most {MOST_PARAMETERS})")
    return found


RULES = [upward_imports, circle, private_names, too_long, too_many_parameters]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_nothing_breaks_the_rule(rule):
    broken = rule(product())
    assert not broken, "\n".join(["", *broken])


def test_the_root_shows_little():
    assert len(AT_ROOT) <= MOST_AT_ROOT, f"at the root lie {len(AT_ROOT)} Python files: {', '.join(AT_ROOT)}"
    rooms = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    assert rooms <= set(FLOOR), f"folders with Python files but without a floor: {sorted(rooms - set(FLOOR))}"


@pytest.mark.parametrize(
    ("rule", "sources", "said"),
    [
        (upward_imports, {"engine/a.py": "def f():\n    from run.b import c"}, "engine/a.py:2 imports run.b.c from"),
        (circle, {"run/a.py": "import evaluation.b", "evaluation/b.py": "from run import a"}, "imports evaluation.b"),
        (private_names, {"run/a.py": "from tasks.b import _c"}, "run/a.py:1 imports tasks.b._c"),
        (private_names, {"run/a.py": "from tasks import b\nb._c()"}, "run/a.py:2 reads b._c"),
        (too_long, {"run/a.py": "\n" * 421}, "run/a.py has 421 lines"),
        (too_long, {"run/a.py": "class A:\n  def f():\n" + "    0\n" * 80}, "run/a.py: A.f: a function of 81 lines"),
        (
            too_many_parameters,
            {"run/a.py": "def f(a, b, c, d, e, f, g, h, i, *, j): 0"},
            "run/a.py: f has 10 parameters",
        ),
    ],
)
def test_what_breaks_a_rule_is_named(rule, sources, said):
    assert any(said in line for line in rule(sources))


def test_what_keeps_the_rules_is_not_named():
    sources = {
        "run/a.py": "import torch\nfrom tasks import b\nclass A:\n    def f(self, a, b, c, d, e, f, g, h, i): b.c()\n",
        "tasks/b.py": "from machine import c",
        "tasks/table.py": "\n" * 1000,
    }
    assert [rule(sources) for rule in RULES] == [[]] * len(RULES)
