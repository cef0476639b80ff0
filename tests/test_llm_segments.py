"""The offline door: prompts as segments, and reuse of what is marked in them."""

import json
import shutil
from math import ceil

import pytest

from duetto import LLM, InvalidRequest, SamplingParams
from duetto.core.reuse_count import ALL_CHOSEN, UNMARKED
from duetto.models.make_model import make_model

PARAMS = SamplingParams(temperature=1.0, seed=3, max_tokens=12, logprobs=2, ignore_eos=True)
TEXTS = ["def add(a, b):\n    return a + b\n", "class Engine:\n    pass\n" * 3, "import os\n" * 5]
QUESTION = "what does it import?"
DOCUMENTS = (
    "{%- for d in documents or [] %}<doc>{{ d.text }}</doc>{% endfor %}"
    "{%- for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
)


@pytest.fixture(scope="module")
def path(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "documents"
    shutil.copytree(tiny_model, path)
    (path / "chat_template.jinja").write_text(DOCUMENTS)
    return path


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, max_num_seqs=4, block_size=8) as llm:
        yield llm


def prompt(*order, question=QUESTION):
    marked = [{"text": TEXTS[i], "reusable": True} for i in order]
    return {"segments": ["Read:\n", *marked, question]}


def answer(llm, given, params=PARAMS, **more):
    """What an answer is: its tokens and their log-probabilities; and the whole output."""
    (output,) = llm.generate(given, params, **more)
    return [(o.token_ids, o.logprobs) for o in output.outputs], output


def test_segments_are_the_ids_of_each_alone(llm):
    encode = llm.get_tokenizer().encode
    _, output = answer(llm, prompt(1, 0))
    pieces = [TEXTS[1], TEXTS[0], QUESTION]
    joined = [encode("Read:\n"), *[encode(p, add_special_tokens=False) for p in pieces]]
    assert output.prompt_token_ids == [i for ids in joined for i in ids]
    assert output.prompt is None


def test_without_reuse_it_is_the_answer_to_the_ids_bit_for_bit(llm):
    llm.reset_prefix_cache()
    segmented, output = answer(llm, prompt(1, 0, 2))
    assert output.outputs[0].timings.reuse is None
    llm.reset_prefix_cache()
    whole, _ = answer(llm, {"prompt_token_ids": output.prompt_token_ids})
    assert segmented == whole
    assert answer(llm, prompt(1, 0, 2), reuse=False)[0] == whole


def test_with_all_of_it_computed_it_is_the_same_too(llm):
    whole, _ = answer(llm, prompt(1, 0, 2))
    found, output = answer(llm, prompt(1, 0, 2), reuse="first:1000")
    assert found == whole
    assert output.outputs[0].timings.reuse.num_reused == 0


def test_reuse_says_what_it_did(llm):
    llm.reset_prefix_cache()
    lengths = [len(llm.get_tokenizer().encode(t, add_special_tokens=False)) for t in TEXTS]
    cold, output = answer(llm, prompt(0, 1, 2), reuse={"method": "first", "num_first": 4})
    count = output.outputs[0].timings.reuse
    assert count.choice == "first:4" and count.why_not is None
    assert count.num_reused == sum(lengths) - 12 and count.num_recomputed == 12
    assert count.num_missing == sum(lengths) and count.num_exact == 0
    assert count.num_computed == len(output.prompt_token_ids) - sum(lengths)
    warm, output = answer(llm, prompt(0, 1, 2), reuse="first:4")
    assert warm == cold
    again = output.outputs[0].timings.reuse
    assert again.num_missing == 0 and again.num_reused == count.num_reused
    assert output.num_cached_tokens == again.num_exact
    moved, output = answer(llm, prompt(2, 0, 1), reuse="first:4")
    assert output.outputs[0].timings.reuse.num_missing == 0 and moved != cold
    assert answer(llm, prompt(0, 1, 2))[0] != cold  # it is not exact


