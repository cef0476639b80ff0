"""Where the last tokens of a text stood before, and what followed.

An index over texts that grow side by side, token by token, in bounded memory: a ring of nodes, one
per token, each linked to the token before and after it in its own text; and for n-grams of a few
orders a hash table of chains from the newest node that ends such an n-gram to older ones, as in
LZ77 (and zlib). Adding a token takes about a microsecond, a search a few. Knows no requests.

`find` is exact up to its bounds (its test does the same by brute force), and follows the
idea of SuffixDecoding (Oliaro et al., 2024, arXiv 2411.04975): the most frequent continuation of
the longest match. It needs no suffix tree, as only the newest matches are counted.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MAX_MATCHES = 32  # the newest are counted, so that a search has an end
_MAX_VISITED = 8 * MAX_MATCHES  # others may have the same place in the hash table
_MAX_ORDER = 8
_FIRST_SIZE = 64  # nodes
_NONE = -1


class Match(NamedTuple):
    length: int  # tokens that are alike
    followers: list[int]  # nodes of the tokens that came next, newest first


class Writer:
    """Where one text of an index has come to."""

    __slots__ = ("node", "tail")

    def __init__(self) -> None:
        self.node = _NONE
        self.tail: tuple[int, ...] = ()


class TextIndex:
    """Nodes are numbered from 0 in the order in which tokens came, over all texts. The newest
    `capacity` are kept."""

    def __init__(self, min_match: int, max_match: int, capacity: int) -> None:
        """Matches shorter than `min_match` tokens do not count; more than `max_match` tokens are
        not compared."""
        assert 1 <= min_match <= max_match and capacity >= 1
        self._max_match, self._capacity = max_match, capacity
        self.orders = search_orders(min_match, max_match)
        self.num_nodes = 0  # ever
        self.floor = 0  # nodes before it are forgotten
        self._tokens, self._before, self._after = array("i"), array("q"), array("q")
        self._chains = [_Chain(order) for order in self.orders]

    @property
    def num_kept(self) -> int:
        """Nodes that take memory."""
        return len(self._tokens)

    def append(self, writer: Writer, token_ids: Iterable[int]) -> None:
        """Add tokens to the writer's text."""
        keep, chains = self.orders[0], self._chains
        for token_id in token_ids:
            node = self._add(token_id, writer.node)
            writer.tail = (*writer.tail[-keep + 1 :], token_id) if keep > 1 else (token_id,)
            for chain in chains:
                chain.add(node, writer.tail, self._capacity)
            writer.node = node

    def _add(self, token_id: int, before: int) -> int:
        node = self.num_nodes
        self.num_nodes = node + 1
        place = node % self._capacity
        if place == len(self._tokens):
            self._tokens.append(token_id)
            self._before.append(before)
            self._after.append(_NONE)
        else:
            self._tokens[place] = token_id
            self._before[place] = before
            self._after[place] = _NONE
            self.floor = max(self.floor, node - self._capacity + 1)
        if before >= self.floor:
            self._after[before % self._capacity] = node
        return node

    def find(self, text: Sequence[int]) -> Match | None:
        """The longest match of the end of `text`, by the newest nodes that match so far.

        Looks for the longest of `orders` that has a match with a token after it; of those nodes,
        the newest MAX_MATCHES, the ones that match furthest back count.
        """
        for chain in self._chains:
            if len(text) < chain.order:
                continue
            ends = self._ends(chain, tuple(text[-chain.order :]))
            if ends:
                return self._longest(text, chain.order, ends)
        return None

    def _ends(self, chain: "_Chain", gram: tuple[int, ...]) -> list[int]:
        """The newest nodes with which this n-gram ends, and that another one follows."""
        found: list[int] = []
        node = chain.newest(gram)
        for _ in range(_MAX_VISITED):
            if node < self.floor or len(found) == MAX_MATCHES:
                break
            place = node % self._capacity
            if self._after[place] != _NONE and self._is_at(node, gram):
                found.append(node)
            node = chain.older[place]
        return found

    def _is_at(self, node: int, gram: tuple[int, ...]) -> bool:
        for token_id in reversed(gram):
            if node < self.floor or self._tokens[node % self._capacity] != token_id:
                return False
            node = self._before[node % self._capacity]
        return True

    def _longest(self, text: Sequence[int], order: int, ends: list[int]) -> Match:
        best, followers = 0, list[int]()
        limit = min(self._max_match, len(text))
        for end in ends:
            length = self._length(text, end, limit) if limit > order else order
            if length > best:
                best, followers = length, []
            if length == best:
                followers.append(self._after[end % self._capacity])
        return Match(best, followers)

    def _length(self, text: Sequence[int], node: int, limit: int) -> int:
        length = 0
        while length < limit and node >= self.floor:
            place = node % self._capacity
            if self._tokens[place] != text[-1 - length]:
                break
            length += 1
            node = self._before[place]
        return length

    def follow(self, match: Match, most: int, min_share: float = 0.0) -> tuple[int, ...]:
        """At most so many tokens from the matches on, each the most frequent continuation where
        all before it were followed; of equals, the one that came last.

        Ends before a token that less than `min_share` of the matches are followed by.
        """
        drafts: list[int] = []
        followers, needed = match.followers, min_share * len(match.followers)
        while followers and len(drafts) < most:
            by_token: dict[int, list[int]] = {}
            for node in followers:
                by_token.setdefault(self._tokens[node % self._capacity], []).append(node)
            token_id = max(by_token, key=lambda each: len(by_token[each]))  # the first of equals
            if len(by_token[token_id]) < needed:
                break
            drafts.append(token_id)
            after = [self._after[node % self._capacity] for node in by_token[token_id]]
            followers = [node for node in after if node != _NONE]
        return tuple(drafts)


def search_orders(min_match: int, max_match: int) -> tuple[int, ...]:
    """Lengths of n-grams that are looked up, the longest first; in between, tokens are compared."""
    orders = [min_match]
    while 2 * orders[-1] <= min(max_match, _MAX_ORDER):
        orders.append(2 * orders[-1])
    return tuple(reversed(orders))


class _Chain:
    """For n-grams of one order: from the newest node with which one ends to older ones.

    As many places as there are nodes, or more, so that few others share one.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.older = array("q")  # by a node's place in the ring
        self._hashes = array("q")  # likewise, to grow
        self._heads = array("q", [_NONE]) * _FIRST_SIZE

    def newest(self, gram: tuple[int, ...]) -> int:
        return self._heads[hash(gram) & (len(self._heads) - 1)]

    def add(self, node: int, tail: tuple[int, ...], capacity: int) -> None:
        place = node % capacity
        if len(tail) < self.order:  # the text has just begun
            code, older = 0, _NONE
        else:
            code = hash(tail[-self.order :])
            head = code & (len(self._heads) - 1)
            older, self._heads[head] = self._heads[head], node
        if place < len(self.older):
            self.older[place] = older
            return
        self.older.append(older)
        self._hashes.append(code if len(tail) >= self.order else _NONE)
        if len(self.older) > len(self._heads):
            self._grow()

    def _grow(self) -> None:
        """Before the ring is full, nodes and places are the same."""
        self._heads = array("q", [_NONE]) * (2 * len(self._heads))
        mask = len(self._heads) - 1
        for node, code in enumerate(self._hashes):
            if code != _NONE:  # no tuple has this hash
                self.older[node] = self._heads[code & mask]
                self._heads[code & mask] = node
