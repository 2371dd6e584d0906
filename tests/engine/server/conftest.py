"""One served engine for all tests here that leave it as it was."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
from support.dealer import Dealer, eventually, probe
from support.served_requests import idle
from support.serving_process import GONE_WITHIN, LIMITS, configured

from pagefork.server.launch import Served


@pytest.fixture(scope="session")
def limited() -> Iterator[Served]:
    """Only the engine's environment names its runtime directory: other tests have their own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Served(configured(limits=LIMITS), environment=os.environ | {"PAGEFORK_RUNTIME_DIR": folder}) as engine,
    ):
        yield engine


@pytest.fixture
def served(limited: Served) -> Iterator[Served]:
    """After every test it holds nothing and serves a probe within two seconds."""
    yield limited
    with Dealer(limited.endpoint) as dealer:
        dealer.hello()
        eventually(lambda: idle(dealer), GONE_WITHIN + 5.0, "everything is let go of")
        dealer.bye()
    assert probe(limited.endpoint) < 2.0
