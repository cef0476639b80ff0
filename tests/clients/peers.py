"""Other servers' tests, by name, against ours: which apply, which pass, and the share.

    python tests/clients/peers.py URL [--write docs/peers-tests.md]

The exit code is 1 if one fails that is not known to. See peers_suite.py.
"""

import sys
from pathlib import Path

import peers_llama_cpp
import peers_open_responses
import peers_vllm
from peers_suite import Entry, Server, Suite

HEAD = """# Tests of other servers, by name

Which of vLLM's and llama.cpp's tests of their APIs, and of the Open Responses compliance tests,
apply to this server, and which pass. The checks are ours (`tests/clients/peers_*.py`), one for each
of their names: same routes, same kinds of requests, same expectations, but none of their text. What
a model says is not compared, since theirs are others. `run.sh peers` runs them against
the demo model and writes this page. A reason beside *fails* means that it is known.
"""


def section(suite: Suite, results: list[tuple[Entry, str]]) -> str:
    applied = [result for _, result in results if result != "–"]
    passed = applied.count("passes")
    lines = [
        f"\n## {suite.title}: {passed} of {len(applied)} that apply "
        f"({100 * passed / len(applied):.0f} %)\n",
        f"`{suite.folder}`, {suite.dated}.\n",
        "| file | test | result | |",
        "|---|---|---|---|",
    ]
    for entry, result in results:
        note = entry.why if result != "passes" else ""
        lines.append(f"| {entry.file} | `{entry.name}` | {result} | {note} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    url, *more = sys.argv[1:]
    page, surprises = HEAD, 0
    for module in (peers_vllm, peers_llama_cpp, peers_open_responses):
        suite = module.suite
        results = suite.run(Server(url))
        part = section(suite, results)
        page += part
        print(part.splitlines()[1].removeprefix("## "))
        for entry, result in results:
            if result != "–" and (result == "fails") != bool(entry.why):
                surprises += 1
                print(f"  {entry.file}::{entry.name} {result}, which was not expected")
    if more[:1] == ["--write"]:
        Path(more[1]).write_text(page)
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
