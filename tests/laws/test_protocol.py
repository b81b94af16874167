"""The promise on everything together: a few examples of the protocol machine; `campaign_protocol` runs many."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.children import Children
from tests.support.protocol_machine import Protocol


def test_crashes_faults_damage_and_duplicates_in_any_order_end_in_the_right_bytes(children: Children) -> None:
    Protocol.children, Protocol.tally = children, {}
    few = settings(
        max_examples=13, stateful_step_count=6, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(Protocol, settings=few)
    assert sum(count for what, count in Protocol.tally.items() if what.startswith("settled")) >= 8
    assert sum(count for what, count in Protocol.tally.items() if what.startswith(("fault", "damage"))) >= 5
