"""Evaluation: what is asked, how it is counted, and servers that fail."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from duetto.core.errors import ConfigError
from duetto.evals.evaluate import (
    EvalPlan,
    Score,
    ask_server,
    count_answers,
    draw_items,
)
from duetto.evals.worlds.prompt import is_exact
from duetto.measure.client import Target

PLAN = EvalPlan(num_questions=40)


# --- what is asked -----------------------------------------------------------------------------


def test_kinds_are_asked_evenly() -> None:
    items = draw_items(EvalPlan(num_questions=42))
    kinds = Counter(item.question.kind for item in items)
    assert sorted(kinds.values()) == [10, 10, 11, 11]
    assert len(kinds) == 4


def test_two_thousand_are_two_thousand() -> None:
    items = draw_items(EvalPlan())
    assert len(items) == 2000
    asked = {(item.world.documents, item.question.text) for item in items}
    assert len(asked) == 2000


def test_a_kind_comes_up_once_at_most_in_a_world() -> None:
    seen = Counter((i.world.documents, i.question.kind) for i in draw_items(PLAN))
    assert set(seen.values()) == {1}


def test_one_document_has_no_two_hops() -> None:
    items = draw_items(replace(PLAN, num_documents=(1,)))
    assert Counter(i.question.kind for i in items) == {"one_hop": 20, "not_stated": 20}


def test_questions_are_about_all_places() -> None:
    items = draw_items(replace(PLAN, num_questions=400))
    first = Counter(i.question.support[0] for i in items if i.question.kind == "one_hop")
    assert set(first) == set(range(6))
    assert max(first.values()) < 40  # of 100


def test_every_number_and_order_has_its_own() -> None:
    plan = replace(PLAN, num_documents=(2, 6), orders=("given", "shuffled"))
    counted = Counter((i.num_documents, i.order) for i in draw_items(plan))
    assert counted == dict.fromkeys(
        [(2, "given"), (2, "shuffled"), (6, "given"), (6, "shuffled")], 40
    )
    assert all(len(i.world.documents) == i.num_documents for i in draw_items(plan))


def test_seeds_repeat_and_differ() -> None:
    assert draw_items(PLAN) == draw_items(PLAN)
    other = draw_items(replace(PLAN, seed=1))
    ours = {item.world.documents for item in draw_items(PLAN)}
    assert not ours & {item.world.documents for item in other}


def test_longer_documents_are_asked_the_same() -> None:
    plain, longer = draw_items(PLAN), draw_items(replace(PLAN, num_sentences=4))
    assert [i.question for i in longer] == [i.question for i in plain]
    assert all(text.count(".") >= 4 for i in longer for text in i.world.documents)


def test_documents_can_be_removed() -> None:
    item = draw_items(PLAN)[0]
    (whole,), (bare,) = item.messages(True), item.messages(False)
    assert whole["content"].count("Document: ") == 6
    assert bare["content"] == f"Question: {item.question.text}"
    assert whole["content"].endswith("\n" + bare["content"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_questions": 0}, "--num-questions 0: must be 1 or more"),
        ({"num_questions": 10**9}, "--num-questions 1,000,000,000: must be at most 1,000,000"),
        ({"num_documents": (6, 13)}, "--num-documents 13: must be 1 to 12"),
        ({"num_sentences": 9}, "num_sentences 9: must be 1 to 8 for 6 documents"),
        ({"orders": ("sorted",)}, "--order sorted: must be one of shuffled, given"),
        ({"kv": "blended"}, "--kv blended: must be one of full"),
        ({"quantization": "awq"}, "--quantization awq: must be one of none, int8, int4, fp8"),
        ({"seed": -1}, "--seed -1: must be 0 or more"),
    ],
)
def test_what_cannot_be_asked_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(PLAN, **change)
    assert str(caught.value) == message


# --- how it is counted -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("Balford", True),
        (" Balford\n", True),
        ("Balford.", True),
        ("balford", False),
        ("Balford, I think", False),
        ("In Balford", False),
        ("Tovard: Balford", True),
        ("Tovard: Rusford", False),
        ("Balford: Tovard", False),
        ("", False),
    ],
)
def test_exact_match(answer: str, is_right: bool) -> None:
    assert is_exact(answer, "Balford") is is_right


def test_wilson_intervals() -> None:
    """Against values computed by hand from Wilson's formula, as in statsmodels."""
    assert Score(81, 263).interval == pytest.approx((0.25528, 0.36622), abs=1e-4)
    assert Score(0, 10).interval == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert Score(10, 10).interval == pytest.approx((0.72247, 1.0), abs=1e-4)


