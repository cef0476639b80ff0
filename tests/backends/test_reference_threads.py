"""The number of threads does not change an answer: OpenBLAS cuts long products by thread.

Run as a program, this file prints a digest of one step's logits.
"""

import hashlib
import os
import subprocess
import sys
from threading import Event, Thread

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from duetto.backends.backend import StepArrays
from duetto.backends.reference import ReferenceBackend
from duetto.backends.reference.one_thread import one_blas_thread
from duetto.program.ops import Attention, Embed, Linear, Ref, SelectRows, WriteKV
from duetto.program.program import KVSpec, Program, WeightSpec

# 577 by 1001 is cut between threads where it is no multiple of a kernel's width; so is attention
# of 8 heads that share their keys over 4000 tokens. Both differed.
HIDDEN, VOCAB_SIZE = 577, 1001
NUM_KV_HEADS, GROUP, HEAD_DIM, NUM_TOKENS = 2, 8, 64, 4000
BLOCK_SIZE = 32


def weight(*shape: int) -> WeightSpec:
    return WeightSpec(shape, ("t",), (shape[0],))


def program() -> Program:
    """Two widths of product around one attention, by hand."""
    heads_width, kv_width = NUM_KV_HEADS * GROUP * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    buffers = {
        "hidden": HIDDEN,
        "qkv": heads_width + 2 * kv_width,
        "attended": heads_width,
        "selected": HIDDEN,
        "logits": VOCAB_SIZE,
    }
    ref = {name: Ref(name, 0, width) for name, width in buffers.items()}
    qkv = ref["qkv"]
    k, v = qkv.columns(heads_width, kv_width), qkv.columns(heads_width + kv_width, kv_width)
    attention = Attention(
        q=qkv.columns(0, heads_width),
        out=ref["attended"],
        layer=0,
        num_heads=NUM_KV_HEADS * GROUP,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        scale=HEAD_DIM**-0.5,
    )
    return Program(
        ops=(
            Embed(ref["hidden"], "embedding"),
            Linear(ref["hidden"], qkv, "qkv"),
            WriteKV(k, v, 0),
            attention,
            Linear(ref["attended"], ref["hidden"], "output", accumulate=True),
            SelectRows(ref["hidden"], ref["selected"]),
            Linear(ref["selected"], ref["logits"], "head"),
        ),
        weights={
            "embedding": weight(VOCAB_SIZE, HIDDEN),
            "qkv": weight(qkv.width, HIDDEN),
            "output": weight(HIDDEN, heads_width),
            "head": weight(VOCAB_SIZE, HIDDEN),
        },
        buffers=buffers,
        kv=(KVSpec(NUM_KV_HEADS, HEAD_DIM),),
        logits=ref["logits"],
        max_model_len=NUM_TOKENS,
    )


def digest() -> str:
    """Of the logits of a request's 4000th token, whose KV before it is drawn at random."""
    random = np.random.RandomState(0)
    model = program()
    weights = {
        name: random.standard_normal(spec.shape).astype(np.float32) / np.sqrt(spec.shape[-1])
        for name, spec in model.weights.items()
    }
    backend = ReferenceBackend(model, weights)
    num_blocks = NUM_TOKENS // BLOCK_SIZE
    kv = backend.allocate_kv(num_blocks, BLOCK_SIZE, "float32")
    for rows in (*kv.keys, *kv.values):
        rows.numbers[:] = random.standard_normal(rows.numbers.shape)
    last = np.array([NUM_TOKENS - 1], np.int32)
    step = StepArrays(
        token_ids=np.array([7], np.int32),
        positions=last,
        slots=last,
        query_starts=np.array([0, 1], np.int32),
        context_lens=last + 1,
        block_tables=np.arange(num_blocks, dtype=np.int32)[None],
        logit_rows=np.array([0], np.int32),
    )
    return hashlib.sha256(backend.run(step, kv).tobytes()).hexdigest()


def digest_with_threads(num_threads: int) -> str:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": str(num_threads)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="BLAS takes no second thread on one core")
def test_one_thread_or_two() -> None:
    assert digest_with_threads(1) == digest_with_threads(2)


def test_the_process_keeps_its_threads() -> None:
    blas = ThreadpoolController().select(user_api="blas")
    with blas.limit(limits=2):
        before = [library["num_threads"] for library in blas.info()]
        digest()
        assert [library["num_threads"] for library in blas.info()] == before


def test_one_step_at_a_time_changes_the_number() -> None:
    has_begun = Event()

    def compute() -> None:
        with one_blas_thread():
            has_begun.set()

    other = Thread(target=compute)
    with one_blas_thread():
        other.start()
        assert not has_begun.wait(0.05)
    assert has_begun.wait(10)
    other.join()


if __name__ == "__main__":
    print(digest())
