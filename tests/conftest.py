"""What all tests share: Hypothesis profiles and the door to the tests that download real data."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# The same commit gives the same verdict, on any machine and however busy it is: no deadline, no random seed.
# `HYPOTHESIS_PROFILE=explore` looks for new counterexamples instead.
_QUIET = [HealthCheck.too_slow]
settings.register_profile("promise", deadline=None, derandomize=True, print_blob=True, suppress_health_check=_QUIET)
settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "promise"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what downloads unless it was asked for."""
    if os.environ.get("OOCPATCH_REAL_DATA") == "1":
        return
    skip = pytest.mark.skip(reason="downloads a scan and a network; set OOCPATCH_REAL_DATA=1 to run it")
    for item in items:
        if item.get_closest_marker("real_data"):
            item.add_marker(skip)
