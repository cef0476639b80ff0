"""The models that ship: whole, small, a match for each other, and readers of documents."""

import json
from math import prod
from pathlib import Path

import pytest
from cli.in_process import duetto
from safetensors import safe_open

from duetto import LLM, SamplingParams
from duetto.cli.default_model import model_or_demo
from duetto.core.errors import ConfigError
from duetto.demo import DRAFT, READER, demo_model_dir
from duetto.evals.worlds.prompt import user_turn
from duetto.evals.worlds.world import WorldOptions, draw_world

NAMES = (READER, DRAFT)
MOST_PARAMETERS = {READER: 12_000_000, DRAFT: 1_500_000}


def num_parameters(directory: Path) -> int:
    with safe_open(directory / "model.safetensors", framework="numpy") as file:
        slices = [file.get_slice(name) for name in file.offset_keys()]
        assert {s.get_dtype() for s in slices} == {"BF16"}
        return sum(prod(s.get_shape()) for s in slices)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_as_small_as_promised(name):
    directory = demo_model_dir(name)
    assert num_parameters(directory) <= MOST_PARAMETERS[name]
    assert (directory / "README.md").is_file(), "a model card"


def test_both_fit_into_a_wheel():
    files = [f for name in NAMES for f in demo_model_dir(name).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 30e6


def test_the_draft_is_smaller_and_reads_the_same_tokens():
    reader, draft = map(demo_model_dir, NAMES)
    assert num_parameters(draft) < num_parameters(reader)
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (reader / file).read_bytes() == (draft / file).read_bytes()


def test_a_model_that_was_left_out_is_an_error_that_says_what_to_do():
    with pytest.raises(ConfigError, match="name a model"):
        demo_model_dir("duetto-none")


def test_the_reader_is_the_model_when_none_is_named(capsys):
    assert model_or_demo("some/model") == "some/model"
    assert capsys.readouterr().err == ""
    assert model_or_demo(None) == str(demo_model_dir())
    assert READER in capsys.readouterr().err


def test_chat_answers_without_a_model():
    question = "Document: Malsteel is based in Gulbridge.\nQuestion: Where is Malsteel based?"
    run = duetto("chat", "-q", question, "--backend", "reference")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "Gulbridge"
    assert READER in run.stderr


def chats(count: int) -> list[list[dict[str, str]]]:
    worlds = [draw_world(seed, "eval", WorldOptions()) for seed in range(count)]
    return [[dict(user_turn(w.documents, q.text))] for w in worlds for q in w.questions[:3]]


def greedy(name: str, conversations: list[list[dict[str, str]]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=8)
    with LLM(demo_model_dir(name), backend="reference") as llm:
        outputs = llm.chat(conversations, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


RECORDED = Path(__file__).parent / "greedy.json"


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_that_transformers_gave(name):
    """Without transformers: `test_transformers_gives_the_same_answers` keeps the record true."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    assert greedy(name, chats(len(recorded) // 3)) == recorded


@pytest.mark.oracle
@pytest.mark.parametrize("name", NAMES)
def test_transformers_gives_the_same_answers(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = demo_model_dir(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = []
    for chat in chats(8):
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**ids, do_sample=False, max_new_tokens=8)
        theirs.append(answer[0, ids["input_ids"].shape[1] :].tolist())
    assert json.loads(RECORDED.read_text(encoding="utf-8"))[name] == theirs
    assert greedy(name, chats(8)) == theirs
