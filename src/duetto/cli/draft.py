"""The draft model that flags name, where no weights are needed."""

from duetto.core.speculation import DraftModelOptions
from duetto.models.find import find_draft_program
from duetto.planner.layout import Layout
from duetto.planner.speculation import proposer, read_acceptance
from duetto.program.program import Program


def find_draft(layout: Layout, target: Program) -> Program | None:
    """None if nothing proposes, or what does is no model. Raises ConfigError, naming the flag, also
    for other flags of speculation that are wrong."""
    found = proposer(layout)
    if found is None:
        return None
    read_acceptance(layout.speculative_acceptance or "")
    options = found[1]
    if not isinstance(options, DraftModelOptions):
        return None
    return find_draft_program(options, target)
