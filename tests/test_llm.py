"""The offline door, with vLLM's names and result shapes."""

import math
import shutil
import time
from itertools import pairwise

import pytest

from duetto import LLM, InvalidRequest, RequestTooLong, SamplingParams
from duetto.core.errors import CheckpointError, ConfigError, EngineError

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(tiny_model):
    with LLM(tiny_model, max_num_seqs=4) as llm:
        yield llm


def test_texts_and_ids_in_their_order(llm):
    ids = llm.get_tokenizer().encode("import this")
    prompts = ["def f(x):", {"prompt_token_ids": ids}, {"prompt": "import this"}]
    first, second, third = llm.generate(prompts, GREEDY)
    assert first.prompt == "def f(x):"
    assert second.prompt is None
    assert second.prompt_token_ids == third.prompt_token_ids == ids
    assert second.outputs[0].token_ids == third.outputs[0].token_ids
    for output in (first, second, third):
        assert output.finished
        (answer,) = output.outputs
        assert len(answer.token_ids) == 12
        assert answer.finish_reason == "length"
        assert answer.text == llm.get_tokenizer().decode(answer.token_ids)
        assert answer.timings.e2e_s > 0
        assert sum(answer.timings.parts.values()) == pytest.approx(answer.timings.e2e_s)


def test_one_prompt_needs_no_list(llm):
    (output,) = llm.generate("x", GREEDY)
    assert output.outputs[0].text == llm.generate(["x"], [GREEDY])[0].outputs[0].text


def test_streamed_is_whole(llm):
    (whole,) = llm.generate("class A", GREEDY)
    texts = [output.outputs[0].text for output in llm.stream("class A", GREEDY)]
    assert texts[-1] == whole.outputs[0].text
    assert all(later.startswith(text) for text, later in pairwise(texts))
    assert len(texts) == 12


def test_leaving_a_stream_early_frees_everything(llm):
    for output in llm.stream(["a", "b"], SamplingParams(max_tokens=500, ignore_eos=True)):
        if len(output.outputs[0].token_ids) > 2:
            break
    assert not llm.engine.has_work
    assert llm.engine.scheduler.pool.num_free == llm.config.num_blocks


def test_several_answers(llm):
    params = SamplingParams(n=3, seed=11, max_tokens=8, temperature=2.0, logprobs=2)
    (output,) = llm.generate("for x in", params)
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) > 1
    answer = output.outputs[0]
    assert len(answer.logprobs) == 8
    for token_id, logprobs in zip(answer.token_ids, answer.logprobs, strict=True):
        assert token_id in logprobs
        assert 2 <= len(logprobs) <= 3
    chosen = [lp[i].logprob for i, lp in zip(answer.token_ids, answer.logprobs, strict=True)]
    assert answer.cumulative_logprob == pytest.approx(sum(chosen))


def test_prompt_logprobs(llm):
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate("a prompt to be scored", params)
    assert output.prompt_logprobs[0] is None  # nothing comes before the first token
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token_id, scored in zip(
        output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
    ):
        assert list(scored) == [token_id]
        assert scored[token_id].logprob < 0


def test_seeds(tiny_model):
    """The same LLM seed gives the same answers; a request's own seed does, whatever the LLM's."""

    def run(llm_seed, seed):
        with LLM(tiny_model, seed=llm_seed) as llm:
            params = SamplingParams(max_tokens=8, temperature=3.0, seed=seed)
            return [output.outputs[0].token_ids for output in llm.generate(["x", "x"], params)]

    assert run(1, None) == run(1, None) != run(2, None)
    assert len({tuple(ids) for ids in run(1, None)}) == 2  # each request has its own stream
    assert run(1, 5) == run(2, 5)


def test_log_probabilities_of_the_whole_vocabulary(tiny_model):
    asked = SamplingParams(temperature=0, max_tokens=2, logprobs=-1, prompt_logprobs=-1)
    with LLM(tiny_model, max_num_seqs=1, max_logprobs=-1) as wide:
        size = wide.get_tokenizer().vocab_size
        (output,) = wide.generate("def f", asked)
    for row in (*output.outputs[0].logprobs, *output.prompt_logprobs[1:]):
        assert sorted(row) == [*range(size)]
        assert math.fsum(math.exp(one.logprob) for one in row.values()) == pytest.approx(1.0)
        assert {one.rank for one in row.values()} == {*range(1, size + 1)}
    refused = pytest.raises(InvalidRequest, match=f"-1 is all {size} of the vocabulary; at most 20")
    with LLM(tiny_model, max_num_seqs=1) as usual, refused:
        usual.generate("def f", asked)


def test_chat_reuses_the_conversation(llm):
    llm.reset_prefix_cache()
    first = [{"role": "user", "content": "word " * 40}]
    (answer,) = llm.chat(first, GREEDY)
    assert answer.num_cached_tokens == 0
    turn = [*first, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "more"}]
    (one, two) = llm.chat([turn, first], GREEDY)
    assert one.num_cached_tokens >= llm.config.block_size
    assert two.outputs[0].token_ids == answer.outputs[0].token_ids


