"""The offline door with a tokenizer whose tokens are not the model's rows."""

import json
import shutil

import pytest
from tiny_tokenizers import byte_fallback_bpe, gemma_like
from tokenizers import AddedToken

from duetto import LLM, InvalidRequest, SamplingParams
from duetto.core.errors import CheckpointError

IMAGE = "<image_soft_token>"


@pytest.fixture(scope="module")
def gemma(tiny_model, tmp_path_factory):
    """The rows of one model under the tokenizer of another, one token more than there are rows."""
    path = tmp_path_factory.mktemp("models") / "gemma"
    shutil.copytree(tiny_model, path)
    rows = json.loads((path / "config.json").read_text())["vocab_size"]
    library = gemma_like()
    missing = rows - library.get_vocab_size()
    library.add_tokens([AddedToken(f"<unused{i}>", normalized=False) for i in range(missing)])
    library.add_tokens([AddedToken(IMAGE, normalized=False)])
    library.save(str(path / "tokenizer.json"))
    return path, library, rows


def test_it_loads_and_never_samples_what_has_no_row(gemma, caplog):
    path, _, rows = gemma
    with LLM(path) as llm:
        assert any(IMAGE in r.message and str(rows) in r.message for r in caplog.records)
        assert llm.get_tokenizer().vocab_size == rows
        params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=50.0, n=4, logprobs=20)
        (output,) = llm.generate(["the"], params)
        for answer in output.outputs:
            assert max(answer.token_ids) < rows
            assert all(i < rows for step in answer.logprobs for i in step)
        for prompt in (f"a {IMAGE}", {"prompt_token_ids": [3, rows]}):
            with pytest.raises(InvalidRequest, match=rf"prompt: .*{rows}"):
                llm.generate(prompt, params)
        for asked in (
            {"logit_bias": {rows: 1}},
            {"stop_token_ids": [rows]},
            {"bad_words": [IMAGE]},
        ):
            with pytest.raises(InvalidRequest, match=next(iter(asked))):
                llm.generate("the", SamplingParams(**asked))


def test_decoded_tokens_are_what_they_add_to_the_text(gemma):
    path, library, _ = gemma
    spaces = library.token_to_id("▁▁▁▁")
    params = SamplingParams(
        max_tokens=1, allowed_token_ids=(spaces,), logprobs=0, prompt_logprobs=0
    )
    with LLM(path) as llm:
        (output,) = llm.generate("the▁▁▁▁the", params)
    (step,) = output.outputs[0].logprobs
    assert step[spaces].decoded_token == output.outputs[0].text == "    "
    at = output.prompt_token_ids.index(spaces)
    assert output.prompt_logprobs[at][spaces].decoded_token == "    "


def test_the_token_that_begins_a_text_is_named_as_it_stands_there(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "llama")
    library = byte_fallback_bpe()
    library.save(str(tmp_path / "llama" / "tokenizer.json"))
    the = library.token_to_id("▁th")
    params = SamplingParams(max_tokens=3, allowed_token_ids=(the,), logprobs=0)
    with LLM(tmp_path / "llama") as llm:
        for prompt, first in (("", "th"), ("e", " th")):
            (answer,) = llm.generate(prompt, params)[0].outputs
            shown = [step[the].decoded_token for step in answer.logprobs]
            assert shown == [first, " th", " th"] and "".join(shown) == answer.text


def test_a_tokenizer_of_another_model_is_refused(gemma, tmp_path):
    path, library, rows = gemma
    shutil.copytree(path, tmp_path / "other")
    vocab = {f"w{i}": i for i in range(4 * rows)}
    whole = json.loads(library.to_str())
    whole["model"] |= {"vocab": vocab | {"<unk>": 4 * rows}, "merges": []}
    whole["added_tokens"], whole["post_processor"] = [], None
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match="belongs to another model"):
        LLM(tmp_path / "other")
