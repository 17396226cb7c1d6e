"""The map in the README is the tree: what it lists exists, and what exists is listed.

The map is two fenced blocks. An entry begins after no indentation (the checkout) or two spaces (the package); what is
indented further continues it. In an entry of the package stand files (`bus.py`), a folder and the files in it
(`idempotency/  base.py  memory.py`), or a folder with its modules in parentheses (`cli/ (run, tail)`).
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def blocks() -> tuple[str, str]:
    """The checkout's and the package's."""
    section = (ROOT / "README.md").read_text().split("\n## The map\n", 1)[1].split("\n## ", 1)[0]
    checkout, package = re.findall(r"^```\w*\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return checkout, package


def modules_in(entry: str) -> set[str]:
    """The paths of the modules that an entry lists, below `eventbus/`."""
    folder = found[0] if (found := re.match(r"\w+/(?= {2,})", entry)) else ""
    files = {f"{folder}{name}" for name in re.findall(r"\b\w+\.py\b", entry)}
    in_parentheses = {
        f"{folder}{inner}/{name}.py"
        for inner, names in re.findall(r"(\w+)/ \(([\w,\s]+)\)", entry)
        for name in re.split(r",\s*", names)
    }
    return files | in_parentheses


def members_in(entry: str) -> list[str]:
    """The modules and folders right below `eventbus/` that an entry lists."""
    folder = re.match(r"(\w+)/", entry)
    return [folder[1]] if folder else re.findall(r"\b(\w+)\.py\b", entry)


def entries() -> list[str]:
    """The package's, in order."""
    _, package = blocks()
    return re.split(r"\n  (?=\S)", re.sub(r"^  ──.*\n", "", package, flags=re.MULTILINE))[1:]


def test_every_module_is_on_the_map_and_every_one_on_the_map_exists() -> None:
    package = ROOT / "eventbus"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}

    assert set().union(*map(modules_in, entries())) == modules


def test_the_contract_that_is_enforced_has_the_order_of_the_map() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == ["eventbus"])
    existing = [layer for layer in layers if not layer.startswith("(")]

    assert [member for entry in entries() for member in members_in(entry)] == existing[::-1]


def test_every_folder_of_the_checkout_is_on_the_map_and_every_path_on_the_map_exists() -> None:
    checkout, _ = blocks()
    listed = {path for line in checkout.splitlines() for path in re.findall(r"(?:^|   )([\w./]+)(?=   |$)", line)}
    folders = {f"{path.parent.name}/" for path in ROOT.glob("[a-z]*/*") if path.is_file()}

    assert {path for path in listed if not (ROOT / path).exists()} == set()
    assert folders - listed == set()


def test_an_entry_is_read_as_its_modules() -> None:
    assert modules_in("worker.py  health.py  cli/ (run,\n     tail)") == {
        "worker.py",
        "health.py",
        "cli/run.py",
        "cli/tail.py",
    }
    assert modules_in("transport/     base.py (the port)  rabbitmq/ (lines)") == {
        "transport/base.py",
        "transport/rabbitmq/lines.py",
    }
    assert modules_in("delay.py         the delay tree's arithmetic: rounding, routing keys") == {"delay.py"}