def test_all_right_and_all_wrong() -> None:
    items = draw_items(PLAN)
    right = count_answers(PLAN, items, [i.question.answer for i in items])
    assert [row.score.share for row in right.rows] == [1.0] * 5
    wrong = count_answers(PLAN, items, ["?"] * len(items))
    assert [row.score.share for row in wrong.rows] == [0.0] * 5


def test_one_kind_right() -> None:
    items = draw_items(PLAN)
    answers = [i.question.answer if i.question.kind == "one_hop" else "?" for i in items]
    result = count_answers(PLAN, items, answers)
    shares = {row.kind: row.score for row in result.rows}
    assert shares["one_hop"] == Score(10, 10)
    assert shares["two_hop"] == Score(0, 10)
    assert shares[None] == Score(10, 30)  # what has an answer: all but "not stated"


def test_no_answer_is_wrong_and_counted() -> None:
    items = draw_items(PLAN)
    answers = [None, *(i.question.answer for i in items[1:])]
    result = count_answers(PLAN, items, answers)
    assert result.num_failed == 1
    assert sum(row.score.num_right for row in result.rows if row.kind) == 39


def test_json_has_hops_documents_and_order() -> None:
    plan = replace(PLAN, num_documents=(2, 6))
    items = draw_items(plan)
    shown = count_answers(plan, items, ["not stated"] * len(items)).as_json()
    rows = json.loads(json.dumps(shown))["rows"]
    found = {(r["num_documents"], r["order"], r["kind"]): r for r in rows}
    assert found[6, "shuffled", "two_hop"]["num_hops"] == 2
    assert found[6, "shuffled", "not_stated"]["exact_match"] == 1.0
    assert found[2, "shuffled", "one_hop"]["exact_match"] == 0.0
    assert found[2, "shuffled", "one_hop"]["low"] == 0.0 < found[2, "shuffled", "one_hop"]["high"]


# --- servers -----------------------------------------------------------------------------------


class Replies(BaseHTTPRequestHandler):
    """Answers with the question's last word; fails on what asks for it."""

    protocol_version = "HTTP/1.1"
    bodies: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        text = body["messages"][0]["content"]
        reply = {"choices": [{"message": {"content": " " + text.split()[-1]}}]}
        self.send_response(500 if text == "fail" else 200)
        payload = b"{" if text == "garbage" else json.dumps(reply).encode()
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True  # a connection that is kept open does not keep the test


@contextmanager
def server() -> Iterator[tuple[Target, list[dict[str, Any]]]]:
    bodies: list[dict[str, Any]] = []
    handler = type("Handler", (Replies,), {"bodies": bodies})
    with Server(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        base_url = f"http://127.0.0.1:{http.server_port}"
        yield Target(base_url=base_url, model="m", is_chat=True), bodies
        http.shutdown()
        thread.join()


def say(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_a_server_answers_in_order_and_greedily() -> None:
    done = []
    texts = [f"question {i}" for i in range(50)]
    with server() as (target, bodies):
        answers = ask_server(target, say(*texts), lambda: done.append(1))
    assert answers == [f" {i}" for i in range(50)]
    assert len(done) == 50
    assert {(b["model"], b["temperature"], b["max_tokens"]) for b in bodies} == {("m", 0.0, 16)}


def test_one_failure_is_none() -> None:
    with server() as (target, _bodies):
        assert ask_server(target, say("a", "fail", "garbage", "b")) == [" a", None, None, " b"]


def test_only_failures_are_an_error_that_says_why() -> None:
    with server() as (target, _bodies), pytest.raises(ConfigError, match="500"):
        ask_server(target, say("fail", "fail"))
