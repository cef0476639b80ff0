"""Drafts from earlier answers of the same tenant, and from the request itself."""

from hypothesis import given, settings
from hypothesis import strategies as st
from slow_text_index import SlowIndex

from duetto.core.speculation import SuffixOptions
from duetto.runner.proposers import suffix
from duetto.runner.proposers.proposer import DraftRequest
from duetto.runner.proposers.suffix import LEAD, MIN_MATCH, SuffixProposer


def proposer(**options):
    named = {f"suffix_decoding_{name}": value for name, value in options.items()}
    return SuffixProposer(SuffixOptions(**named), max_requests=8)


def ask(proposer, prompt, answer, *, request_id="r", tenant=b"", wanted=8):
    request = DraftRequest(request_id, wanted, 0, (*prompt, *answer), len(prompt), tenant)
    (drafts,) = proposer.propose([request])
    return drafts


def test_an_earlier_answer_is_proposed_again():
    it = proposer()
    ask(it, [1, 2, 3], range(10, 30), request_id="a")
    assert ask(it, [7, 8, 9], [10, 11, 12], request_id="b") == (13, 14, 15)  # as many as match
    assert ask(it, [7, 8, 9], [10, 11, 12, 13, 14, 15], request_id="b") == (16, 17, 18, 19, 20, 21)


def test_so_is_its_beginning_after_the_same_end_of_a_prompt():
    it = proposer(max_spec_factor=10)
    ask(it, [5, 6, 1, 2, 3], range(10, 20), request_id="a")
    assert ask(it, [7, 8, 1, 2, 3], [], request_id="b") == (10, 11, 12, 13, 14, 15, 16, 17)


def test_nothing_crosses_from_one_tenant_to_another():
    it = proposer()
    ask(it, [1, 2, 3], range(10, 30), request_id="a", tenant=b"one")
    assert ask(it, [7, 8, 9], [10, 11, 12], request_id="b", tenant=b"two") == ()
    assert ask(it, [7, 8, 9], [10, 11, 12], request_id="c", tenant=b"one") == (13, 14, 15)


def test_prompts_of_others_are_not_proposed_beyond_their_end():
    it = proposer()
    ask(it, range(10, 50), [1], request_id="a")
    assert ask(it, [7], [20, 21, 22], request_id="b") == ()


def test_without_room_for_answers_only_the_request_itself_counts():
    it = proposer(max_cached_requests=0)
    ask(it, [1, 2, 3], range(10, 30), request_id="a")
    assert ask(it, [7, 8, 9], [10, 11, 12], request_id="b") == ()
    assert ask(it, [7, 8, 9, 5], [7, 8, 9], request_id="c") == (5, 7, 8)
    assert it.num_cached_tokens == 0


def test_the_oldest_answers_are_forgotten():
    it = proposer(max_cached_requests=2)
    for i, name in enumerate("abc"):
        ask(it, [1, 2, 3], range(100 * (i + 1), 100 * (i + 1) + 20), request_id=name)
    # x itself is then one of the two.
    assert ask(it, [9], [300, 301, 302], request_id="x", wanted=2) == (303, 304)
    assert ask(it, [9], [200, 201, 202], request_id="y") == ()


def test_depth_limits_match_and_drafts_together():
    it = proposer(max_tree_depth=10, max_spec_factor=100)
    ask(it, [1], range(10, 60), request_id="a")
    assert len(ask(it, [2], range(20, 40), request_id="b", wanted=60)) == 5
    assert len(ask(it, [3], range(20, 23), request_id="c", wanted=60)) == 7


def test_an_unlikely_token_ends_the_drafts():
    it = proposer(min_token_prob=0.6, max_spec_factor=10)
    for i in range(4):
        ask(it, [50 + i], [10, 11, 12, 13, 20 + i % 2, 30], request_id=str(i))
    assert ask(it, [2], [10, 11], request_id="x") == (12, 13)


