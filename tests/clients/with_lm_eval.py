"""lm-eval: a task of ours; answers and log-likelihoods by completions, answers by chat."""

import json
import logging
import os
import tempfile
from pathlib import Path

from checks import MODEL, ROOT, URL, needs, run

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
logging.disable(logging.WARNING)
needs("lm-eval", "lm_eval")
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

TOKENIZER = ROOT / "src" / "duetto" / "demo" / "duetto-demo"
FACTS = "Document: Nanchem is based in Gilcross.\n"
ROWS = [
    {
        "question": f"{FACTS}Question: Where is {name} based?",
        "choices": ["Gilcross", "Oslo"],
        "gold": 0,
    }
    for name in ("Nanchem", "it")
]
SHARED = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}\nAnswer:",
    "metadata": {"version": 1},
}
TASKS = {
    "answers": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "temperature": 0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    },
}
folder = Path(tempfile.mkdtemp())
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
for name, task in TASKS.items():
    files = {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    whole = {"task": name, **SHARED, **files, **task}
    (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
tasks = TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(model, task, **args):
    path = "chat/completions" if "chat" in model else "completions"
    made = simple_evaluate(
        model=model,
        model_args={"model": MODEL, "base_url": f"{URL}/v1/{path}", "max_retries": 1, **args},
        tasks=[task],
        task_manager=tasks,
        apply_chat_template="chat" in model,
        bootstrap_iters=0,
    )
    samples = made["samples"][task]
    assert len(samples) == len(ROWS)
    return samples


def completions_answer():
    for sample in evaluated("local-completions", "answers", tokenizer_backend=None):
        assert isinstance(sample["filtered_resps"][0], str)


def completions_weigh_choices():
    """A choice's likelihood is the same alone and in a batch, as text and as ids."""
    tokenizer = {"tokenizer": str(TOKENIZER), "tokenizer_backend": "huggingface"}
    ways = [
        tokenizer,
        {**tokenizer, "batch_size": 4},
        {**tokenizer, "tokenized_requests": False},
        {"tokenizer_backend": "remote"},  # /tokenizer_info and /tokenize
    ]
    found = []
    for way in ways:
        samples = evaluated("local-completions", "choices", **way)
        found.append([sample["filtered_resps"] for sample in samples])
    assert all(score < 0 for choices in found[0] for score, _ in choices)
    assert all(each == found[0] for each in found), found


def chat_answers():
    for sample in evaluated("local-chat-completions", "answers"):
        assert isinstance(sample["filtered_resps"][0], str)


run(completions_answer, completions_weigh_choices, chat_answers)
