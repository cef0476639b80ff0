"""The device's sampler gives the very token of runner/sampler.py: numpy's, the native one's."""

import math

import numpy as np
import pytest
import torch
from kernels.device import DEVICE

from duetto.backends.cuda.kernels.sampler import SampleTensors, make_scratch, sample
from duetto.backends.cuda.kernels.sampler_twin import sample_in_torch
from duetto.core.batch import SamplingInput
from duetto.core.errors import EngineError
from duetto.core.sampling_params import SamplingParams
from duetto.runner import gumbel
from duetto.runner.sampler import sample_token

# Numpy warns, under the interpreter: of -inf - -inf, of what is too large, of loops up to a tensor.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

NOT_FINITE = -1
CHUNK = 256  # of these tests: most rows are several
LIST = 32  # more tokens than these are gathered by no row
SMALLEST, LARGEST = 5e-324, 100.0


def params_of(rng: np.random.Generator) -> SamplingParams:
    """All combinations, edges among them."""

    def pick(*values):
        return values[rng.integers(len(values))]

    return SamplingParams(
        temperature=pick(0.0, 1.0, 1.0, 0.7, 0.3, 1e-3, 1e-31, SMALLEST, LARGEST),
        top_k=pick(0, 0, -1, 1, 2, 3, 20, 50, 2**20),
        top_p=pick(1.0, 1.0, 0.9, 0.5, 1 - 2**-53, 1e-300, 0.999999),
        min_p=pick(0.0, 0.0, 0.05, 1.0, 1e-300),
    )


def row_of(rng: np.random.Generator, size: int) -> np.ndarray:
    """Logits as they are, and as they should not be."""
    row = rng.normal(size=size).astype(np.float32) * np.float32(3)
    match rng.integers(10):
        case 0:  # many equal
            row = np.round(row)
        case 1:  # all equal
            row[:] = 1.25
        case 2:
            row[rng.random(size) < 0.9] = -np.inf
        case 3:  # one is left
            row[np.arange(size) != rng.integers(size)] = -np.inf
        case 4:  # both zeros, nothing above them
            row = np.where(rng.random(size) < 0.5, np.float32(0.0), np.float32(-0.0))
            row[rng.random(size) < 0.3] = -4
        case 5:  # far apart
            row *= np.float32(1e30)
        case 6:  # too close for fp32's normal numbers
            row *= np.float32(1e-42)
        case 7:
            row[rng.integers(size)] = rng.choice(np.float32([np.nan, np.inf, -np.inf]))
        case 8:
            row[:] = -np.inf
            row[rng.integers(size)] = rng.choice(np.float32([np.nan, -np.inf, 3.0]))
    return row


def expected(row: np.ndarray, params: SamplingParams, seed: int, place: int) -> int:
    try:
        return sample_token(row, SamplingInput(params, seed, place)).token_id
    except EngineError:
        return NOT_FINITE


def tensors_of(params: list[SamplingParams], seeds: list[int]) -> SampleTensors:
    keys = [gumbel.key_of(seed, place) for place, seed in enumerate(seeds)]
    gaps = [p.temperature * math.log(p.min_p) if p.min_p else -math.inf for p in params]
    return SampleTensors(
        torch.tensor([p.temperature for p in params], dtype=torch.float64),
        torch.from_numpy(np.array(keys, np.uint64).view(np.int64)),
        torch.tensor([max(0, p.top_k) for p in params], dtype=torch.int32),
        torch.tensor([p.top_p for p in params], dtype=torch.float64),
        torch.tensor(gaps, dtype=torch.float64),
    )


def rows_of(seed: int, num_rows: int, size: int):
    rng = np.random.default_rng(seed)
    params = [params_of(rng) for _ in range(num_rows)]
    logits = np.stack([row_of(rng, size) for _ in range(num_rows)])
    seeds = [int(rng.integers(2**62)) for _ in range(num_rows)]
    wanted = [
        expected(*row, place) for place, row in enumerate(zip(logits, params, seeds, strict=True))
    ]
    return logits, tensors_of(params, seeds), wanted, params


def sampled(sample, logits: np.ndarray, rows: SampleTensors, chunk: int = CHUNK) -> list[int]:
    out = torch.full((len(logits),), -7, dtype=torch.int32)
    scratch = make_scratch(len(logits) + 1, logits.shape[1], DEVICE, chunk, LIST)
    for tensor in scratch[1:]:
        tensor.fill_(17)  # of an earlier step
    sample(torch.from_numpy(logits), rows, scratch, out)
    return out.tolist()


@pytest.mark.parametrize("size", [1, 7, 100, 1000, 5000])
def test_the_twin_gives_the_samplers_tokens(size):
    for seed in range(3):
        logits, rows, wanted, params = rows_of(seed, 120, size)
        found = sampled(sample_in_torch, logits, rows)
        assert found == wanted, [p for p, f, w in zip(params, found, wanted, strict=True) if f != w]
        assert NOT_FINITE in wanted


@pytest.mark.parametrize(
    ("size", "num_rows", "chunk"), [(7, 40, 8), (100, 30, 64), (1000, 30, 1024), (5000, 6, 4096)]
)
def test_the_kernel_gives_the_samplers_tokens(size, num_rows, chunk):
    logits, rows, wanted, params = rows_of(size, num_rows, size)
    found = sampled(sample, logits, rows, chunk)
    assert found == wanted, [p for p, f, w in zip(params, found, wanted, strict=True) if f != w]


@pytest.mark.parametrize("sample", [sample, sample_in_torch])
def test_numpys_own_sampler_too(sample, monkeypatch):
    """Without the native module."""
    monkeypatch.setattr(gumbel, "HAS_NATIVE", False)
    logits, rows, wanted, _ = rows_of(3, 6, 300)
    assert sampled(sample, logits, rows, 128) == wanted


@pytest.mark.parametrize("sample", [sample, sample_in_torch])
def test_a_nucleus_that_most_draws_miss(sample):
    """Flat logits, and few that may be drawn: each draw is behind, and limits the next."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, 500)).astype(np.float32) * np.float32(0.01)
    params = [SamplingParams(temperature=2.0, top_p=p) for p in (0.004, 0.01, 0.05)] * 2
    wanted = [expected(row, params[i], 5, i) for i, row in enumerate(logits)]
    assert sampled(sample, logits, tensors_of(params, [5] * 6)) == wanted


def test_draws_that_fp32_cannot_tell_apart():
    """Of each chunk the two likeliest are as good as equal, and equal to the bit."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(8, 700)).astype(np.float32)
    params = [SamplingParams(temperature=1.0)] * 8
    for place, row in enumerate(logits):
        noise = gumbel.noise(gumbel.key_of(place, place), np.arange(700))
        row[:] = -30 - noise
        row[rng.random(700) < 0.5] -= np.float32(1e-5)
    wanted = [expected(row, params[i], i, i) for i, row in enumerate(logits)]
    assert sampled(sample, logits, tensors_of(params, list(range(8)))) == wanted


def test_a_rows_token_depends_on_no_other_row():
    logits, rows, wanted, _ = rows_of(11, 4, 300)
    for place in range(4):
        own = SampleTensors(*[tensor[place : place + 1] for tensor in rows])
        assert sampled(sample, logits[place : place + 1], own) == wanted[place : place + 1]