@pytest.mark.parametrize("choice", ["hkvd:0.25", "query:0.25", "query:0.25:2"])
def test_a_share_is_computed(llm, choice):
    found, output = answer(llm, prompt(0, 1, 2), reuse=choice)
    count = output.outputs[0].timings.reuse
    num_movable = count.num_reused + count.num_recomputed
    assert num_movable > 40 and count.num_recomputed == ceil(0.25 * num_movable)
    assert count.choice == choice
    assert answer(llm, prompt(0, 1, 2), reuse=choice)[0] == found
    whole, output = answer(llm, prompt(0, 1, 2), reuse=choice.replace("0.25", "1"))
    assert whole == answer(llm, prompt(0, 1, 2))[0]
    # What hkvd looks at is computed up to the second layer, and this model has no more.
    assert (whole == found) is choice.startswith("hkvd")
    assert output.outputs[0].timings.reuse.why_not == ALL_CHOSEN


def test_streams_and_several_answers(llm):
    several = SamplingParams(temperature=1.0, seed=3, max_tokens=12, n=3, ignore_eos=True)
    (whole,) = llm.generate(prompt(0, 1), several, reuse="none")
    *_, last = llm.stream(prompt(0, 1), several, reuse="none")
    assert [o.token_ids for o in last.outputs] == [o.token_ids for o in whole.outputs]
    assert len({tuple(o.token_ids) for o in whole.outputs}) == 3
    assert all(o.timings.reuse.num_reused > 0 for o in whole.outputs)


def test_reuse_of_a_prompt_without_marks_changes_nothing(llm):
    whole, _ = answer(llm, "abc " * 20)
    found, output = answer(llm, "abc " * 20, reuse="none")
    assert found == whole and output.outputs[0].timings.reuse.why_not == UNMARKED


def chat(*texts):
    parts = [{"type": "text", "text": t, "cache": "reusable"} for t in texts]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


def test_parts_of_a_chat(llm):
    made = llm.chat_prompt(chat(TEXTS[0], TEXTS[2]))
    assert [s["reusable"] for s in made["segments"]] == [False, True, False, True, False]
    decode = llm.get_tokenizer().decode
    texts = [decode(s["token_ids"], skip_special_tokens=False) for s in made["segments"]]
    assert "".join(texts) == made["prompt"] == f"<user>{TEXTS[0]}\n{TEXTS[2]}\n{QUESTION}</>"
    (output,) = llm.chat(chat(TEXTS[0], TEXTS[2]), PARAMS, reuse="none")
    assert output.outputs[0].timings.reuse.num_reused == sum(
        len(s["token_ids"]) for s in made["segments"] if s["reusable"]
    )
    assert output.prompt == made["prompt"]
    exact, _ = answer(llm, made)
    ids = [i for s in made["segments"] for i in s["token_ids"]]
    assert exact == answer(llm, {"prompt_token_ids": ids})[0]


def test_documents_of_a_chat(llm):
    documents = [{"text": text, "title": "t"} for text in TEXTS]
    asked = [{"role": "user", "content": QUESTION}]
    (output,) = llm.chat(asked, PARAMS, documents=documents, reuse="none")
    assert output.prompt.startswith(f"<doc>{TEXTS[0]}</doc><doc>{TEXTS[1]}</doc>")
    count = output.outputs[0].timings.reuse
    assert count.num_reused == sum(
        len(llm.get_tokenizer().encode(text, add_special_tokens=False)) for text in TEXTS
    )


def test_a_part_that_has_no_place_is_refused_or_computed(llm):
    at_the_end = [*chat(TEXTS[0]), {"role": "user", "content": chat(" x ")[0]["content"][:1]}]
    with pytest.raises(InvalidRequest, match="changes it") as refusal:
        llm.chat(at_the_end, PARAMS, reuse="none")
    assert refusal.value.field == "messages[1].content[0]"
    choice = {"method": "none", "on_unsupported": "compute"}
    (output,) = llm.chat(at_the_end, PARAMS, reuse=choice)
    (plain,) = llm.chat(at_the_end, PARAMS)
    count = output.outputs[0].timings.reuse
    assert count.num_reused == 0 and "messages[1].content[0]: the chat" in count.why_not
    assert output.outputs[0].token_ids == plain.outputs[0].token_ids
    assert output.prompt_token_ids == plain.prompt_token_ids


