"""What quantized weights and a quantized KV cache change: the distribution of every next token.

    python benchmarks/quality.py MODEL [--worlds | --text FILE] [--num-tokens 512] [--context 256]

The same tokens are fed to the model as it is (its own dtype, nothing quantized) and to each
variant; at every position the two distributions over the vocabulary are compared. Reported are

    KL     mean over positions of sum p log(p / q), p being the whole model's, in nats
    p99    its 99th percentile
    top-1  positions at which both find the same token likeliest
    nll    mean negative log-likelihood of the token that comes next (of a text: log perplexity)

A random model's distributions are flat, so its top-1 agreement is far below a trained model's.
Tokens are random, or those of --text, or, for the demo models, of --worlds that they were not
trained on: documents, a question and its answer. Only the answer's positions count then, as no
other token was learned. The last line of stdout is one JSON document.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from in_process import machine, markdown_table, today
from numpy.typing import NDArray

from duetto.backends.backend import FloatArray
from duetto.build import build
from duetto.checkpoints.tokenizer import load_tokenizer
from duetto.core.batch import SamplingInput, ScheduledBatch, ScheduledRequest
from duetto.core.engine_args import EngineArgs
from duetto.core.sampling_params import SamplingParams
from duetto.evals.evaluate import EvalPlan, draw_items
from duetto.runner.load import LoadedModel
from duetto.runner.step_arrays import build_step_arrays

BLOCK_SIZE = 32
CHUNK = 128  # tokens of a step

VARIANTS: dict[str, dict[str, str]] = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int8 KV": {"kv_cache_dtype": "int8"},
    "int8, int8 KV": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int4, int8 KV": {"quantization": "int4", "kv_cache_dtype": "int8"},
}


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text whose tokens after the first `num_context` are looked at."""

    tokens: list[int]
    num_context: int = 1


@dataclass(frozen=True, slots=True)
class Quality:
    """One variant against the whole model."""

    variant: str
    num_positions: int
    weight_bytes: int
    kv_bytes_per_token: int
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    nll: float
    baseline_nll: float


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="a file; without it tokens are random")
    parser.add_argument("--worlds", action="store_true", help="held-out worlds, as `duetto eval`")
    parser.add_argument("--num-tokens", type=int, default=512)
    parser.add_argument("--context", type=int, default=256, help="tokens of each sequence")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--dtype", default="auto", help="of the whole model")
    options = parser.parse_args(words)

    args = EngineArgs(dtype=options.dtype, max_model_len=options.context, max_num_seqs=1)
    baseline = build(options.model, args).model
    sequences = list(_sequences(options, baseline.program.vocab_size))
    results = []
    for name in options.variants:
        changes = VARIANTS[name] | {"dtype": options.dtype}
        kept = {"max_model_len": options.context, "max_num_seqs": 1}
        variant = build(options.model, EngineArgs(**changes, **kept)).model  # type: ignore[arg-type]
        results.append(compare(name, baseline, variant, sequences))
    print(_table(results))
    print(f"{options.model.name}, {results[0].num_positions} tokens; {machine()}; {today()}")
    print(json.dumps([asdict(result) for result in results]))


def compare(
    name: str,
    baseline: LoadedModel,
    variant: LoadedModel,
    sequences: Sequence[Tokens],
) -> Quality:
    """Feed the sequences to both, and compare position by position."""
    kls: list[NDArray[np.float64]] = []
    agree, nll, baseline_nll = 0, 0.0, 0.0
    for sequence in sequences:
        tokens, start = sequence.tokens, 0
        pairs = zip(_logits(baseline, tokens), _logits(variant, tokens), strict=True)
        for mine, other in pairs:
            rows = slice(max(0, sequence.num_context - 1 - start), None)
            p, q = _log_softmax(mine[rows]), _log_softmax(other[rows])
            end = start + len(mine)
            targets = np.array(tokens[end - len(p) + 1 : end + 1], np.int64)
            p, q = p[: len(targets)], q[: len(targets)]
            each = np.arange(len(targets))
            kls.append((np.exp(p) * (p - q)).sum(axis=-1))
            agree += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
            nll -= float(q[each, targets].sum())
            baseline_nll -= float(p[each, targets].sum())
            start = end
    every = np.concatenate(kls)
    return Quality(
        variant=name,
        num_positions=len(every),
        weight_bytes=variant.weight_bytes,
        kv_bytes_per_token=variant.kv_memory_bytes // (variant.num_blocks * variant.block_size),
        mean_kl=float(every.mean()),
        p99_kl=float(np.quantile(every, 0.99)),
        top1_agreement=agree / len(every),
        nll=nll / len(every),
        baseline_nll=baseline_nll / len(every),
    )


def _logits(model: LoadedModel, tokens: Sequence[int]) -> Iterator[FloatArray]:
    """Logits after every token, chunk by chunk: positions after the first read the KV cache."""
    backend = model.runner.backend
    num_blocks = -(-len(tokens) // BLOCK_SIZE)
    kv = backend.allocate_kv(num_blocks, BLOCK_SIZE, model.kv_dtype)
    rows, table = (SamplingInput(SamplingParams(), 0, 0),), tuple(range(num_blocks))
    for start in range(0, len(tokens), CHUNK):
        chunk = tuple(tokens[start : start + CHUNK])
        request = ScheduledRequest("q", chunk, start, table, rows, chunk[1:])
        step, _ = build_step_arrays(ScheduledBatch((request,)), BLOCK_SIZE)
        yield backend.run(step, kv)


def _log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _sequences(options: argparse.Namespace, vocab_size: int) -> Iterator[Tokens]:
    if options.worlds:
        yield from _questions(options)
        return
    if options.text is None:
        random = np.random.default_rng(0)
        tokens = random.integers(0, vocab_size, options.num_tokens).tolist()
    else:
        codec = load_tokenizer(options.model, eos_token_ids=set())
        tokens = list(codec.encode(options.text.read_text()))[: options.num_tokens]
    for start in range(0, len(tokens), options.context):
        if len(tokens) - start > 1:
            yield Tokens(tokens[start : start + options.context])


def _questions(options: argparse.Namespace) -> Iterator[Tokens]:
    """Whole conversations of up to `--context` tokens, until there are `--num-tokens`."""
    codec, left = load_tokenizer(options.model, eos_token_ids=set()), options.num_tokens
    for item in draw_items(EvalPlan(num_questions=1000)):
        text = codec.render_chat(item.messages(with_documents=True), add_generation_prompt=True)
        prompt = list(codec.encode(text, add_special_tokens=False))
        answer = list(codec.encode(f" {item.question.full_answer}", add_special_tokens=False))
        if len(prompt) + len(answer) > options.context:
            continue
        yield Tokens(prompt + answer, len(prompt))
        left -= len(prompt + answer)
        if left <= 0:
            return


def _table(results: Sequence[Quality]) -> str:
    header = ("variant", "weights MB", "KV B/token", "KL", "p99", "top-1", "nll", "whole nll")
    rows = [
        (
            r.variant,
            f"{r.weight_bytes / 1e6:.0f}",
            str(r.kv_bytes_per_token),
            f"{r.mean_kl:.5f}",
            f"{r.p99_kl:.4f}",
            f"{r.top1_agreement:.1%}",
            f"{r.nll:.4f}",
            f"{r.baseline_nll:.4f}",
        )
        for r in results
    ]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
