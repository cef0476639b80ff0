from collections.abc import Callable

import pytest
from scheduler.in_flight import OF_STEPS_IN_FLIGHT
from scheduler.properties import OF_THE_POOL, OF_THE_SCHEDULER
from scheduler.refusals import REFUSALS


@pytest.mark.parametrize(
    "property_",
    [*OF_THE_POOL, *OF_THE_SCHEDULER, *OF_STEPS_IN_FLIGHT, *REFUSALS],
    ids=lambda property_: property_.__name__,
)
def test_property(property_: Callable[[], None]) -> None:
    property_()
