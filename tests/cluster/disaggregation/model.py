"""A world of two engines and a link, small enough that all its states can be explored.

What may happen at any time: frames and rows move, rows overtake rows (of another stream), parts of
a prompt are computed, a computation fails, a transfer is refused, given up for time or because its
request was aborted, a second one is tried after
it, and either side sees
that the link is gone (its machine was restarted, or the link was cut) long before the other one.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from duetto.cluster.disaggregation import protocol
from duetto.cluster.disaggregation.kv_frames import (
    CancelPrefill,
    GotPrefill,
    PrefillAccepted,
    PrefillDone,
    PrefillRefused,
)
from duetto.cluster.disaggregation.protocol import IncomingKV, OutgoingKV
from duetto.cluster.links.link import RowsSent


class Asks(NamedTuple):
    """A transfer of the decode side."""

    kv: IncomingKV | None = None
    holds: bool = False  # blocks
    good: frozenset[tuple[int, int]] = frozenset()  # rows that lie in its blocks as they should
    outcome: str = ""  # of its request: "home", "aborted", "published"; "" so far


class Computes(NamedTuple):
    """A transfer of the prefill side."""

    kv: OutgoingKV | None = None
    holds: bool = False
    ready: int = 0  # pieces computed
    read: int = 0  # pieces whose reading has begun
    request: str = ""  # "asked", "runs", "ended"


class World(NamedTuple):
    asks: tuple[Asks, ...]
    computes: tuple[Computes, ...]
    to_prefill: tuple[object, ...] = ()
    to_decode: tuple[object, ...] = ()
    decode_up: bool = True
    prefill_up: bool = True


class Wrong(AssertionError):
    pass


class Model:
    """All that may happen from a world on. `calm`: nothing fails, takes long or is aborted.

    Without losses of the link, and without a decode side that gives up, all must end by itself:
    these end everything.
    """

    def __init__(
        self,
        num_transfers: int,
        num_layers: int,
        pieces: tuple[int, ...],
        *,
        calm: bool = False,
        has_losses: bool = True,
        gives_up: bool = True,
        rules: ModuleType = protocol,
    ) -> None:
        """`pieces` of the blocks, which are sent one after the other, layer by layer."""
        self.calm, self.rules = calm, rules
        self.has_losses = has_losses and not calm
        self.gives_up = gives_up and not calm
        self.size = num_layers, sum(pieces)
        starts = [sum(pieces[:i]) for i in range(len(pieces))]
        self.pieces = [
            (layer, first, count)
            for first, count in zip(starts, pieces, strict=True)
            for layer in range(num_layers)
        ]
        self.first = World((Asks(),) * num_transfers, (Computes(),) * num_transfers)

    def next(self, world: World) -> Iterator[tuple[str, World]]:
        for i in range(len(world.asks)):
            yield from self._decode_side(world, i)
            yield from self._prefill_side(world, i)
        yield from self._frames(world)
        yield from self._links(world)

    # --- the decode side ---------------------------------------------------------------------

    def _decode_side(self, world: World, i: int) -> Iterator[tuple[str, World]]:
        asks = world.asks[i]
        if asks.kv is None:
            # The second one is of the same request: it is asked for when the first was given up.
            may_ask = i == 0 or world.asks[i - 1].outcome == "home"
            if may_ask and world.decode_up:
                begun = Asks(self.rules.begin_incoming(i, *self.size), holds=True)
                yield (
                    f"ask {i}",
                    self._send(_with(world, asks=(i, begun)), "to_prefill", ("ask", i)),
                )
            return
        for rows in asks.kv.writing if world.decode_up else ():
            if not asks.holds:
                raise Wrong("rows are written into blocks that were given back")
            kv, actions = self.rules.on_written(asks.kv, rows)
            good = {(rows.layer, rows.first + k) for k in range(rows.num_blocks)}
            done = asks._replace(kv=kv, good=asks.good | good)
            yield f"written {rows}", self._act(_with(world, asks=(i, done)), i, actions)
        if asks.kv.is_open and self.gives_up:
            for outcome in ("home", "aborted"):
                kv, actions = self.rules.cancel(asks.kv, outcome)
                then = _with(world, asks=(i, asks._replace(kv=kv)))
                yield f"{outcome} {i}", self._act(then, i, actions, outcome)

    def _act(self, world: World, i: int, actions: protocol.Actions, outcome: str = "home") -> World:
        for action in actions:
            asks = world.asks[i]
            match action:
                case protocol.Say(frame):
                    world = self._send(world, "to_prefill", frame)
                    continue
                case protocol.PublishBlocks():
                    if asks.outcome or not asks.holds:
                        raise Wrong("published after it was given up")
                    if len(asks.good) != self.size[0] * self.size[1]:
                        raise Wrong("published, and not all has arrived")
                    asks = asks._replace(outcome="published", holds=False)
                case protocol.GiveUp():
                    if asks.outcome:
                        raise Wrong("a request ends twice")
                    asks = asks._replace(outcome=outcome)
                case protocol.ReturnBlocks():
                    if not asks.holds:
                        raise Wrong("blocks are given back twice")
                    if asks.kv is not None and asks.kv.writing and world.decode_up:
                        raise Wrong("blocks are given back while they are written")
                    if not asks.outcome:
                        raise Wrong("blocks are given back, and the request waits for them")
                    asks = asks._replace(holds=False)
                case _:
                    raise Wrong(f"{action} is not of this side")
            world = _with(world, asks=(i, asks))
        return world

    # --- the prefill side --------------------------------------------------------------------

    def _prefill_side(self, world: World, i: int) -> Iterator[tuple[str, World]]:
        one = world.computes[i]
        if one.kv is None:
            return
        if one.request == "asked":  # the engine has not seen it yet
            is_over = one.kv.phase == "over"
            kv, actions = self.rules.on_taken(one.kv)
            taken = one._replace(kv=kv, request="ended" if is_over else "runs")
            yield f"take {i}", self._do(_with(world, computes=(i, taken)), i, actions)
            if not self.calm:
                kv, actions = self.rules.on_failed(one.kv, "no room")
                ended = one._replace(kv=kv, request="ended")
                yield f"refuse {i}", self._do(_with(world, computes=(i, ended)), i, actions)
        if one.request == "runs":
            if one.ready < len(self.pieces):
                # Blocks are held from when they are computed on: here, all of them at once.
                yield f"piece {i}", _with(world, computes=(i, one._replace(ready=one.ready + 1)))
            else:
                kv, actions = self.rules.on_computed(one.kv)
                ended = one._replace(kv=kv, request="ended")
                yield f"computed {i}", self._do(_with(world, computes=(i, ended)), i, actions)
            if not self.calm:
                kv, actions = self.rules.on_failed(one.kv, "failed")
                ended = one._replace(kv=kv, request="ended")
                yield f"fails {i}", self._do(_with(world, computes=(i, ended)), i, actions)
        if one.kv.is_reading:
            if not one.holds:
                raise Wrong("blocks are read that were given back")
            layer, first, count = self.pieces[one.read - 1]
            if world.prefill_up:
                sent = self._send(world, "to_decode", RowsSent(i, layer, first, count))
                kv, actions = self.rules.on_sent(one.kv, count)
            else:
                sent = world
                kv, actions = self.rules.on_sent(one.kv, 0)
            sent = _with(sent, computes=(i, one._replace(kv=kv)))
            yield f"sent {i}", self._do(sent, i, actions)
        elif one.read < one.ready:
            kv, may = self.rules.may_read(one.kv)
            if may:
                yield (
                    f"read {i}",
                    _with(world, computes=(i, one._replace(kv=kv, read=one.read + 1))),
                )

    def _do(self, world: World, i: int, actions: protocol.Actions) -> World:
        for action in actions:
            one = world.computes[i]
            match action:
                case protocol.Say(frame):
                    world = self._send(world, "to_decode", frame)
                    continue
                case protocol.AbortPrefill():
                    one = one._replace(request="ended")
                case protocol.ReturnBlocks():
                    if not one.holds:
                        raise Wrong("blocks are given back twice")
                    if one.kv is not None and one.kv.is_reading:
                        raise Wrong("blocks are given back while they are read")
                    one = one._replace(holds=False)
                case _:
                    raise Wrong(f"{action} is not of this side")
            world = _with(world, computes=(i, one))
        return world

    # --- between them ------------------------------------------------------------------------

    def _send(self, world: World, way: str, what: object) -> World:
        is_up = world.decode_up if way == "to_prefill" else world.prefill_up
        return world._replace(**{way: (*getattr(world, way), what)}) if is_up else world

    def _frames(self, world: World) -> Iterator[tuple[str, World]]:
        if world.to_prefill and world.prefill_up:
            what, *rest = world.to_prefill
            yield from self._at_prefill(world._replace(to_prefill=tuple(rest)), what)
        if not world.decode_up:
            return
        for k, what in enumerate(world.to_decode):
            rest = world.to_decode[:k] + world.to_decode[k + 1 :]
            if not isinstance(what, RowsSent):
                if k == 0 and not any(a.kv and a.kv.writing for a in world.asks):
                    yield f"{what}", self._at_decode(world._replace(to_decode=rest), what)
                break
            yield f"come {what}", self._rows_come(world._replace(to_decode=rest), what)

    def _rows_come(self, world: World, rows: RowsSent) -> World:
        asks = world.asks[rows.transfer_id]
        assert asks.kv is not None
        kv, actions, is_wanted = self.rules.on_rows(asks.kv, rows)
        if is_wanted and not asks.holds:
            raise Wrong("rows are written into blocks that were given back")
        return self._act(
            _with(world, asks=(rows.transfer_id, asks._replace(kv=kv))), rows.transfer_id, actions
        )

    def _at_decode(self, world: World, frame: object) -> World:
        i = getattr(frame, "transfer_id", 0)
        asks = world.asks[i]
        assert asks.kv is not None
        match frame:
            case PrefillAccepted():
                kv, actions = self.rules.on_accepted(asks.kv)
            case PrefillRefused(_, reason):
                kv, actions = self.rules.on_refused(asks.kv, reason)
            case PrefillDone(_, num_rows):
                kv, actions = self.rules.on_done(asks.kv, num_rows)
        return self._act(_with(world, asks=(i, asks._replace(kv=kv))), i, actions)

    def _at_prefill(self, world: World, what: object) -> Iterator[tuple[str, World]]:
        if isinstance(what, tuple):
            i = what[1]
            kv = self.rules.begin_outgoing(i, self.size[0] * self.size[1])
            begun = Computes(kv, holds=True, request="asked")
            yield f"asked {i}", _with(world, computes=(i, begun))
            return
        i = getattr(what, "transfer_id", 0)
        one = world.computes[i]
        assert one.kv is not None
        on = self.rules.on_got if isinstance(what, GotPrefill) else self.rules.on_cancel
        assert isinstance(what, GotPrefill | CancelPrefill)
        kv, actions = on(one.kv)
        yield f"{what}", self._do(_with(world, computes=(i, one._replace(kv=kv))), i, actions)

    def _links(self, world: World) -> Iterator[tuple[str, World]]:
        is_cut = not (world.decode_up and world.prefill_up)
        if not (self.has_losses or is_cut):
            return
        if world.decode_up:
            lost = world._replace(decode_up=False)
            for i, asks in enumerate(world.asks):
                if asks.kv is not None:
                    kv, actions = self.rules.on_incoming_lost(asks.kv, "lost")
                    lost = _with(lost, asks=(i, asks._replace(kv=kv)))
                    lost = self._act(lost, i, actions)
            yield "decode sees it lost", lost
        if world.prefill_up:
            lost = world._replace(prefill_up=False)
            for i, one in enumerate(world.computes):
                if one.kv is not None:
                    kv, actions = self.rules.on_outgoing_lost(one.kv)
                    lost = _with(lost, computes=(i, one._replace(kv=kv)))
                    lost = self._do(lost, i, actions)
            yield "prefill sees it lost", lost


def explore(model: Model) -> tuple[int, set[str]]:
    """Visit all states. How many there are, and how the transfers may end."""
    came_from: dict[World, tuple[World, str] | None] = {model.first: None}
    todo, ways = [model.first], set[str]()
    while todo:
        world = todo.pop()
        try:
            following = list(model.next(world))
            if not following:
                ways.add(_end(world))
        except Wrong as error:
            raise Wrong(f"{error}, after: {_story(came_from, world)}") from None
        for name, then in following:
            if then not in came_from:
                came_from[then] = world, name
                todo.append(then)
    return len(came_from), ways


def _story(came_from: dict[World, tuple[World, str] | None], world: World) -> str:
    names, before = list[str](), came_from[world]
    while before is not None:
        names.append(before[1])
        before = came_from[before[0]]
    return "; ".join(reversed(names))


def _end(world: World) -> str:
    """Nothing can happen any more: all must be over on both sides, and nothing held."""
    outcomes = [asks.outcome for asks in world.asks if asks.kv is not None]
    if any(one.holds for one in (*world.asks, *world.computes)):
        raise Wrong("blocks are held at the end")
    if any(asks.kv is not None and asks.kv.phase != "over" for asks in world.asks):
        raise Wrong("the decode side does not end")
    if any(one.kv is not None and one.kv.phase != "over" for one in world.computes):
        raise Wrong("the prefill side does not end")
    if any(one.request in ("asked", "runs") for one in world.computes):
        raise Wrong("somebody computes for nobody")
    if not all(outcomes):
        raise Wrong("a request never ends")
    return outcomes[-1] if outcomes else ""


def _with(world: World, **changed: tuple[int, object]) -> World:
    """With one side's transfer changed."""
    ((side, (i, value)),) = changed.items()
    values = list(getattr(world, side))
    values[i] = value
    return world._replace(**{side: tuple(values)})
