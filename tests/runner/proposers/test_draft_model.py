"""The draft model's proposals against an oracle that knows what each slot of KV must hold."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from duetto.core.batch import SamplingInput
from duetto.core.sampling_params import SamplingParams
from duetto.program.ops import Ref
from duetto.program.program import KVSpec, Program
from duetto.runner.proposers import draft_model
from duetto.runner.proposers.draft_model import DraftModelProposer
from duetto.runner.proposers.proposer import DraftRequest
from duetto.runner.sampler import sample_token

VOCAB, BLOCK_SIZE, NUM_BLOCKS = 23, 4, 24
TABLE = np.random.default_rng(0).normal(size=(997, VOCAB)).astype(np.float32) * 2


def after(kv, token_id):
    """What a slot holds: it depends on all tokens up to this one."""
    return hash((kv, token_id))


def logits_of(kv, vocab=VOCAB):
    row = TABLE[kv % len(TABLE)]
    return np.concatenate([row, np.full(max(0, vocab - VOCAB), 99, np.float32)])[:vocab]


class ShadowBackend:
    """Attention is a chain of hashes through the slots, so a slot that holds anything else shows
    in every token after it."""

    def __init__(self, vocab=VOCAB):
        self.vocab, self.num_runs, self.num_tokens, self.fails = vocab, 0, 0, False

    def allocate_kv(self, num_blocks, block_size, dtype):
        return [0] * (num_blocks * block_size)

    def run(self, step, kv):
        self.num_runs += 1
        self.num_tokens += len(step.token_ids)
        rows = {}
        for r, (start, end) in enumerate(
            zip(step.query_starts[:-1], step.query_starts[1:], strict=True)
        ):
            for t in range(start, end):
                p = int(step.positions[t])
                before = 0
                if p:
                    block = step.block_tables[r][(p - 1) // BLOCK_SIZE]
                    before = kv[block * BLOCK_SIZE + (p - 1) % BLOCK_SIZE]
                kv[step.slots[t]] = after(before, int(step.token_ids[t]))
                rows[t] = logits_of(kv[step.slots[t]], self.vocab)
        if self.fails:
            raise RuntimeError("planted")
        wanted = [rows[int(t)] for t in step.logit_rows]
        return np.array(wanted, np.float32).reshape(-1, self.vocab)


def proposer(backend=None, *, scratch=8, max_model_len=200, vocab=VOCAB, num_blocks=NUM_BLOCKS):
    backend = backend or ShadowBackend(vocab)
    program = Program((), {}, {}, (KVSpec(1, 2),), Ref("logits", 0, vocab), 1024)
    return DraftModelProposer(
        program,
        backend,
        vocab_size=VOCAB,
        num_blocks=num_blocks,
        num_scratch_blocks=scratch,
        block_size=BLOCK_SIZE,
        kv_dtype="float32",
        max_requests=16,
        max_model_len=max_model_len,
    )


def sampling(place=0, **params):
    return SamplingInput(SamplingParams(**{"temperature": 0.0} | params), 7, place)


def request(name, token_ids, table, *, wanted=3, start=0, given=None):
    new = tuple(token_ids[start:])
    return DraftRequest(name, wanted, start, new, 0, b"", tuple(table), given or sampling())


def alone(token_ids, count, given):
    """The drafts of a model that computes everything anew."""
    kv = 0
    for token_id in token_ids:
        kv = after(kv, token_id)
    drafts = []
    for i in range(count):
        row = logits_of(kv)
        token_id = sample_token(
            row, given._replace(num_output_tokens=given.num_output_tokens + i)
        ).token_id
        drafts.append(token_id)
        kv = after(kv, token_id)
    return tuple(drafts)


def test_drafts_are_what_the_model_says_next():
    tokens = [1, 2, 3, 4, 5, 6]
    assert proposer().propose([request("a", tokens, [3, 5])]) == [alone(tokens, 3, sampling())]


@pytest.mark.parametrize("temperature", [0.3, 1.2])
def test_drafts_are_drawn_from_the_requests_own_random_stream(temperature):
    tokens, given = [1, 2, 3, 4, 5, 6], sampling(9, temperature=temperature, top_p=0.9, logprobs=2)
    (drafts,) = proposer().propose([request("a", tokens, [3, 5], given=given)])
    assert drafts == alone(tokens, 3, given)


def test_one_step_each_and_nothing_twice():
    """A right draft is not computed again: one step per draft, of the tokens that are new."""
    it = proposer(backend := ShadowBackend())
    tokens = [1, 2, 3, 4, 5]
    (drafts,) = it.propose([request("a", tokens, [0, 1, 2])])
    assert (backend.num_runs, backend.num_tokens) == (3, 7)
    tokens += [*drafts, 0]
    it.propose([request("a", tokens, [0, 1, 2], start=5)])
    assert (backend.num_runs, backend.num_tokens) == (6, 11)  # the last draft, and what came after


def test_wrong_drafts_are_computed_over():
    it, tokens = proposer(), [1, 2, 3, 4, 5]
    (drafts,) = it.propose([request("a", tokens, [0, 1, 2])])
    tokens.append((drafts[0] + 1) % VOCAB)
    (drafts,) = it.propose([request("a", tokens, [0, 1, 2], start=5)])
    assert drafts == alone(tokens, 3, sampling())


def test_a_prefix_that_is_shared_is_computed_once():
    it = proposer(backend := ShadowBackend())
    one, two = [*range(8), 20, 21], [*range(8), 15]
    asked = [request("a", one, [0, 1, 2], wanted=1), request("b", two, [0, 1, 3], wanted=1)]
    assert it.propose(asked) == [alone(one, 1, sampling()), alone(two, 1, sampling())]
    assert backend.num_tokens == 8 + 2 + 1


def test_keeping_up_proposes_nothing_and_makes_the_next_call_short():
    it = proposer(backend := ShadowBackend())
    tokens = list(range(10))
    assert it.propose([request("a", tokens, [0, 1, 2], wanted=0)]) == [()]
    assert backend.num_tokens == 10
    tokens.append(3)
    (drafts,) = it.propose([request("a", tokens, [0, 1, 2], start=10, wanted=1)])
    assert drafts == alone(tokens, 1, sampling()) and backend.num_tokens == 11


def test_a_long_prompt_is_caught_up_with_in_pieces(monkeypatch):
    monkeypatch.setattr(draft_model, "MAX_TOKENS", 8)
    it = proposer(backend := ShadowBackend())
    tokens, table = [t % VOCAB for t in range(20)], range(6)
    assert it.propose([request("a", tokens, table)]) == [()]
    assert backend.num_tokens == 8
    assert it.propose([request("a", tokens, table, start=20)]) == [()]
    assert it.propose([request("a", tokens, table, start=20)]) == [alone(tokens, 3, sampling())]


def test_others_do_not_wait_for_one_that_catches_up(monkeypatch):
    monkeypatch.setattr(draft_model, "MAX_TOKENS", 8)
    it, short = proposer(), [1, 2]
    long = request("long", [t % VOCAB for t in range(20)], range(6))
    drafts = it.propose([long, request("short", short, [9, 10], wanted=2)])
    assert drafts == [(), alone(short, 2, sampling())]


def test_without_a_block_of_its_own_a_draft_goes_into_scratch():
    tokens = [1, 2, 3, 4]
    asked = [request("a", tokens, [7], wanted=4)]
    assert proposer().propose(asked) == [alone(tokens, 4, sampling())]
    assert proposer(scratch=0).propose(asked) == [alone(tokens, 1, sampling())]


def test_the_drafts_own_context_limits_it():
    tokens = [1, 2, 3, 4, 5, 6]
    it = proposer(max_model_len=7)
    assert it.propose([request("a", tokens, [0, 1, 2], wanted=5)]) == [alone(tokens, 2, sampling())]
    tokens += [1, 2, 3]
    assert it.propose([request("a", tokens, [0, 1, 2], wanted=5, start=6)]) == [()]


def test_rows_beyond_the_targets_vocabulary_are_never_drafted():
    tokens = [1, 2, 3]
    (drafts,) = proposer(vocab=VOCAB + 8).propose([request("a", tokens, [0, 1])])
    assert drafts == alone(tokens, 3, sampling())
    assert proposer(vocab=5).propose([request("a", [1, 2, 20], [0, 1])]) == [()]


def test_masks_that_leave_nothing_cost_this_request_only():
    nothing = sampling()._replace(forbidden_token_ids=tuple(range(VOCAB)))
    asked = [request("a", [1], [0], given=nothing), request("b", [1], [1])]
    assert proposer().propose(asked) == [(), alone([1], 3, sampling())]


def test_what_a_step_that_raised_wrote_is_not_believed():
    it = proposer(backend := ShadowBackend())
    tokens = list(range(6))
    backend.fails = True
    with pytest.raises(RuntimeError):
        it.propose([request("a", tokens, [0, 1, 2])])
    backend.fails = False
    assert it.propose([request("a", tokens, [0, 1, 2])]) == [alone(tokens, 3, sampling())]


def looked(name):
    def method(self, *others):
        Token.num_looks += 1
        return getattr(int, name)(self, *others)

    return method


class Token(int):
    """Knows how often it is looked at, wherever that is."""

    num_looks = 0
    __eq__, __ne__, __hash__ = map(looked, ("__eq__", "__ne__", "__hash__"))
    __lt__, __le__, __gt__, __ge__ = map(looked, ("__lt__", "__le__", "__gt__", "__ge__"))


def work_of(it, asked):
    """Lines of the proposers' code that a call runs, and looks at the requests' tokens."""
    folder, num_lines, before = str(Path(draft_model.__file__).parent), 0, Token.num_looks

    def trace(frame, event, argument):
        nonlocal num_lines
        if not frame.f_code.co_filename.startswith(folder):
            return None
        num_lines += event == "line"
        return trace

    tracer = sys.gettrace()
    sys.settrace(trace)
    try:
        it.propose(asked)
    finally:
        sys.settrace(tracer)
    return num_lines + Token.num_looks - before


@pytest.mark.parametrize("company", [0, 3])
def test_what_a_call_takes_does_not_grow_with_the_context(company):
    """Beside others whose blocks change hands in each call, too."""

    def work(num_tokens):
        it = proposer(num_blocks=2048, max_model_len=4096)
        tokens = [Token(i % VOCAB) for i in range(num_tokens)]
        table = list(range(num_tokens // BLOCK_SIZE + 4))
        for _ in range(num_tokens // draft_model.MAX_TOKENS + 2):  # and one look at what that wrote
            it.propose([request("a", tokens, table, wanted=0)])
        total, sent = 0, len(tokens)
        for call in range(6):
            tokens.append(Token(call))
            others = [
                request(f"{call}-{i}", [call] * BLOCK_SIZE, [2000 + i], wanted=0)
                for i in range(company)
            ]
            total += work_of(it, [request("a", tokens, tuple(table), start=sent), *others])
            sent = len(tokens)
        return total

    assert work(64) == work(4000)


@pytest.mark.parametrize("seed", range(25))
def test_blocks_that_change_hands(seed):
    """Requests that begin alike, share full blocks, are preempted and come back, end and leave
    their blocks to others; each proposal is what the model alone would say."""
    rng = random.Random(seed)
    it, free, names, live = proposer(), list(range(NUM_BLOCKS)), iter(range(10**6)), {}
    prefix = [rng.randrange(VOCAB) for _ in range(8)]
    num_drafts = 0
    for _ in range(120):
        if len(live) < 4 and rng.random() < 0.5 and len(free) >= 6:
            tokens = prefix[: rng.choice([0, 8])] + [rng.randrange(VOCAB) for _ in range(3)]
            live[str(next(names))] = {"tokens": tokens, "table": [], "sent": 0}
        asked, owners = [], list(live.items())
        for name, r in owners:
            missing = -(-len(r["tokens"]) // BLOCK_SIZE) - len(r["table"])
            if not r["table"] and r["tokens"][:8] == prefix:
                other = next(
                    (o for o in live.values() if o["table"] and o["tokens"][:8] == prefix), None
                )
                if other is not None:  # a prefix hit
                    r["table"] = other["table"][:2]
                    missing -= 2
            if missing > len(free):
                continue
            rng.shuffle(free)
            r["table"] += [free.pop() for _ in range(missing)]
            asked.append(
                request(name, r["tokens"], r["table"], start=r["sent"], wanted=rng.randint(0, 5))
            )
            r["sent"] = len(r["tokens"])
        for each, drafts in zip(asked, it.propose(asked), strict=True):
            r = live[each.request_id]
            assert drafts == alone(r["tokens"], each.num_wanted, sampling())
            num_drafts += len(drafts)
            kept = rng.randint(0, len(drafts))
            r["tokens"] += [*drafts[:kept], rng.randrange(VOCAB)]
        for name, r in owners:
            if rng.random() < 0.2 or len(r["tokens"]) > 40:
                held = {b for o in live.values() if o is not r for b in o["table"]}
                free += [b for b in r["table"] if b not in held]
                r["table"] = []
                if rng.random() < 0.5 or len(r["tokens"]) > 40:
                    del live[name]
    assert num_drafts > 100