def test_stop_strings(llm):
    (whole,) = llm.generate("def", GREEDY)
    text = whole.outputs[0].text
    stop = text[3:5]
    (output,) = llm.generate("def", SamplingParams(temperature=0, max_tokens=12, stop=stop))
    assert output.outputs[0].text == text[: text.index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


@pytest.mark.parametrize(
    ("prompts", "params", "field"),
    [
        ([{"prompt_token_ids": []}], GREEDY, "prompt"),
        ([{"prompt_token_ids": [10**6]}], GREEDY, "prompt"),
        ([{"prompt_token_ids": [-1]}], GREEDY, "prompt"),
        ([{"text": "x"}], GREEDY, "prompt"),
        (["x"], SamplingParams(logit_bias={10**6: 1.0}), "logit_bias"),
        (["x"], [GREEDY, GREEDY], "sampling_params"),
        (["x" * 5], SamplingParams(max_tokens=10**6), "max_tokens"),
    ],
)
def test_refusals_name_the_field_and_compute_nothing(llm, prompts, params, field):
    with pytest.raises(InvalidRequest) as refusal:
        llm.generate(prompts, params)
    assert refusal.value.field == field
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate(None), "prompt: must be a text or a mapping of .*, not None"),
        (lambda llm: llm.stream(5), "prompt: must be a text or a mapping of .*, not 5"),
        (lambda llm: llm.generate("x", 5), "sampling_params: must be SamplingParams, .*not 5"),
        (lambda llm: llm.generate("x", priority=1), "priority: must be .*, not 1"),
        (lambda llm: llm.chat(5), "messages: must be a list of messages, not 5"),
        (lambda llm: llm.chat([]), "messages: must be a list of messages"),
    ],
)
def test_what_is_no_prompt_is_refused_in_words(llm, call, message):
    with pytest.raises(InvalidRequest, match=message):
        call(llm)


def test_what_was_chosen_on_the_callers_behalf_is_logged(tiny_model, caplog, monkeypatch):
    monkeypatch.setenv("DUETTO_ISA", "baseline")
    with LLM(tiny_model):
        pass
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "baseline kernels" in record.message


def test_one_refused_prompt_refuses_the_call_before_any_runs(llm):
    with pytest.raises(RequestTooLong, match="maximum context length"):
        llm.generate(["fine", {"prompt_token_ids": [1] * 5000}], GREEDY)
    assert not llm.engine.has_work


def test_a_closed_llm_says_so(tiny_model):
    llm = LLM(tiny_model)
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate("x")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "cuda"}, "--backend"),
        ({"quantization": "awq"}, "--quantization"),
        ({"quantization": "int8", "quantization_skip": "*.0.*"}, "--quantization-skip"),
        ({"threads": 1.5}, "--threads"),
        ({"enable_prefix_caching": "no"}, "--enable-prefix-caching: must be True or False"),
        ({"enable_chunked_prefill": 0}, "--enable-chunked-prefill: must be True or False"),
        ({"quantization": "int8", "quantization_skip": [5]}, "--quantization-skip: must be"),
        ({"quantization": "int8", "quantization_skip": None}, "--quantization-skip: must be"),
        ({"packed_cache": 5}, "--packed-cache: must be"),
        ({"packed_cache": None}, "--packed-cache: must be"),
        ({"dtype": None}, "--dtype"),
        ({"backend": 5}, "--backend"),
        ({"kv_cache_dtype": []}, "--kv-cache-dtype"),
        ({"max_model_len": "long"}, "--max-model-len"),
        ({"seed": "1"}, "--seed"),
        ({"target_itl": "1"}, "--target-itl"),
        ({"dtype": "int8"}, "--dtype"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype"),
        ({"max_model_len": 10**9}, "--max-model-len"),
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"scheduling_policy": "random"}, "--scheduling-policy"),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 64},
            "--no-enable-chunked-prefill with --max-num-batched-tokens",
        ),
    ],
)
def test_options_that_do_not_fit_name_the_flag(tiny_model, options, words):
    with pytest.raises(ConfigError, match=words):
        LLM(tiny_model, **options)


