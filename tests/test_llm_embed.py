"""Embeddings offline, of a checkpoint that says that it is made for them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from duetto import LLM, InvalidRequest, PoolingParams
from duetto.build import build
from duetto.checkpoints.config import read_config
from duetto.checkpoints.pooling import find_embedding_model
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import CheckpointError, ConfigError
from duetto.engine.thread import in_thread
from duetto.server.app import create_app
from duetto.server.settings import ServerSettings

KINDS = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
MODULES = [
    {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for index, (kind, path) in enumerate(KINDS.items())
]
POOLING = {
    "word_embedding_dimension": 64,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_lasttoken": True,
    "include_prompt": True,
}
PROMPTS = {"prompts": {"query": "Query: ", "document": ""}, "default_prompt_name": None}


def made_for_embeddings(source: Path, out: Path, *, modules=MODULES, pooling=POOLING, **config):
    shutil.copytree(source, out)
    (out / "modules.json").write_text(json.dumps(modules))
    (out / "1_Pooling").mkdir()
    (out / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (out / "config_sentence_transformers.json").write_text(json.dumps(PROMPTS))
    own = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(own))
    return out


@pytest.fixture(scope="module")
def llm(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "tiny"
    with LLM(made_for_embeddings(tiny_model, path, matryoshka_dimensions=[8, 16])) as llm:
        yield llm


def test_texts_and_ids_in_their_order(llm):
    ids = llm.get_tokenizer().encode("import this")
    one, two, three = llm.embed(["def f(x):", {"prompt_token_ids": ids}, "import this"])
    assert two.outputs.embedding == three.outputs.embedding != one.outputs.embedding
    for output in (one, two, three):
        assert output.finished and output.error is None
        assert np.linalg.norm(output.outputs.embedding) == pytest.approx(1, abs=1e-6)
    assert llm.embed("def f(x):")[0].outputs.embedding == one.outputs.embedding


def test_a_prompt_of_the_checkpoint_is_put_before_texts(llm):
    (named,) = llm.embed("cats", prompt_name="query")
    (whole,) = llm.embed("Query: cats")
    assert named.outputs.embedding == whole.outputs.embedding
    with pytest.raises(InvalidRequest, match=r"prompt_name: 'other' .* document, query"):
        llm.embed("cats", prompt_name="other")


def test_dimensions_that_the_model_allows(llm):
    (whole,) = llm.embed("cats")
    (cut,) = llm.embed("cats", pooling_params=PoolingParams(dimensions=8))
    first = np.array(whole.outputs.embedding[:8])
    assert cut.outputs.embedding == pytest.approx(first / np.linalg.norm(first))
    with pytest.raises(InvalidRequest, match="dimensions: 9 is not one of 8, 16, "):
        llm.embed("cats", pooling_params=PoolingParams(dimensions=9))


@pytest.mark.parametrize("wrong", [0, -1, True, "8", 1.5])
def test_dimensions_that_are_no_number_of_them(wrong):
    with pytest.raises(InvalidRequest, match="dimensions: must be 1 or more"):
        PoolingParams(dimensions=wrong)


@pytest.mark.parametrize(
    "prompt", [[], "", {"prompt_token_ids": [-1]}, {"prompt_token_ids": []}, 3]
)
def test_what_is_no_text_is_refused(llm, prompt):
    if prompt == []:
        assert llm.embed(prompt) == []
        return
    with pytest.raises(InvalidRequest, match="prompt: "):
        llm.embed(prompt)


def test_a_text_with_a_hole_is_refused(llm):
    with pytest.raises(InvalidRequest, match="suffix: is for answers"):
        llm.embed({"prompt": "a", "suffix": "b"})


def test_it_generates_nothing(llm):
    with pytest.raises(InvalidRequest, match="model: this model is served for embeddings"):
        llm.generate("x")


def test_one_that_is_not_made_for_embeddings(tiny_model):
    with LLM(tiny_model) as llm, pytest.raises(InvalidRequest, match=r"model: .* --runner pooling"):
        llm.embed("x")
    with LLM(tiny_model, runner="pooling", matryoshka=True) as llm:
        assert any("modules.json" in note for note in llm._built.notes)
        size = llm._built.model.embeddings.size
        (cut,) = llm.embed("x", pooling_params=PoolingParams(dimensions=3))
        assert len(cut.outputs.embedding) == 3
        with pytest.raises(InvalidRequest, match=f"dimensions: {size + 1}: .* {size} numbers"):
            llm.embed("x", pooling_params=PoolingParams(dimensions=size + 1))


def test_one_that_is_made_for_embeddings_may_generate(tiny_model, tmp_path):
    path = made_for_embeddings(tiny_model, tmp_path / "tiny")
    with LLM(path, runner="generate") as llm:
        assert llm.generate("x")[0].outputs[0].token_ids
        with pytest.raises(InvalidRequest, match="served to generate"):
            llm.embed("x")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"pooling": {"pooling_mode_mean_tokens": True}},
            "1_Pooling/config.json: pooling: mean_tokens",
        ),
        ({"pooling": {"pooling_mode_cls_token": True}}, "cls_token is not computed here"),
        ({"pooling": {"pooling_mode": "mean"}}, "mean is not computed here; accepted: lasttoken"),
        (
            {"pooling": POOLING | {"pooling_mode_max_tokens": True}},
            "lasttoken, max_tokens",
        ),
        ({"pooling": {}}, "pooling: none"),
        (
            {"modules": [*MODULES, {"path": "3_Dense", "type": "a.models.Dense"}]},
            "the module Dense is not computed here",
        ),
        ({"modules": MODULES[:1]}, "has the modules Transformer"),
        ({"modules": {}}, "modules.json: must list modules"),
        ({"modules": [{"path": "../x", "type": "Transformer"}]}, "must list modules"),
        ({"modules": [MODULES[0], MODULES[1] | {"path": "gone"}]}, "gone/config.json"),
        ({"is_causal": False}, "config.json: is_causal: false"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"matryoshka_dimensions": [0]}, "matryoshka_dimensions: must list"),
    ],
)
def test_a_checkpoint_that_is_not_computed_here(tiny_model, tmp_path, changes, words):
    path = made_for_embeddings(tiny_model, tmp_path / "tiny", **changes)
    with pytest.raises(CheckpointError, match=words):
        find_embedding_model(path, "auto", read_config(path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runner": "embed"}, "--runner: 'embed' is not one of auto, generate, pooling"),
        ({"matryoshka": 1}, "--matryoshka: must be True or False"),
        ({"matryoshka": True, "runner": "generate"}, "--matryoshka with --runner generate"),
        ({"speculative_config": '{"method": "ngram"}'}, "--speculative-config and embeddings"),
        ({"tool_call_parser": "hermes"}, "--tool-call-parser and embeddings"),
    ],
)
def test_options_that_do_not_go_with_embeddings(tiny_model, tmp_path, options, words):
    path = made_for_embeddings(tiny_model, tmp_path / "tiny")
    with pytest.raises(ConfigError, match=words):
        LLM(path, **options)


def test_the_server_gives_the_same_numbers(llm, tiny_model, tmp_path):
    path = made_for_embeddings(tiny_model, tmp_path / "tiny")
    built = build(path, EngineArgs(max_model_len=512))
    settings = ServerSettings(served_model_name="m", embeddings=built.model.embeddings)
    app = create_app(
        open_engine=in_thread(built.engine),
        codec=built.codec,
        config=built.scheduler_config,
        settings=settings,
    )
    texts = ["cats", "dogs and cats"]
    wanted = [output.outputs.embedding for output in llm.embed(texts)]
    with TestClient(app) as client:
        reply = client.post("/v1/embeddings", json={"model": "m", "input": texts}).json()
    numbers = [np.array(each["embedding"], "f4").tolist() for each in reply["data"]]
    assert numbers == wanted
    assert reply["usage"]["prompt_tokens"] == sum(
        len(output.prompt_token_ids) for output in llm.embed(texts)
    )
