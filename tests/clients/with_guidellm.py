"""guidellm: a run of a few requests over chat, completions and Responses."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, QUESTION, ROOT, URL, needs, run

needs("guidellm", "guidellm")
NUM_REQUESTS = 4


def requests_through(route):
    folder = Path(tempfile.mkdtemp())
    data, report = folder / "prompts.jsonl", folder / "report.json"
    rows = [{"prompt": f"{QUESTION} ({n})", "output_tokens_count": 8} for n in range(NUM_REQUESTS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    backend = f"kind=openai_http,target={URL},model={MODEL},request_format={route}"
    command = [
        str(Path(sys.executable).with_name("guidellm")),
        *("run", "--backend", backend),
        *("--profile", "kind=concurrent,streams=2"),
        *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={ROOT / 'src/duetto/demo/duetto-demo'}"),
        *("--data", f"kind=json_file,path={data}"),
        *("--output", f"kind=json,path={report}", "--disable-console"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and report.exists(), (done.stdout + done.stderr)[-3000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    return benchmark


def check(route):
    benchmark = requests_through(route)
    done = benchmark["requests"]
    assert len(done["successful"]) == NUM_REQUESTS, done
    assert not done["errored"] and not done["incomplete"], done
    for each in done["successful"]:
        assert each["output_tokens"] and each["prompt_tokens"], each


def chat():
    check("/v1/chat/completions")


def completions():
    check("/v1/completions")


def responses():
    check("/v1/responses")


run(chat, completions, responses)
