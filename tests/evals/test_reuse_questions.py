"""Questions for reuse of KV: files that are read or refused, and the prompts that they become."""

import json
from pathlib import Path

import pytest

from duetto.checkpoints.tokenizer import Tokenizer, load_tokenizer
from duetto.core.errors import ConfigError
from duetto.demo import demo_model_dir
from duetto.evals.reuse_questions import (
    ReuseQuestion,
    make_prompts,
    read_questions,
    world_questions,
)

LINE = {"documents": ["Ann lives in Rome.", "Bob lives in Oslo."], "question": "Where is Bob?"}


@pytest.fixture(scope="module")
def codec() -> Tokenizer:
    return load_tokenizer(demo_model_dir())


def write(folder: Path, *lines: object) -> Path:
    file = folder / "asked.jsonl"
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return file


def test_a_file_is_read(tmp_path: Path) -> None:
    several = LINE | {"answer": ["Oslo", "in Norway"], "kind": "hard"}
    file = write(tmp_path, LINE | {"answer": "Oslo"}, "", several)
    questions, name = read_questions(file)
    documents = ("Ann lives in Rome.", "Bob lives in Oslo.")
    assert questions == [
        ReuseQuestion(documents, "Where is Bob?", ("Oslo",)),
        ReuseQuestion(documents, "Where is Bob?", ("Oslo", "in Norway"), "hard"),
    ]
    assert name.startswith("asked.jsonl (")
    file.write_text(file.read_text().replace("Rome", "Bonn"))
    assert read_questions(file)[1] != name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is no JSON"),
        ("[1]", "line 2: must be an object with documents, question, answer"),
        (LINE, "line 2: answer: must be a text, or a list of texts"),
        (LINE | {"answer": []}, "line 2: answer: must be"),
        (LINE | {"answer": [""]}, "line 2: answer: must be"),
        (LINE | {"answer": 7}, "line 2: answer: must be"),
        (LINE | {"answer": "x", "documents": []}, "line 2: documents: must be a list of texts"),
        (LINE | {"answer": "x", "documents": "Ann"}, "line 2: documents: must be"),
        (LINE | {"answer": "x", "documents": [3]}, "line 2: documents: must be"),
        (LINE | {"answer": "x", "question": " "}, "line 2: question: must be"),
        (LINE | {"answer": "x", "kind": 3}, "line 2: kind: must be"),
        (LINE | {"answer": "x", "qestion": 3}, "line 2: qestion: is not known; accepted: docum"),
    ],
)
def test_a_line_that_cannot_be_asked(tmp_path: Path, line: object, message: str) -> None:
    file = write(tmp_path, LINE | {"answer": "Oslo"}, line)
    with pytest.raises(ConfigError) as caught:
        read_questions(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--questions .*nowhere: No such file"):
        read_questions(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"--questions .*: is a directory"):
        read_questions(tmp_path)
    with pytest.raises(ConfigError, match="holds no question"):
        read_questions(write(tmp_path, "", " "))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="line 1: is no JSON"):
        read_questions(tmp_path / "binary")


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("Oslo", True),
        ("He lives in OSLO.", True),
        ("in   norway!", True),
        ("Oslofjord", False),
        ("Norway, in", False),
        ("", False),
    ],
)
def test_what_is_right_for_a_file(answer: str, is_right: bool) -> None:
    question = ReuseQuestion(("d",), "q", ("Oslo", "in Norway"))
    assert question.is_right(answer) is is_right


def test_worlds_are_asked_evenly_and_judged_exactly() -> None:
    questions = world_questions(40, seed=3, num_documents=6)
    assert {q.kind for q in questions} == {"one_hop", "two_hop", "comparison", "not_stated"}
    for question in questions:
        (answer,) = question.answers
        assert question.is_right(f" because: {answer}.")
        assert not question.is_right(f"It is {answer}")


def test_prompts_are_the_chat_with_each_document_alone(codec: Tokenizer) -> None:
    questions = world_questions(12, seed=3, num_documents=6)
    prompts, note = make_prompts(codec, questions)
    assert note is None
    for question, prompt in zip(questions, prompts, strict=True):
        said = "".join(f"Document: {d}\n" for d in question.documents)
        assert codec.decode(prompt.token_ids, skip_special_tokens=False) == (
            f"<|user|>\n{said}Question: {question.text}<|end|>\n<|assistant|>"
        )
        assert len(prompt.segments) == 6
        for document, (start, end) in zip(question.documents, prompt.segments, strict=True):
            alone = codec.encode(f"Document: {document}\n", add_special_tokens=False)
            assert list(prompt.token_ids[start:end]) == alone


class NoTemplate(Tokenizer):
    """As of a model that was not taught to chat."""

    def __init__(self, other: Tokenizer) -> None:
        self.__dict__.update(other.__dict__)
        self._chat_template = None


class Shouting(NoTemplate):
    def render_chat(self, messages, **_options) -> str:  # type: ignore[no-untyped-def]
        return "".join(message["content"] for message in messages).upper()


def test_a_model_without_a_chat_template_is_asked_plainly(codec: Tokenizer) -> None:
    question = ReuseQuestion(("Ann lives in Rome.",), "Where?", ("Rome",))
    (prompt,), note = make_prompts(NoTemplate(codec), [question])
    assert note is not None and note.startswith("prompts are plain text, without a chat: this mod")
    text = codec.decode(prompt.token_ids, skip_special_tokens=False)
    assert text == "Document: Ann lives in Rome.\nQuestion: Where?\nAnswer:"


def test_a_template_that_changes_the_text_is_refused(codec: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="does not write what the user says once and as it is"):
        make_prompts(Shouting(codec), world_questions(4, 0, 6))