def test_a_template_is_given_with_tools_and_a_message_to_go_on_with(llm, tiny_model, tmp_path):
    turn = {"role": "user", "content": "Q"}
    tool = {"type": "function", "function": {"name": "look"}}
    with pytest.raises(InvalidRequest, match="tools: this model's chat template shows none"):
        llm.chat([turn], GREEDY, tools=[tool])
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}"
        "{% for m in messages %}{{ m.content }}.{% endfor %}{{ '>' if add_generation_prompt }}"
    )
    with LLM(tiny_model, chat_template=str(file)) as other:
        (answer,) = other.chat([turn], GREEDY, tools=[tool])
        assert answer.prompt == "look;Q.>" and len(answer.outputs[0].token_ids) == 12
        said = [turn, {"role": "assistant", "content": "A"}]
        assert other.chat_prompt(said, continue_final_message=True)["prompt"] == "Q.A"
        assert other.chat_prompt(said, add_generation_prompt=False)["prompt"] == "Q.A."
    with pytest.raises(CheckpointError, match=r"nowhere\.jinja: is missing"):
        LLM(tiny_model, chat_template=tmp_path / "nowhere.jinja")
    with pytest.raises(ConfigError, match="--chat-template: must be a file"):
        LLM(tiny_model, chat_template="")


def test_an_unknown_option_is_refused(tiny_model):
    with pytest.raises(TypeError, match="enforce_eager"):
        LLM(tiny_model, enforce_eager=True)


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        LLM(tmp_path / "nowhere")


def test_streams_may_be_open_side_by_side(llm):
    alone = {p: llm.generate(p, GREEDY)[0].outputs[0].token_ids for p in ("one", "two", "three")}
    first = llm.stream("one", GREEDY)
    second = llm.stream("two", GREEDY)
    next(first)
    next(second)
    (third,) = llm.generate("three", GREEDY)  # runs the other two along
    assert third.outputs[0].token_ids == alone["three"]
    assert list(second)[-1].outputs[0].token_ids == alone["two"]
    assert list(first)[-1].outputs[0].token_ids == alone["one"]
    assert not llm.engine.has_work


def test_what_a_stream_has_yielded_does_not_change(llm):
    lengths = [len(output.outputs[0].token_ids) for output in list(llm.stream("x", GREEDY))]
    assert lengths == list(range(1, 13))


def test_latency_counts_from_the_beginning_of_a_stream(llm):
    stream = llm.stream("x", GREEDY)
    made = time.monotonic()
    time.sleep(0.2)
    output = list(stream)[-1]
    assert output.outputs[0].timings.arrival_time >= made + 0.2


def test_a_refused_call_changes_no_later_answer(tiny_model):
    def answer(refused_first):
        with LLM(tiny_model) as llm:
            if refused_first:
                with pytest.raises(InvalidRequest):
                    llm.generate(["fine", {"prompt_token_ids": []}])
            params = SamplingParams(max_tokens=8, temperature=3.0)
            return llm.generate("x", params)[0].outputs[0].token_ids

    assert answer(refused_first=True) == answer(refused_first=False)


@pytest.mark.parametrize(
    ("prompt", "params", "priority", "field"),
    [
        ("x", GREEDY, [1], "priority"),  # the policy is first come, first served
        ("x", GREEDY, ["high"], "priority"),
        ("x", GREEDY, [10**400], "priority"),
        ({"prompt": "x", "multi_modal_data": 1}, GREEDY, None, "prompt"),
        ({"prompt": "x", "cache_salt": 5}, GREEDY, None, "cache_salt"),
        ({"prompt_token_ids": [1.0]}, GREEDY, None, "prompt"),
        ({"prompt_token_ids": [True]}, GREEDY, None, "prompt"),
        ({"prompt_token_ids": 7}, GREEDY, None, "prompt"),
        (7, GREEDY, None, "prompt"),
        ("x", [None], None, "sampling_params"),
    ],
)
def test_nothing_is_accepted_and_ignored(llm, prompt, params, priority, field):
    with pytest.raises(InvalidRequest) as refusal:
        llm.generate([prompt], params, priority=priority)
    assert refusal.value.field == field


def test_salts_share_nothing(llm):
    llm.reset_prefix_cache()
    prompt = {"prompt": "word " * 60}
    llm.generate(prompt | {"cache_salt": "a"}, GREEDY)
    other, same = llm.generate([prompt | {"cache_salt": "b"}, prompt | {"cache_salt": "a"}], GREEDY)
    assert other.num_cached_tokens == 0
    assert same.num_cached_tokens > 0


def test_closing_ends_what_runs_and_may_be_done_twice(tiny_model):
    with LLM(tiny_model) as llm:
        stream = llm.stream("x", GREEDY)
        next(stream)
        llm.close()
        llm.close()
        for forbidden in (llm.get_tokenizer, lambda: llm.chat([{"role": "user", "content": "x"}])):
            with pytest.raises(EngineError, match="closed"):
                forbidden()
        (last,) = stream
        assert last.outputs[0].finish_reason == "abort"


@pytest.mark.parametrize("value", ["4", 1.5, True, 0, -1])
def test_sizes_are_whole_numbers_above_0(tiny_model, value):
    with pytest.raises(ConfigError, match="--block-size"):
        LLM(tiny_model, block_size=value)


def test_refusals_come_before_the_weights_are_read(tiny_model, tmp_path):
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    (broken / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        LLM(broken)
