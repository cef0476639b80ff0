"""What a step in flight is to the progress of a request: it moves when the step departs, and waits
for the step to arrive. What the step gave is the scheduler's to say.
"""

from duetto.core.batch import ScheduledRequest
from duetto.core.request import Request
from duetto.scheduler.reuse import brings_the_last


def departing(request: Request, item: ScheduledRequest) -> ScheduledRequest:
    """The step is about to be in flight: the progress of the request moves."""
    request.num_in_flight += 1
    if item.source is not None:
        request.sources[item.source].num_computed += len(item.token_ids)
        return item
    request.num_computed_tokens = item.end
    if item.moves and brings_the_last(request, item):
        request.has_moved = True
    if item.rows:
        request.num_pending_tokens += 1
    drafting = item.drafting
    if drafting is not None:
        request.num_sent_tokens = drafting.start + len(drafting.token_ids)
        request.sent_to = drafting.method
        request.has_drafts_in_flight = drafting.num_wanted > 0
    if item.num_drafts:
        request.has_drafts_in_flight = True
    return item


def arrive(request: Request, item: ScheduledRequest) -> None:
    """The step is no longer in flight, whatever came of it."""
    request.num_in_flight -= 1
    if item.rows:
        request.num_pending_tokens -= 1
    if item.num_drafts or (item.drafting is not None and item.drafting.num_wanted):
        request.has_drafts_in_flight = False  # and no later step has any: it waited
