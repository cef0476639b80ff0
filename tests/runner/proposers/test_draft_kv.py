"""What was found valid once, against a look at all blocks anew."""

import random

import pytest

from duetto.runner.proposers import draft_kv
from duetto.runner.proposers.draft_kv import Chain, DraftKV

SIZE, NUM_BLOCKS = 3, 9


@pytest.mark.parametrize("max_changes", [4096, 4])
@pytest.mark.parametrize("seed", range(20))
def test_a_look_at_what_has_changed_finds_what_a_look_at_all_does(monkeypatch, seed, max_changes):
    monkeypatch.setattr(draft_kv, "_MAX_CHANGES", max_changes)
    rng, kv, num_full = random.Random(seed), DraftKV(SIZE), 0
    chains = [(Chain(), [], []) for _ in range(4)]
    for _ in range(400):
        chain, tokens, table = rng.choice(chains)
        kind = rng.random()
        if kind < 0.1:  # preempted: other blocks, some of them shared with another
            table[:] = rng.choice(chains)[2][: rng.randint(0, 3)]
        elif kind < 0.15:
            kv.forget(rng.sample(range(NUM_BLOCKS), 2))
        elif kind < 0.3:  # guesses, of which some were wrong
            known = len(tokens) - rng.randint(0, min(len(tokens), 4))
            del tokens[known:]
            chain.cut(known, SIZE)
        if len(tokens) < SIZE * 5:
            tokens += [rng.randrange(2) for _ in range(rng.randint(0, 4))]
        free = [b for b in range(NUM_BLOCKS) if b not in table]
        while len(table) * SIZE < len(tokens):
            table.append(free.pop(rng.randrange(len(free))))
        kv.extend_keys(chain.keys, tokens)
        anew = Chain()
        kv.extend_keys(anew.keys, tokens)
        valid = kv.num_valid(list(table), chain, list(tokens))
        assert valid == kv.num_valid(list(table), anew, list(tokens))
        assert chain.num_full == anew.num_full
        num_full += chain.num_full
        end = rng.randint(valid, len(tokens))
        if end > valid:
            kv.write(table, chain, tokens, valid, end)
    assert num_full > 100
