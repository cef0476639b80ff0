#!/bin/sh
# Every client beside this file, each in an environment of its own (.demo/clients), against a server
# of the demo model with a template that takes tools. Needs the registries; npm only if it is there.
#     run.sh [NAME ...]        default: all, e.g. `run.sh openai node`
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$root/.demo/clients
port=${PORT:-8471}
url=http://127.0.0.1:$port
mkdir -p "$work"

packages() {
    case $1 in
    openai) echo openai ;;
    anthropic) echo anthropic ;;
    langchain) echo langchain-openai ;;
    langchain_anthropic) echo langchain-anthropic ;;
    pydantic_ai) echo "pydantic-ai-slim[openai,anthropic]" ;;
    openai_agents) echo openai-agents ;;
    instructor) echo "instructor anthropic" ;;
    inspect) echo "inspect-ai openai" ;;
    litellm) echo litellm ;;
    llama_index) echo llama-index-llms-openai-like ;;
    *) echo "no such client: $1" >&2; return 1 ;;
    esac
}

"$root/.venv/bin/duetto" serve duetto-demo --port "$port" \
    --chat-template "$here/template.jinja" >"$work/serve.log" 2>&1 &
server=$!
trap 'kill $server' EXIT
"$root/.venv/bin/python" - "$url" <<'PY' || { cat "$work/serve.log"; exit 1; }
import sys, time, urllib.request
for _ in range(120):
    try:
        urllib.request.urlopen(sys.argv[1] + "/health")
        break
    except OSError:
        time.sleep(0.5)
else:
    raise SystemExit("the server did not start")
PY

failed=0
[ $# -gt 0 ] || set -- openai anthropic langchain langchain_anthropic pydantic_ai openai_agents instructor inspect litellm \
    llama_index node
for name in "$@"; do
    if [ "$name" = node ]; then
        command -v npm >/dev/null || { echo "node: skipped, no npm"; continue; }
        mkdir -p "$work/node" && cd "$work/node" || exit 1
        npm install --silent --no-audit --no-fund --prefix . \
            openai ai @ai-sdk/openai @ai-sdk/openai-compatible zod || { failed=1; continue; }
        node "$here/node.mjs" "$url" || failed=1
        continue
    fi
    wanted=$(packages "$name") || exit 2
    venv=$work/$name
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    # shellcheck disable=SC2086  # several packages are several words
    "$venv/bin/pip" install --quiet --disable-pip-version-check --upgrade $wanted || { failed=1; continue; }
    "$venv/bin/python" "$here/with_$name.py" "$url" || failed=1
done
exit $failed
