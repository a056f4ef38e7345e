"""An accelerator that this machine need not have."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def simulated():
    """Run the test with a simulated ``cuda:0``; see :mod:`simulated_device`."""
    from simulated_device import SimulatedDevice

    with SimulatedDevice() as device:
        yield device
