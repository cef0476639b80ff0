"""aiperf: a run of a few requests over chat (streamed), completions and Responses."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, ROOT, URL, needs, run

needs("aiperf", "aiperf")
NUM_REQUESTS = 4
# aiperf takes an empty answer for a fault, and the demo model has none to what no document tells.
PROMPT = "Document: Nanchem is based in Gilcross.\nQuestion: Where is Nanchem based?"


def hub_with_tokenizer(folder):
    """aiperf's processes take a tokenizer only from what the hub's client has kept."""
    model, commit = folder / "hub" / "models--duetto--demo", "0" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    demo = ROOT / "src/duetto/demo/duetto-demo"
    shutil.copytree(
        demo, model / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors")
    )
    return {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}


def check(kind, *more):
    folder = Path(tempfile.mkdtemp())
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"text": PROMPT}) + "\n" for _ in range(NUM_REQUESTS)))
    command = [
        str(Path(sys.executable).with_name("aiperf")),
        *("profile", "--model-names", MODEL, "--url", URL, "--endpoint-type", kind),
        *("--tokenizer", "duetto/demo"),
        *("--input-file", str(data), "--custom-dataset-type", "single_turn"),
        *("--request-count", str(NUM_REQUESTS), "--concurrency", "2", "--ui", "none"),
        *("--extra-inputs", "max_tokens:8" if kind != "responses" else "max_output_tokens:8"),
        *(("--extra-inputs", "ignore_eos:true") if kind == "completions" else ()),
        *("--output-artifact-dir", str(folder / "out"), *more),
    ]
    env = {**os.environ, "HOME": str(folder), **hub_with_tokenizer(folder)}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    report = json.loads((folder / "out" / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == NUM_REQUESTS, report["request_count"]
    assert not report.get("error_summary"), report["error_summary"]


def chat_streamed():
    check("chat", "--streaming")


def completions():
    check("completions")


def responses():
    check("responses", "--streaming")


run(chat_streamed, completions, responses)
