"""List what is longer than the house allows, with tokens per line so that width hides nothing.

Above a limit is allowed where the reason is good; this only shows where to look.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

LIMITS = {"function": 40, "class": 200, "file": 400}
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def tokens_per_line(text: str) -> float:
    lines = [line for line in text.splitlines() if line.strip()]
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    return sum(t.type not in SKIPPED for t in tokens) / max(1, len(lines))


def long_parts(path: Path) -> list[tuple[str, int, str]]:
    text = path.read_text()
    found = []
    if (length := text.count("\n")) > LIMITS["file"]:
        found.append(("file", length, str(path)))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kind = "function"
        elif isinstance(node, ast.ClassDef):
            kind = "class"
        else:
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > LIMITS[kind]:
            found.append((kind, length, f"{path}:{node.lineno} {node.name}"))
    return found


def main() -> None:
    paths = [
        p for root in ("src", "tools", "benchmarks", "examples") for p in Path(root).rglob("*.py")
    ]
    total = 0
    for path in sorted(paths):
        total += path.read_text().count("\n")
    rows = sorted((row for path in paths for row in long_parts(path)), reverse=True)
    for kind, length, where in rows:
        print(f"{kind:9}{length:5} lines  {where}")
    widest = sorted(((tokens_per_line(p.read_text()), p) for p in paths), reverse=True)[:5]
    for width, path in widest:
        print(f"{width:9.1f} tokens per line  {path}")
    print(f"{len(rows)} above the limits {LIMITS}; {len(paths)} files, {total} lines")
    sys.exit(0)


if __name__ == "__main__":
    main()
