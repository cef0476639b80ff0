"""Prefill elsewhere against prefill at home, on one machine: time to the first token, what of a
transfer is seen after the prefill, and the gaps of an answer beside it.

Two engines in one process, each computing on one thread, a link of shared memory or TCP between
them. Remote and local prompts take turns, so that both see the same machine.

    python -m benchmarks.cluster.disaggregation --model DIR [--tokens 1024] [--rounds 9] [--json F]
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from threading import Condition
from time import perf_counter

from duetto import __version__
from duetto.build import Built, build
from duetto.cluster.disaggregation.attach import LinkOptions, WithRole
from duetto.core.batch import RequestUpdate
from duetto.core.engine_args import EngineArgs
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.engine.engine import StepReport
from duetto.worker_facts import engine_of_role, facts_of

PATIENCE_S = 300.0


class Heard:
    """When each token of a request came."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.ended: dict[str, RequestUpdate] = {}
        self._changed = Condition()

    def deliver(self, report: StepReport) -> None:
        now = perf_counter()
        with self._changed:
            for update in report.updates:
                self.times.setdefault(update.request_id, []).extend([now] * len(update.tokens))
                if update.finish_reason is not None:
                    self.ended[update.request_id] = update
            self._changed.notify_all()

    def wait(self, request_id: str, num_tokens: int = 0) -> None:
        def is_there() -> bool:
            if num_tokens:
                return len(self.times.get(request_id, ())) >= num_tokens
            return request_id in self.ended

        with self._changed:
            assert self._changed.wait_for(is_there, PATIENCE_S), f"{request_id} never ended"


class Pair:
    """An engine that decodes, and one that prefills for it."""

    def __init__(self, model: str, link: str, max_model_len: int) -> None:
        args = EngineArgs(threads=1, max_model_len=max_model_len, kv_cache_memory_bytes=2**28)
        self.built = build(model, args)
        self.decode = self._with_role(self.built, "decode", link)
        self.prefill = self._with_role(build(model, args), "prefill", link)
        self.heard = Heard()
        self.handle = self.decode.open_engine(self.heard.deliver)
        self._other = self.prefill.open_engine(lambda _: None)
        self.handle.start()
        self._other.start()

    def _with_role(self, built: Built, role: str, link: str) -> WithRole:
        facts = facts_of(built, __version__, role)  # type: ignore[arg-type]
        return engine_of_role(built, facts, 0, LinkOptions(link))

    def request(self, name: str, num_tokens: int, max_tokens: int, *, is_remote: bool) -> Request:
        rng = Random(name)
        vocab = self.built.codec.vocab_size
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return Request(
            request_id=name,
            prompt_token_ids=tuple([rng.randrange(vocab) for _ in range(num_tokens)]),
            sampling=sampling,
            max_tokens=max_tokens,
            seed=0,
            prefill_at=(self.prefill.facts.link,) if is_remote else (),
        )

    def ttft_s(self, name: str, num_tokens: int, *, is_remote: bool) -> float:
        request = self.request(name, num_tokens, 2, is_remote=is_remote)
        start = perf_counter()
        self.handle.add(request)
        self.heard.wait(name)
        return self.heard.times[name][0] - start

    def beside_s(self, name: str, num_tokens: int, *, is_remote: bool) -> tuple[float, float]:
        """The largest gap of an answer beside a prompt that comes, and that one's TTFT."""
        stream = f"{name}-stream"
        self.handle.add(self.request(stream, 16, 4096, is_remote=False))
        self.heard.wait(stream, 8)
        first = len(self.heard.times[stream])
        ttft_s = self.ttft_s(name, num_tokens, is_remote=is_remote)
        times = self.heard.times[stream][first - 1 :]
        self.handle.abort(stream)
        self.heard.wait(stream)
        return max(b - a for a, b in pairwise(times)), ttft_s

    def close(self) -> None:
        for handle in (self.handle, self._other):
            handle.stop(PATIENCE_S)
        self.decode.close()
        self.prefill.close()


def measure(model: str, link: str, num_tokens: int, num_rounds: int) -> dict[str, object]:
    pair = Pair(model, link, num_tokens + 4200)
    ttft: dict[bool, list[float]] = {True: [], False: []}
    gaps: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    pair.ttft_s("warm-up", num_tokens, is_remote=True)
    pair.ttft_s("warm-up-too", num_tokens, is_remote=False)
    counts = pair.prefill.side.counts  # type: ignore[union-attr]
    was = counts.exposed_s, counts.num_exported
    for number in range(num_rounds):
        for is_remote in (True, False):
            name = f"{number}-{is_remote}"
            ttft[is_remote].append(pair.ttft_s(name, num_tokens, is_remote=is_remote))
    num_exported = counts.num_exported - was[1]
    exposed_s = (counts.exposed_s - was[0]) / max(1, num_exported)
    for number in range(max(1, num_rounds // 3)):
        for is_remote in (True, False):
            name = f"beside-{number}-{is_remote}"
            gaps[is_remote].append(pair.beside_s(name, num_tokens, is_remote=is_remote))
    num_layers = len(pair.built.model.program.kv)
    found = {
        "link": link,
        "prompt_tokens": num_tokens,
        "bytes": counts.num_bytes_out // max(1, counts.num_exported),
        "remote": num_exported,
        "ttft_remote_s": median(ttft[True]),
        "ttft_local_s": median(ttft[False]),
        "exposed_s": exposed_s,
        "layer_s": median(ttft[False]) / num_layers,
        "largest_gap_remote_s": median([gap for gap, _ in gaps[True]]),
        "largest_gap_local_s": median([gap for gap, _ in gaps[False]]),
        "ttft_beside_remote_s": median([seconds for _, seconds in gaps[True]]),
        "ttft_beside_local_s": median([seconds for _, seconds in gaps[False]]),
    }
    pair.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [
        measure(options.model, link, options.tokens, options.rounds)
        for link in ("shm://*", "tcp://127.0.0.1:*")
    ]
    text = json.dumps(found, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
