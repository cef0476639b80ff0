"""What proposing takes, learned."""

import random

import pytest

from duetto.pricing.drafting import LearnedDraftingTime


def test_it_finds_what_a_pass_a_draft_and_a_sent_token_take() -> None:
    learned, rng = LearnedDraftingTime(), random.Random(0)
    for _ in range(400):
        passes, size, sent = rng.randint(0, 8), rng.randint(1, 8), rng.randint(1, 100)
        true_s = 1e-3 + 2e-3 * passes + 1e-4 * passes * size + 5e-5 * sent
        learned.observe({"d": (passes, passes * size, sent)}, true_s * rng.lognormvariate(0, 0.03))
    call, each_pass, draft, sent_s = learned.prices("d")
    assert call == pytest.approx(1e-3, rel=0.5) and each_pass == pytest.approx(2e-3, rel=0.2)
    assert draft == pytest.approx(1e-4, rel=0.3) and sent_s == pytest.approx(5e-5, rel=0.3)


def test_the_first_call_is_put_down_to_what_was_read() -> None:
    learned = LearnedDraftingTime()
    learned.observe({"d": (1, 1, 500)}, 0.1)
    assert learned.prices("d") == pytest.approx((0, 0, 0, 0.1 / 500), abs=1e-9)


def test_what_was_never_asked_costs_nothing() -> None:
    assert LearnedDraftingTime().prices("d") == (0, 0, 0, 0)


def test_two_methods_in_a_step_share_its_time_as_they_did_alone() -> None:
    learned = LearnedDraftingTime()
    for _ in range(50):
        learned.observe({"slow": (1, 1, 1)}, 9e-3)
        learned.observe({"fast": (1, 1, 1)}, 1e-3)
    for _ in range(50):
        learned.observe({"slow": (1, 1, 1), "fast": (1, 1, 1)}, 1e-2)
    assert sum(learned.prices("slow")) == pytest.approx(9e-3, rel=0.05)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_what_says_nothing_is_not_learned_from(seconds: float) -> None:
    learned = LearnedDraftingTime()
    learned.observe({"d": (1, 1, 1)}, seconds)
    assert learned.prices("d") == (0, 0, 0, 0)
