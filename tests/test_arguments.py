"""The command line, and that what is written about an option agrees with its field in the dataclass."""

import ast
import importlib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from run.parser import Parser, option, options_of
from scripts import arguments as documents

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [script for script in documents.KINDS if script not in documents.WITHOUT_CONFIG]

# ------------------------------------------------------------------------------------------------------------ parsing


@dataclass
class Options:
    """What the tests below parse."""

    learning_rate: float | None = option(None, "PPO", "step size")
    from_local: bool = option(False, "model", "a folder")
    same_shots: bool = option(True, "model", "the same")
    output_dir: str = option("", "run", "where, 100% of it")


def parse(*arguments: str) -> dict:
    return vars(Parser(Options, "A test.", prog="test.py").parse_args(arguments))


DEFAULTS = {"learning_rate": None, "from_local": False, "same_shots": True, "output_dir": ""}


@pytest.mark.parametrize(
    "given, expected",
    [
        ([], {}),
        (["--learning_rate", "1e-3"], {"learning_rate": 1e-3}),
        (["--learning_rate=1e-3"], {"learning_rate": 1e-3}),
        (["--learning-rate=1e-3"], {"learning_rate": 1e-3}),
        (["--output-dir", "a-b_c"], {"output_dir": "a-b_c"}),
        (["--output_dir", "a=b"], {"output_dir": "a=b"}),
        (["--from_local"], {"from_local": True}),
        (["--from-local", "yes"], {"from_local": True}),
        (["--from_local", "True", "--from_local", "0"], {"from_local": False}),
        (["--same_shots", "false"], {"same_shots": False}),
        (["--no_same_shots"], {"same_shots": False}),
        (["--no-same-shots"], {"same_shots": False}),
    ],
)
def test_every_spelling_of_an_option(given, expected):
    assert parse(*given) == DEFAULTS | expected


@pytest.mark.parametrize("given", [["--from_local", "maybe"], ["--learning", "1"], ["--learning_rate", "fast"], ["x"]])
def test_what_is_no_option_ends_with_one_sentence(given, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*given)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("test.py: error: ") and said.count("\n") == 1


def test_help_shows_one_spelling_of_each_option_in_its_group(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    said = capsys.readouterr().out
    assert said.index("\nrun:\n") < said.index("\nmodel:\n") < said.index("\nPPO:\n")
    assert "--output_dir TEXT" in said and "100% of it" in said and "--output-dir" not in said and "--no_" not in said
    assert "(default: True)" in said and "(default: None)" not in said


# ----------------------------------------------------------------------------------------------------- every argument


def project_imports(name: str, seen: set[str]) -> set[str]:
    """A module of the project (a dotted name) and all others that it imports."""
    path = source_file(name)
    if name not in seen and path.exists():
        seen.add(name)
        for node in ast.walk(ast.parse(path.read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                found += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            for imported in found:
                project_imports(imported, seen)
    return seen


def source_file(name: str) -> Path:
    return ROOT / f"{name.replace('.', '/')}.py"


def arguments_read(module: str) -> set[str]:
    """Every <name> of an `arguments.<name>` that is read, but for functions that only check and return nothing."""
    tree = ast.parse(source_file(module).read_text())
    functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name.lstrip("_").startswith("check")]
    checks = {n for f in functions if isinstance(f.returns, ast.Constant) for n in ast.walk(f)}
    reads = [
        n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load) and n not in checks
    ]
    values = {"arguments": ast.Name, "self.arguments": ast.Attribute}
    found = {n.attr for n in reads if isinstance(n.value, tuple(values.values())) and ast.unparse(n.value) in values}
    # Properties of the arguments themselves read them too.
    kinds = [c for c in ast.walk(tree) if isinstance(c, ast.ClassDef) and c.name.endswith("Arguments")]
    own = [n for kind in kinds for n in ast.walk(kind) if isinstance(n, ast.Attribute) and n not in checks]
    return found | {n.attr for n in own if ast.unparse(n.value) == "self"}


def declared(script: str) -> set[str]:
    return {field.name for field in options_of(documents.KINDS[script])}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_declared_argument_is_read(script):
    read_somewhere = set().union(*(arguments_read(module) for module in project_imports(script, set())))
    assert not declared(script) - read_somewhere


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_shell_script_names_every_option_once(script):
    text = (ROOT / "scripts" / f"{script}.sh").read_text()
    listed = re.findall(r"^    (?:# )?--(\w+)", text, re.MULTILINE)
    passed = re.findall(r'--(\w+) "\$', text)
    assert {"task", "train_model_name", "seed", "output_dir"} <= set(passed)
    assert sorted([*listed, *passed]) == sorted([*declared(script), "config"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_argument(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"--{name} " in text for name in {*declared(script), "config"})


@pytest.mark.parametrize("path", documents.files(), ids=lambda path: path.name)
def test_what_is_written_about_the_options_is_up_to_date(path):
    """If not: `.venv/bin/python -m scripts.arguments` writes it."""
    assert path.read_text(encoding="utf-8") == documents.files()[path]


def test_help_texts_fit_beside_their_options():
    for path, text in documents.files().items():
        if path.suffix == ".sh":
            options = [line for line in text.splitlines() if re.match(r'(    (# )?--|\w+="\$)', line)]
            assert len(options) > 15 and max(map(len, options)) <= 120, max(options, key=len)