@pytest.mark.parametrize(
    ("given", "params", "reuse", "field"),
    [
        (prompt(0), PARAMS, "best", "reuse.method"),
        (prompt(0), PARAMS, {"method": "first", "num_first": -1}, "reuse.num_first"),
        (prompt(0), PARAMS, "query:1.5", "reuse.ratio"),
        (prompt(0), PARAMS, "query:0.5:99", "reuse.num_rounds"),
        (prompt(0), PARAMS, 5, "reuse"),
        (prompt(0), SamplingParams(max_tokens=1, prompt_logprobs=0), "none", "reuse"),
        ({"segments": ["a", 5]}, PARAMS, None, "segments[1]"),
        ({"segments": []}, PARAMS, None, "prompt"),
        ({"segments": ["a"], "prompt_token_ids": [1]}, PARAMS, None, "segments"),
        ({"segments": [[10**6]]}, PARAMS, None, "prompt"),
        (prompt(0, question="x " * 10**4), PARAMS, "none", "prompt"),
        (prompt(*[0] * 400), PARAMS, "none", "prompt"),
    ],
    ids=str,
)
def test_refusals_name_the_field(llm, given, params, reuse, field):
    with pytest.raises(InvalidRequest) as refusal:
        llm.generate([given], params, reuse=reuse)
    assert refusal.value.field == field
    assert not llm.engine.has_work


def test_what_needs_a_full_prefill_is_computed_in_full_if_asked(llm):
    scored = SamplingParams(temperature=1.0, seed=3, max_tokens=12, logprobs=2, prompt_logprobs=0)
    choice = {"method": "none", "on_unsupported": "compute"}
    found, output = answer(llm, prompt(0, 1), scored, reuse=choice)
    assert found == answer(llm, prompt(0, 1), scored)[0]
    assert "full prefill" in output.outputs[0].timings.reuse.why_not


def test_a_window_shorter_than_a_segment(path, tmp_path):
    shutil.copytree(path, tmp_path / "windowed")
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "mistral", "sliding_window": 20}
    (tmp_path / "windowed" / "config.json").write_text(json.dumps(config))
    with LLM(tmp_path / "windowed", max_num_seqs=4) as llm:
        with pytest.raises(InvalidRequest, match=r"not moved: .* sliding window of 20") as refusal:
            llm.generate(prompt(0, 1), PARAMS, reuse="none")
        assert refusal.value.field == "reuse"
        choice = {"method": "none", "on_unsupported": "compute"}
        found, output = answer(llm, prompt(0, 1), reuse=choice)
        assert found == answer(llm, prompt(0, 1))[0]
        assert "sliding window of 20" in output.outputs[0].timings.reuse.why_not
        short = {"segments": ["a", {"text": "b c", "reusable": True}, "d"]}
        assert answer(llm, short, reuse="none")[1].outputs[0].timings.reuse.num_reused > 0


def test_a_model_of_one_layer_tells_no_deviation(path, tmp_path):
    """So hkvd is refused at the door, or all is computed; not an error of the engine."""
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": 1}
    make_model(config, tmp_path / "one")
    with LLM(tmp_path / "one", max_num_seqs=4, block_size=8) as llm:
        with pytest.raises(
            InvalidRequest, match=r"method hkvd cannot .* this model has 1"
        ) as refusal:
            llm.generate(prompt(0, 1), PARAMS, reuse="hkvd:0.25")
        assert refusal.value.field == "reuse"
        choice = {"method": "hkvd", "ratio": 0.25, "on_unsupported": "compute"}
        found, output = answer(llm, prompt(0, 1), reuse=choice)
        assert found == answer(llm, prompt(0, 1))[0]
        assert "this model has 1" in output.outputs[0].timings.reuse.why_not
        assert answer(llm, prompt(0, 1), reuse="query:0.25")[1].outputs[0].timings.reuse.num_reused


def test_without_a_prefix_cache_there_is_nothing_to_reuse_from(path):
    with (
        LLM(path, max_num_seqs=4, enable_prefix_caching=False) as llm,
        pytest.raises(InvalidRequest, match="--enable-prefix-caching"),
    ):
        llm.generate(prompt(0, 1), PARAMS, reuse="none")