def test_the_number_of_tenants_is_bounded_however_little_each_has_said(monkeypatch):
    monkeypatch.setattr(suffix, "_MAX_TENANTS", 5)
    it = proposer()
    for number in range(20):
        ask(
            it,
            [1, 2, 3],
            [] if number % 3 else [4, 5],
            tenant=b"%d" % number,
            request_id=str(number),
        )
        assert len(it._tenants) <= 5
    assert b"19" in it._tenants and b"15" in it._tenants and b"14" not in it._tenants


def test_what_is_cached_is_counted_as_it_changes(monkeypatch):
    """And not by looking at all tenants with each call: there may be thousands."""
    monkeypatch.setattr(suffix, "_MAX_TENANT_TOKENS", 40)
    monkeypatch.setattr(suffix, "_MAX_TENANTS", 4)
    it = proposer(max_cached_requests=3)
    for number in range(60):
        answer = list(range(1 + number % 23))
        ask(it, [1, 2, 3], answer, tenant=b"%d" % (number % 6), request_id=str(number))
        kept = sum(each.index.num_kept for each in it._tenants.values())
        assert it.num_cached_tokens == kept


def test_tenants_are_forgotten_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(suffix, "_MAX_TOKENS", 50)
    it = proposer()
    for i in range(5):
        ask(it, [1, 2, 3], range(10, 30), request_id=str(i), tenant=b"%d" % i)
        assert it.num_cached_tokens <= 50
    # One that was forgotten while it ran begins again, and others are not mixed up with it.
    assert ask(it, [1, 2, 3], range(10, 40), request_id="0", tenant=b"0") == ()
    assert ask(it, [7], [10, 11, 12], request_id="x", tenant=b"0") == (13, 14, 15)


class SlowSuffix:
    """The slow twin: two searches through everything, and the rule between them."""

    def __init__(self, options):
        self.options, self.max_match = options, options.suffix_decoding_max_tree_depth // 2
        self.tenants, self.written = {}, {}

    def ask(self, name, tenant, prompt, answer, wanted):
        text = [*prompt, *answer]
        own = SlowIndex(MIN_MATCH, self.max_match, 10**6)
        own.append(0, text)
        answers = self.tenants.setdefault(tenant, SlowIndex(MIN_MATCH, self.max_match, 10**6))
        if answer:
            begin = self.written.get(name, max(0, len(prompt) - LEAD))
            answers.append(name, text[begin:])
            self.written[name] = len(text)
        found = [index.propose(text, wanted) for index in (own, answers)]
        lengths = [0 if each is None else each[0] for each in found]
        if not any(lengths):
            return ()
        index = (own, answers)[lengths[1] > lengths[0]]
        most = min(wanted, max(lengths), self.options.suffix_decoding_max_tree_depth - max(lengths))
        return index.propose(text, most, self.options.suffix_decoding_min_token_prob)[1]


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=12),
        st.lists(st.integers(0, 3), min_size=1, max_size=25),
        st.sampled_from([b"one", b"two"]),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(requests, st.data())
def test_proposes_what_a_search_through_everything_proposes(requests, data):
    """Requests of two tenants whose answers grow side by side."""
    options = SuffixOptions(suffix_decoding_max_tree_depth=12, suffix_decoding_min_token_prob=0.3)
    fast, slow = SuffixProposer(options, max_requests=8), SlowSuffix(options)
    done = [0] * len(requests)
    while any(done[i] < len(r[1]) for i, r in enumerate(requests)):
        i = data.draw(st.sampled_from([i for i, r in enumerate(requests) if done[i] < len(r[1])]))
        prompt, whole, tenant = requests[i]
        begin = len(prompt) + done[i] if done[i] else 0
        done[i] = min(len(whole), done[i] + data.draw(st.integers(1, 5)))
        answer = whole[: done[i]]
        request = DraftRequest(
            str(i), 5, begin, tuple([*prompt, *answer][begin:]), len(prompt), tenant
        )
        assert fast.propose([request]) == [slow.ask(str(i), tenant, prompt, answer, 5)]
