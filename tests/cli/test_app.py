"""The command line as a person meets it: answers on stdout, one line of error, exit codes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401  teaches numpy bfloat16
import numpy as np
import pytest
from cli.in_process import duetto
from safetensors.numpy import load_file, save_file


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def in_a_process(
    *words: str | Path, stdin: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "duetto", *map(str, words)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | variables,
    )


def serve(model: str | Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Start a server that will not start; on any port, as tests run side by side."""
    return duetto("serve", model, "--port", "0", *words)


def check_fails_in_one_line(run: subprocess.CompletedProcess[str], *words: str) -> None:
    assert run.returncode == 1, run
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("duetto: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture
def broken(tiny_model, tmp_path):
    """A copy of the tiny checkpoint for a test to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "broken"))


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_complete_streams_the_answer_and_tells_its_timings(tiny_model):
    run = in_a_process("complete", tiny_model, "def f", "--max-tokens", 8, "--ignore-eos")
    assert run.returncode == 0
    assert run.stdout.strip()
    assert "8 generated, TTFT" in run.stderr
    piped = duetto("complete", tiny_model, "--max-tokens", 8, "--ignore-eos", stdin="def f")
    assert piped.stdout == run.stdout


def test_chat_keeps_the_conversation(tiny_model):
    run = duetto("chat", tiny_model, "--max-tokens", 4, stdin="hello\n\n/clear\nagain\n/exit\n")
    assert run.returncode == 0
    assert run.stderr.count("generated") == 2


def test_chat_takes_no_mistyped_command_for_a_message(tiny_model):
    run = duetto("chat", tiny_model, "--max-tokens", 4, stdin="/quit\n/usr/bin or /bin?\n/exit\n")
    assert run.returncode == 0
    assert "there is no /quit. A line is a message. /clear forgets" in run.stderr
    assert run.stderr.count("generated") == 1


def test_without_a_model_the_reader_continues(tiny_model):
    run = duetto("complete", "--max-tokens", 2, "--ignore-eos", stdin="the")
    assert run.returncode == 0, run.stderr
    assert "No model named" in run.stderr and "2 generated" in run.stderr


def test_what_was_chosen_on_the_users_behalf_is_told(tiny_model):
    note = "note: the baseline kernels run, which are slow"
    for words in (("complete", tiny_model, "def f"), ("chat", tiny_model, "-q", "hi")):
        run = in_a_process(*words, "--max-tokens", 2, DUETTO_ISA="baseline")
        assert run.returncode == 0
        assert run.stderr.startswith(note) and run.stderr.count("note: ") == 1


def test_chat_goes_on_after_a_message_that_is_too_long(tiny_model):
    long = "long " * 3000
    run = duetto("chat", tiny_model, "--max-tokens", 4, stdin=f"{long}\nshort\n")
    assert run.returncode == 0
    assert "maximum context length" in run.stderr
    assert run.stderr.count("generated") == 1


def test_an_answer_that_failed_is_an_error(broken):
    fill_weights(broken, 3e38)  # numbers, whose products are none
    check_fails_in_one_line(duetto("complete", broken, "hi"), "not finite")
    check_fails_in_one_line(duetto("chat", broken, "-q", "hi"), "not finite")


def test_weights_that_are_no_numbers_are_told_with_their_tensor(broken):
    fill_weights(broken, np.nan)
    run = duetto("complete", broken, "hi")
    check_fails_in_one_line(run, "model.safetensors", "model.embed_tokens.weight holds nan")


def fill_weights(model, value):
    file = model / "model.safetensors"
    tensors = {name: np.full_like(tensor, value) for name, tensor in load_file(file).items()}
    save_file(tensors, file)


def test_a_terminal_that_knows_only_ascii(tiny_model):
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    run = in_a_process("tokenize", "ö", "--model", tiny_model, **ascii_only)
    assert run.returncode == 0


def test_an_output_that_is_full(tiny_model):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "duetto", "doctor", "--json"]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("duetto: ") and run.stderr.count("\n") == 1


def test_doctor(tmp_path):
    run = duetto("doctor", "--json")
    report = json.loads(run.stdout)
    assert run.returncode == 0
    assert report["ready"] and report["native_module"]
    assert report["installed_bytes"] <= 200e6  # the promise of the README


@pytest.mark.parametrize("variable", ["DUETTO_ISA", "DUETTO_NUM_THREADS"])
def test_doctor_says_no_where_serve_refuses(tiny_model, variable):
    asked = {variable: "[foo]"}
    refused = in_a_process("serve", tiny_model, "--port", "0", **asked)
    check_fails_in_one_line(refused, variable)
    run = in_a_process("doctor", **asked)
    assert run.returncode == 1
    (verdict,) = (line for line in run.stdout.splitlines() if "ready to serve" in line)
    assert verdict.split()[3] == "no:" and variable in verdict and "[foo]" in verdict
    report = json.loads(in_a_process("doctor", "--json", **asked).stdout)
    assert report["ready"] is False and report["refusal"] in refused.stderr


def test_help_names_every_command():
    run = duetto("--help")
    for command in (
        "serve",
        "chat",
        "complete",
        "tokenize",
        "make-model",
        "bench",
        "doctor",
        "roofline",
        "fit",
    ):
        assert command in run.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("fit",), ("--model requires an argument", "see duetto fit --help")),
        (("complete", "x", "--bogus", "1"), ("--bogus", "see duetto complete --help")),
        (("nonsense",), ("nonsense", "serve, router", "see duetto --help")),
        (("serve", "--hots", "x"), ("Did you mean --host?",)),
        (("serve", "a", "b", "c"), ("b c: is more than this command takes",)),
        (("bench", "serve", "--burstiness", "x"), ("--burst", "see duetto bench serve --help")),
        (("bench", "serve", "--timeout", "long"), ("--timeout long: must be seconds",)),
    ],
)
def test_wrong_usage_is_an_error(words, told):
    check_fails_in_one_line(duetto(*words), *told)


# --- start-up: one line that names the file and the cause -------------------------------------


def test_no_such_directory(tmp_path):
    check_fails_in_one_line(serve(tmp_path / "none"), "none", "is not a directory")


def test_a_hub_name_without_a_network():
    run = in_a_process("serve", "someone/some-model", "--port", "0")
    check_fails_in_one_line(run, "someone/some-model", "hub")


def test_unknown_model_type(broken):
    edit_json(broken / "config.json", model_type="mamba")
    check_fails_in_one_line(serve(broken), "config.json", "mamba", "llama")


def test_config_that_is_not_json(broken):
    (broken / "config.json").write_text("{")
    check_fails_in_one_line(serve(broken), "config.json")


def test_missing_weights(broken):
    (broken / "model.safetensors").unlink()
    check_fails_in_one_line(serve(broken), "safetensors")


def test_truncated_weights(broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    check_fails_in_one_line(serve(broken), "model.safetensors")


def test_a_tensor_of_the_wrong_shape(broken):
    edit_json(broken / "config.json", intermediate_size=96)
    check_fails_in_one_line(serve(broken), "model.safetensors", "mlp", "96")


def test_a_tokenizer_of_another_model(broken):
    file = broken / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 5000, "content": "<x>"})
    tokenizer["model"]["vocab"]["<x>"] = 5000
    file.write_text(json.dumps(tokenizer))
    check_fails_in_one_line(serve(broken), "tokenizer.json", "5000", "another model")


def test_a_missing_tokenizer(broken):
    (broken / "tokenizer.json").unlink()
    check_fails_in_one_line(serve(broken), "tokenizer.json", "missing")


def test_a_template_that_does_not_compile(broken):
    (broken / "chat_template.jinja").write_text("{% for m in messages %}")
    check_fails_in_one_line(serve(broken), "chat_template.jinja")


def test_a_template_that_raises_stops_chats_only(broken):
    (broken / "chat_template.jinja").write_text("{{ messages[0].nothing.at_all }}")
    run = duetto("complete", broken, "def f", "--max-tokens", 2, "--ignore-eos")
    assert run.returncode == 0
    chat = duetto("chat", broken, "--max-tokens", 2, stdin="hello\n")
    assert "the chat template fails" in chat.stderr
    assert "Traceback" not in chat.stderr


def test_a_public_address_without_a_key(tiny_model):
    check_fails_in_one_line(serve(tiny_model, "--host", "0.0.0.0"), "--host", "--api-key")


def test_a_flag_of_the_engine_that_cannot_be(tiny_model):
    both = serve(tiny_model, "--backend", "reference", "--quantization", "int8")
    check_fails_in_one_line(both, "--quantization int8", "reference", "--backend cpu")


def test_reuse_that_nobody_vouches_for_is_no_default(tiny_model):
    check_fails_in_one_line(serve(tiny_model, "--reuse", "best"), "--reuse best", "first")
    check_fails_in_one_line(serve(tiny_model, "--reuse", "first"), "--reuse first", "needs it")
    run = serve(tiny_model, "--reuse", "first:4")
    assert run.returncode == 1 and "--allow-unmeasured-reuse" in run.stderr.splitlines()[-1]
