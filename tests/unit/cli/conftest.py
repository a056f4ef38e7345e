from __future__ import annotations

import pytest

from advisor.cli.options import state


@pytest.fixture(autouse=True)
def _fresh_state():
    """Every test starts without --json, -v and --debug."""
    state.json = state.verbose = state.debug = False
    yield
    state.json = state.verbose = state.debug = False
