"""The sockets and memories that join parts, made by the engine's process before they start."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from duetto.backends.parts.board import make_board
from duetto.backends.parts.part import PartPlace
from duetto.backends.parts.rows import make_rows_memory
from duetto.backends.parts.wiring import Wiring


@dataclass(frozen=True, slots=True)
class JoinedParts:
    """By stage, then by rank. `results` stays with who reads them."""

    wirings: tuple[Wiring, ...]
    results: int  # rows of logits
    board: int
    _inherited: tuple[int, ...]  # of no use here once all parts have started

    def let_go(self) -> None:
        for descriptor in self._inherited:
            os.close(descriptor)


def join_parts(num_stages: int, num_ranks: int, groups: Sequence[int] = ()) -> JoinedParts:
    """`groups`: of each stage, the memory in which its ranks meet."""
    board, results = make_board(), make_rows_memory("results")
    before: dict[tuple[int, int], tuple[int, int]] = {}
    behind: dict[tuple[int, int], tuple[int, int]] = {}
    inherited: list[int] = []
    for stage in range(num_stages - 1):
        for rank in range(num_ranks):
            rows = make_rows_memory(f"stage-{stage}")
            sends, receives = (each.detach() for each in socket.socketpair())
            behind[stage, rank], before[stage + 1, rank] = (sends, rows), (receives, rows)
            inherited += [rows, sends, receives]
    wirings = [
        Wiring(
            index=stage * num_ranks + rank,
            place=PartPlace(stage, num_stages, rank, num_ranks),
            board=board,
            before=before.get((stage, rank)),
            behind=behind.get((stage, rank)),
            results=results if (stage, rank) == (num_stages - 1, 0) else None,
            group=groups[stage] if groups else None,
        )
        for stage in range(num_stages)
        for rank in range(num_ranks)
    ]
    return JoinedParts(tuple(wirings), results, board, (board, *inherited))
