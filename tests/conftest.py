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


DOORS = {
    "real_data": (
        os.environ.get("OOCPATCH_REAL_DATA") == "1",
        "downloads a scan and a network; set OOCPATCH_REAL_DATA=1 to run it",
    ),
    "readers": (
        bool(os.environ.get("OOCPATCH_READERS")),
        "runs other programs; set OOCPATCH_READERS to the Python of an environment that has them",
    ),
}
"""By marker: whether it was asked for, and what to say if not."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what downloads, or needs other programs, unless it was asked for."""
    for item in items:
        for marker, (asked, reason) in DOORS.items():
            if item.get_closest_marker(marker) and not asked:
                item.add_marker(pytest.mark.skip(reason=reason))
