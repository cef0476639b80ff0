"""What reuse of documents' KV gives, and what it costs in quality.

    python benchmarks/reuse.py
    python benchmarks/reuse.py --parts ttft --quantization none
    python benchmarks/reuse.py --parts quality --questions 2000
    python benchmarks/reuse.py --parts longer --questions 200 --model READER
    python benchmarks/reuse.py --smoke

Parts:

    ttft     documents warmed one by one, then asked about in another order: time to first token
    quality  the demo reader's answers to held-out questions, by choice and by share computed
    restart  documents and questions, asked again after a restart, with KV on a disk
    longer   quality where documents have more sentences, most of them beside the point; only if it
             is named, since it takes a reader that has learned to read them (training.train
             --longer)

In `ttft` a full prefill and all choices are measured in each round, over one model in memory; the
full prefill goes on between the others' steps, so that a slow moment of the machine meets it too.
The first round is not counted. What each part found is kept in a JSON file beside the page, and the
page is written from all that is there, so parts may be run one by one. The last line of stdout is
one JSON document.
"""

import argparse
import json
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from in_process import machine, today
from reuse_longer import longer
from reuse_page import write_page
from reuse_quality import quality
from reuse_restart import restart
from reusing import Choice, Prompt, Running, check_found, new_engine, other_runner
from speculating import directory_of

