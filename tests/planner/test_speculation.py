"""How drafts are described for a simulation, and what a draft model takes of the memory."""

import json

import pytest

from duetto.core.errors import ConfigError
from duetto.core.shape import BatchShape, RequestShape
from duetto.measure.metrics import parse_slo
from duetto.models.find import find_program
from duetto.planner.fleet import make_fleet, num_kv_blocks
from duetto.planner.layout import Layout
from duetto.planner.objective import Objective
from duetto.planner.search import Problem, judge
from duetto.planner.speculation import notes_on_drafts, proposer, read_acceptance
from duetto.pricing.find_hardware import find_hardware
from duetto.simulation.load import TrafficOptions
from duetto.simulation.report import sum_up
from duetto.simulation.simulation import simulate

NGRAM = '{"method": "ngram", "num_speculative_tokens": 4}'
H100 = find_hardware("h100")
PROGRAM, DRAFT = find_program("llama-3.1-8b"), find_program("llama-3.2-1b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.8", (0.8,)),
        ("0", (0.0,)),
        ("1", (1.0,)),
        ("0.8,0.4,0.4", (0.8, 0.5, 1.0)),  # of chains; each given those before it
        ("0.5,0,0", (0.5, 0.0, 0.0)),
    ],
)
def test_acceptance_is_given_those_before(text, expected):
    assert read_acceptance(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "x", "1.1", "-0.1", "nan", "inf", "0.5,0.6", "0.5,"])
def test_what_is_no_acceptance_names_the_flag(text):
    with pytest.raises(ConfigError, match="--speculative-acceptance"):
        read_acceptance(text)


def test_acceptance_is_read_of_a_recorded_run(tmp_path):
    file = tmp_path / "run.json"
    counts = {"proposed_per_position": [100, 80, 1], "accepted_per_position": [90, 36, 1]}
    for document in (counts, {"a": [1, {"timings": {"speculation": counts}}]}):
        file.write_text(json.dumps(document))
        # The third place was seen once, which says nothing.
        assert read_acceptance(str(file)) == pytest.approx((0.9, 0.5))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"proposed_per_position": [], "accepted_per_position": []}',
        '{"proposed_per_position": [0], "accepted_per_position": [0]}',
        '{"proposed_per_position": [1, 2], "accepted_per_position": [1]}',
        '{"proposed_per_position": ["1"], "accepted_per_position": [1]}',
        '{"proposed_per_position": [1], "accepted_per_position": [2]}',
    ],
)
def test_a_file_without_drafts_is_refused_by_name(tmp_path, content):
    file = tmp_path / "run.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"--speculative-acceptance .*run\.json"):
        read_acceptance(str(file))
    with pytest.raises(ConfigError, match=r"none\.json"):
        read_acceptance(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speculative_acceptance": "0.5"}, "needs --speculative-config"),
        ({"speculative_config": NGRAM}, "needs --speculative-acceptance"),
        (
            {
                "speculative_config": f'[{NGRAM}, {{"method": "suffix"}}]',
                "speculative_acceptance": "1",
            },
            "ngram and suffix together",
        ),
        (
            {"speculative_config": NGRAM, "speculative_acceptance": "1", "pp": 2},
            "with --pp 2",
        ),
    ],
)
def test_flags_that_do_not_go_together(options, words):
    with pytest.raises(ConfigError, match=words):
        proposer(Layout(**options))


def test_an_unknown_method_is_refused_when_the_layout_is_made():
    with pytest.raises(ConfigError, match="--speculative-config: method 'wish'"):
        Layout(speculative_config='{"method": "wish"}')


def test_a_draft_model_takes_memory_and_time():
    layout = Layout(speculative_model="llama-3.2-1b", speculative_acceptance="0.8")
    fleet = make_fleet(PROGRAM, H100, layout, DRAFT)
    drafts = fleet.replica.drafts
    assert (drafts.method, drafts.acceptance) == ("draft_model", (0.8,))
    assert drafts.max_model_len == DRAFT.max_model_len
    shape = BatchShape((RequestShape(1, 100),))
    own_s = make_fleet(DRAFT, H100, Layout()).replica.step_time(shape)
    assert drafts.draft_time(shape) == own_s
    alone, both = num_kv_blocks(PROGRAM, H100, layout), num_kv_blocks(PROGRAM, H100, layout, DRAFT)
    kv_bytes = PROGRAM.kv_bytes_per_token(2.0) + DRAFT.kv_bytes_per_token(2.0)
    assert both < alone * PROGRAM.kv_bytes_per_token(2.0) / kv_bytes
    assert fleet.replica.scheduler.num_blocks == both
    assert "draft_model" in layout.describe()


def test_a_draft_model_that_does_not_fit_names_both():
    small = find_hardware("h100")
    layout = Layout(
        speculative_model="llama-3-70b", speculative_acceptance="0.8", max_model_len=4096
    )
    with pytest.raises(ConfigError, match=r"the model fits .* alone; with the draft model"):
        make_fleet(PROGRAM, small, layout, find_program("llama-3-70b"))


def test_its_own_options_count():
    config = '{"method": "draft_model", "model": "x", "quantization": "int8"}'
    layout = Layout(speculative_config=config, speculative_acceptance="0.8", dtype="bfloat16")
    shape = BatchShape((RequestShape(1, 100),))
    whole = Layout(speculative_model="x", speculative_acceptance="0.8", dtype="bfloat16")
    small_s, whole_s = (
        make_fleet(PROGRAM, H100, each, DRAFT).replica.drafts.draft_time(shape)
        for each in (layout, whole)
    )
    assert small_s < 0.9 * whole_s


def test_prefill_replicas_draft_nothing():
    layout = Layout(
        speculative_config=NGRAM,
        speculative_acceptance="0.8",
        prefill_replicas=1,
        kv_bandwidth=50.0,
    )
    fleet = make_fleet(PROGRAM, find_hardware("h100:2"), layout)
    assert fleet.replica.drafts is not None and fleet.disaggregation.prefill.drafts is None
    workload = TrafficOptions(num_prompts=5, random_output_len=32, request_rate=1.0).load(0)
    outcome = sum_up(simulate(workload, fleet), 2)
    assert outcome.report.drafts.total.num_accepted > 0
    assert outcome.report.num_output_tokens == 5 * 32


def test_without_speculation_the_replica_is_as_it_was():
    assert make_fleet(PROGRAM, H100, Layout()).replica.drafts is None


def test_a_verdict_tells_the_tokens_of_a_step():
    problem = Problem(
        program=PROGRAM,
        hardware=H100,
        workload=TrafficOptions(num_prompts=4, random_output_len=64).load(0),
        objective=Objective(parse_slo(["ttft=1s"]), 99.0),
    )
    layout = Layout(speculative_config=NGRAM, speculative_acceptance="0.8")
    assert 1.5 < judge(problem, layout).tokens_per_step < 3.4
    assert judge(problem, Layout()).tokens_per_step is None
    assert "for nothing" in notes_on_drafts(layout)[0] and notes_on_drafts(Layout()) == ()
