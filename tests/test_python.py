"""Which Python a virtual environment is made with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "python"
TOOLS = ("cut", "head", "id", "sort")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Folders with one `python3` each: this one, this one made slow, and none at all. One has what a script needs."""
    said = {
        "broken": "exit 1",
        "slow": f'PYTHONDEVMODE=1 exec {sys.executable} "$@"',
        "usual": f'exec {sys.executable} "$@"',
    }
    for name, script in said.items():
        (tmp_path / name).mkdir()
        python = tmp_path / name / "python3"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    (tmp_path / "tools").mkdir()
    for tool in TOOLS:
        (tmp_path / "tools" / tool).symlink_to(shutil.which(tool) or tool)
    return {name: tmp_path / name for name in (*said, "tools")}


def printed(folders: Mapping[str, Path], *names: str, argument: str | None = None) -> str:
    path = ":".join(str(folders[name]) for name in (*names, "tools"))
    command = ["/bin/sh", str(SCRIPT), *([argument] if argument else [])]
    return subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, check=True).stdout.strip()


def test_the_first_that_works_is_taken(folders: dict[str, Path]) -> None:
    assert printed(folders, "slow", "usual") == str(folders["slow"] / "python3")


@pytest.mark.parametrize("names", [("broken", "slow", "usual"), ("usual", "slow", "broken")])
def test_for_a_benchmark_the_fastest_that_works_is_taken(folders: dict[str, Path], names: tuple[str, ...]) -> None:
    assert printed(folders, *names, argument="fastest") == str(folders["usual"] / "python3")


def test_where_no_python_works_it_is_said_what_to_do(folders: dict[str, Path]) -> None:
    # Without the package manager among the tools, nothing is installed.
    path = f"{folders['broken']}:{folders['tools']}"
    for arguments in ([], ["fastest"]):
        ended = subprocess.run(["/bin/sh", str(SCRIPT), *arguments], env={"PATH": path}, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert "no Python 3.11 or newer: install one" in ended.stderr
