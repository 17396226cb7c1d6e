"""The public interface is what was promised: `interface/` states it, `uses/` and `first.py` are users' programs.

Those files are copies of the promise, changed only with it, and so are not formatted or linted here.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pydantic
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
STUBS = HERE / "interface"
MODULES = {"eventbus": "__init__.pyi", "eventbus.testing": "testing.pyi", "eventbus.dead_letters": "dead_letters.pyi"}
# A TypeVar or an alias in the stubs that users do not import.
PRIVATE = {"M", "H", "S", "Key", "E_", "S_"}
# What the promise leaves open: the constructors of what only the library makes. (And a Literal is no Union.)
LEFT_OPEN = """
eventbus\\.(Context|Envelope|EnvelopeError|PublishError|PartlyPublished|dead_letters\\.DeadLetter)\\.__init__
eventbus\\.(M|H|S|Key)
eventbus\\.dead_letters\\.Reason
"""


def run(*command: str, cwd: Path, mypy_path: Path | str = "") -> str:
    environment = {"MYPYPATH": str(mypy_path), "PATH": str(Path(sys.executable).parent)}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stub_of(module: str) -> ast.Module:
    return ast.parse((STUBS / "eventbus" / MODULES[module]).read_text())


def promised(module: str) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | str]:
    """The classes and functions of a stub, and the names of its aliases."""
    for statement in stub_of(module).body:
        match statement:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield statement
            case ast.Assign(targets=[ast.Name(id=name)]) if name not in PRIVATE:
                yield name


def name_of(promise: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | str) -> str:
    return promise if isinstance(promise, str) else promise.name


@pytest.mark.parametrize("module", MODULES)
def test_the_public_names_are_the_promised_ones(module: str) -> None:
    exported = importlib.import_module(module).__all__

    assert sorted(exported) == sorted(map(name_of, promised(module)))


@pytest.mark.parametrize("module", MODULES)
def test_classes_have_the_promised_bases(module: str) -> None:
    package = importlib.import_module(module)
    known = {
        "BaseModel": pydantic.BaseModel,
        **vars(builtins),
        **{name: getattr(package, name) for name in dir(package)},
    }

    pairs = [
        (getattr(package, promise.name), known[base.id])
        for promise in promised(module)
        if isinstance(promise, ast.ClassDef)
        for base in promise.bases
        if isinstance(base, ast.Name) and base.id != "Protocol"
    ]

    assert [pair for pair in pairs if not issubclass(*pair)] == []


def test_signatures_are_the_promised_ones(tmp_path: Path) -> None:
    allowed = tmp_path / "left_open"
    allowed.write_text(LEFT_OPEN)

    run(
        *("mypy.stubtest", "eventbus", "--concise", "--ignore-missing-stub", "--allowlist", str(allowed)),
        cwd=ROOT,
        mypy_path=STUBS,
    )


def test_users_programs_pass_mypy_strict(tmp_path: Path) -> None:
    programs = copy_programs(tmp_path)

    said = run(
        "mypy", "--strict", "--config-file=", "--cache-dir", str(ROOT / ".mypy_cache/typed"), *programs, cwd=tmp_path
    )

    assert f"no issues found in {len(programs)} source files" in said


def test_users_programs_pass_pyright(tmp_path: Path) -> None:
    copy_programs(tmp_path)

    said = run("pyright", "--pythonpath", sys.executable, ".", cwd=tmp_path)

    assert "0 errors, 0 warnings" in said


def copy_programs(folder: Path) -> list[str]:
    """Users' programs in a folder of their own, as users have them: `import schemas` there is theirs."""
    programs = [HERE / "first.py", *sorted((HERE / "uses").glob("*.py"))]
    assert len(programs) == 6
    for program in programs:
        shutil.copy(program, folder)
    return [program.name for program in programs]


def test_a_type_error_in_a_users_program_is_found(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("from eventbus import Bus\nBus(source=1)\n")

    with pytest.raises(AssertionError, match="arg-type"):
        run(
            "mypy",
            "--strict",
            "--config-file=",
            "--cache-dir",
            str(ROOT / ".mypy_cache/typed"),
            "wrong.py",
            cwd=tmp_path,
        )