from duetto.build import Built, build
from duetto.core.engine_args import EngineArgs
from duetto.demo import demo_model_dir
from duetto.engine.engine import Engine

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "reuse.md"
PARTS = ("ttft", "quality", "restart")
Json = dict[str, Any]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "longer"), default=list(PARTS))
    parser.add_argument("--shape", default="llama-3.2-1b", help="a shape, or a checkpoint")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="int8")
    parser.add_argument("--rounds", type=int, default=6, help="of ttft; the first does not count")
    parser.add_argument("--num-documents", type=int, default=6)
    parser.add_argument("--document-len", type=int, default=512, help="tokens")
    parser.add_argument("--question-len", type=int, default=32, help="tokens")
    parser.add_argument("--ratio", type=float, default=0.15, help="of ttft's hkvd and query")
    parser.add_argument("--num-first", type=int, default=16, help="of ttft's first")
    parser.add_argument(
        "--questions", type=int, default=2000, help="of quality; of longer: of each kind"
    )
    parser.add_argument("--sentences", type=int, nargs="+", default=[1, 2, 4], help="of longer")
    parser.add_argument("--model", type=Path, help="of longer; by default the demo reader")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5]
    )
    parser.add_argument(
        "--query-rounds", type=int, nargs="+", default=[1, 2, 3], help="of quality's query"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model, and little of each")
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    if options.smoke:
        options.shape, options.rounds, options.questions = "tiny", 2, 6
        options.num_documents, options.document_len, options.question_len = 3, 64, 8
        options.ratios, options.query_rounds = [0.15, 0.5], [1, 2]
    if options.rounds < 2 or options.num_documents < 2:
        parser.error("--rounds and --num-documents: must be 2 or more")
    return options


def main() -> None:
    options, where = parse_options(), machine()
    kept = options.output.with_suffix(".json")
    found: Json = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    results: Json = {}
    if "ttft" in options.parts:
        results |= ttft(options)
    if "quality" in options.parts:
        results["quality"] = quality(options.questions, options.ratios, options.query_rounds)
    if "longer" in options.parts:
        model = options.model or demo_model_dir()
        results["longer"] = longer(model, options.questions, options.ratios, options.sentences)
    if "restart" in options.parts:
        result = restart(
            options.shape,
            options.quantization,
            num_prompts=options.num_documents,
            document_len=options.document_len,
            question_len=options.question_len,
        )
        results[f"restart, {result['model']}, {options.quantization}"] = result
    for key, result in results.items():
        found[key] = {"machine": where, "date": today(), **result}
    kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_page(found, options.output)
    print(f"wrote {options.output.name}")
    print(json.dumps({"benchmark": "reuse", "date": today(), "machine": where, **results}))


def ttft(options: argparse.Namespace) -> Json:
    """Full prefill, the prefix cache and each choice, on a random model of some size."""
    length = options.num_documents * options.document_len + options.question_len
    with directory_of(options.shape) as path:
        args = EngineArgs(
            quantization=options.quantization,
            max_model_len=length + 8,
            max_num_seqs=2,
            kv_cache_memory_bytes=(4 << 20) if options.smoke else (1 << 30),
        )
        built = build(path, args)
        loaded = built.model
        about = {
            "model": path.name,
            "parameters": loaded.program.num_parameters,
            "quantization": options.quantization,
            "dtype": loaded.dtype,
            "kv_dtype": loaded.kv_dtype,
            "backend": loaded.backend,
            "num_layers": len(loaded.program.kv),
            "num_documents": options.num_documents,
            "document_len": options.document_len,
            "question_len": options.question_len,
        }
        measured = Ttft(built, args, options)
        rows = measured.rows([measured.round(number) for number in range(options.rounds)])
    return {f"ttft, {about['model']}, {options.quantization}": about | {"rows": rows}}


class Ttft:
    """Rounds in which each choice answers one prompt, and a full prefill goes on beside them."""

    def __init__(self, built: Built, args: EngineArgs, options: argparse.Namespace) -> None:
        self._options = options
        self._rng = random.Random(0)
        self._vocab_size = built.model.program.vocab_size
        self._num_layers = len(built.model.program.kv)
        self._documents = [self._tokens(options.document_len) for _ in range(options.num_documents)]
        # Two that begin with the same two documents would share more than the prefix of one.
        self._orders = self._new_orders()
        self._full = new_engine(built, args, other_runner(built.model), enable_prefix_caching=False)
        self._engine = new_engine(built, args)
        self._choices = self._all_choices()
        self._share = 1.0  # of a full prefill's time in that of all the others together
        for number, document in enumerate(self._documents):
            Running(self._engine, Prompt.of([], document).request(f"w{number}", Choice())).run()

    def _all_choices(self) -> list[Choice]:
        ratio = self._options.ratio
        return [
            Choice(),
            Choice(method="none"),
            Choice(method="first", num_first=self._options.num_first),
            Choice(method="hkvd", ratio=ratio),
            Choice(method="query", ratio=ratio),
        ]

    def round(self, number: int) -> Mapping[str, Running]:
        """Each choice once; not always the same one first."""
        order = next(self._orders)
        question = self._tokens(self._options.question_len)
        prompt = Prompt.of([self._documents[place] for place in order], question)
        full = Running(self._full, prompt.request("full", Choice()))
        found = {"full prefill": full}
        first = number % len(self._choices)
        for choice in self._choices[first:] + self._choices[:first]:
            found[choice.name] = self._beside(
                full, self._engine, prompt, choice, sum(r.seconds for r in [*found.values()][1:])
            )
        full.run()
        self._share = full.seconds / sum(r.seconds for r in found.values() if r is not full)
        return found

    def _beside(
        self, full: Running, engine: Engine, prompt: Prompt, choice: Choice, before_s: float
    ) -> Running:
        """The choice's run, between whose steps the full prefill goes on as far as it should be."""
        running = Running(engine, prompt.request(choice.name, choice))
        while running.has_work:
            while full.has_work and full.seconds < self._share * (before_s + running.seconds):
                full.step()
            running.step()
        check_found(running.request)
        return running

    def rows(self, rounds: Sequence[Mapping[str, Running]]) -> list[Json]:
        """Without the first round, in which nothing has been touched and no time is known."""
        counted = rounds[1:]
        ratios = {choice.name: choice.ratio for choice in self._choices}
        full = [each["full prefill"].seconds for each in counted]
        cached = [each[Choice().name].seconds for each in counted]
        rows = []
        for name in ("full prefill", *ratios):
            seconds = [each[name].seconds for each in counted]
            speedups = [f / s for f, s in zip(full, seconds, strict=True)]
            ratio = ratios.get(name)
            row: Json = {
                "name": name,
                "ratio": ratio,
                "num_tokens": statistics.median(each[name].num_tokens for each in counted),
                "ttft_s": statistics.median(seconds),
                "ttfts_s": seconds,
                "speedup": statistics.median(speedups),
                "lowest": min(speedups),
                "of_prefix_cache": statistics.median(
                    c / s for c, s in zip(cached, seconds, strict=True)
                ),
            }
            if ratio is not None:
                row["ceiling"] = ceiling(ratio, self._num_layers)
                row["fraction"] = row["speedup"] / row["ceiling"]
            rows.append(row)
        return rows

    def _new_orders(self) -> Iterator[Sequence[int]]:
        """Orders of the documents, none of which begins with the same two as one before it, nor as
        they were warmed."""
        number = self._options.num_documents
        begun = {(0, 1)}
        while True:
            order = self._rng.sample(range(number), number)
            if (order[0], order[1]) not in begun:
                begun.add((order[0], order[1]))
                yield order
            elif len(begun) == number * (number - 1):
                raise RuntimeError(f"{len(begun)} rounds are the most for {number} documents")

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(self._vocab_size) for _ in range(count)]


def ceiling(ratio: float, num_layers: int) -> float:
    """Times full prefill, if all tokens go through one layer and a share of them through the
    others, and nothing else takes time: 1 / ((1 + r (L - 1)) / L)."""
    return num_layers / (1 + ratio * (num_layers - 1))


if __name__ == "__main__":
    main()
