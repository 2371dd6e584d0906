"""One engine and one gateway for all of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.gateway import TEMPLATE, Pair, engine, gateway

from pagefork.server.launch import Served


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    with engine() as found:
        yield found


@pytest.fixture(scope="session")
def pair(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """With a chat template, and without a key."""
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "chat.jinja").write_text(TEMPLATE)
    with gateway(served, folder, chat_template=str(folder / "chat.jinja")) as found:
        yield found
