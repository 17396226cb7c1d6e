"""Each case of the transport's suite, once for each adapter that is here.

What an adapter cannot do is in the report: a case that needs it is not run there, and not passed over in silence.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from tests.conftest import REMARKS
from tests.contract.bench import Adapter, Bench, adapters
from tests.servers import Brokers, find_lines, lines_to_test


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs(capability): run only for adapters that have it; the report says which not"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "adapter" not in metafunc.fixturenames:
        return
    found = adapters(lines_to_test(find_lines(), metafunc.config))
    for adapter in found:
        for capability in sorted(adapter.lacks):
            metafunc.config.stash[REMARKS][f"contract: {adapter.name} lacks: {capability}"] = None
    needed = {capability for marker in metafunc.definition.iter_markers("needs") for capability in marker.args}
    able = [adapter for adapter in found if not needed & adapter.lacks]
    metafunc.parametrize("adapter", able, ids=lambda adapter: adapter.name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What none of the adapters here can do is left out, and not called a skip: the report says who lacks it."""
    nowhere = [item for item in items if isinstance(item, pytest.Function) and not has_an_adapter(item)]
    if nowhere:
        config.hook.pytest_deselected(items=nowhere)
        items[:] = [item for item in items if item not in nowhere]


def has_an_adapter(item: pytest.Function) -> bool:
    return "adapter" not in item.fixturenames or isinstance(item.callspec.params["adapter"], Adapter)


@pytest.fixture
async def bench(adapter: Adapter, brokers: Brokers) -> AsyncIterator[Bench]:
    name = f"contract-{secrets.token_hex(4)}"
    async with AsyncExitStack() as ending:
        if adapter.line is None:
            yield Bench(f"memory://{name}", None, ending)
        else:
            server = brokers.shared(adapter.line)
            ending.callback(server.drop_vhosts)
            yield Bench(server.new_vhost(), server, ending, has_lane=adapter.has_lane)


@pytest.fixture
def tell(adapter: Adapter, pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Puts a figure into the report: what is worth knowing and depends on the computer, so that no test asserts it."""

    def add(figure: str) -> None:
        pytestconfig.stash[REMARKS][f"contract: {adapter.name}: {figure}"] = None

    return add
