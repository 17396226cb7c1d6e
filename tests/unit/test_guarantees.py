"""The README's promises and the ledger's cells: none is named that is not there, and none shows nothing."""

from __future__ import annotations

import re
from pathlib import Path

from tests.faults.ledger.cells import CELLS

README = Path(__file__).parent.parent.parent / "README.md"


def test_the_guarantees_name_cells_that_there_are_and_every_fault_shows_one() -> None:
    promises = README.read_text().split("| promised | shown by the cells |")[1].split("What bad input becomes:")[0]
    words = set(re.findall(r"`([a-z0-9-]+)`", promises))

    assert {word for word in words if "-" in word} <= set(CELLS)
    assert set(CELLS) - words == {"nothing"}
