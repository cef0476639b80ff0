#!/bin/sh
# Every client beside this file, each in an environment of its own (.demo/clients), against a server
# of the demo model with a template that takes tools. Needs the registries; npm only if it is there.
#     run.sh [NAME ...]        default: all, e.g. `run.sh openai node`
#     run.sh peers             tests of other servers, by name; writes docs/peers-tests.md
# With RECORD=1 what they send is written to tests/clients/transcripts (see record.py).
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$root/.demo/clients
port=${PORT:-8471}
url=http://127.0.0.1:$port
mkdir -p "$work/model"

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
    lm_eval) echo "lm-eval[api] transformers" ;;
    gptme) echo gptme ;;
    guidellm) echo "torch==2.13.0 guidellm" ;; # the newest torch brings gigabytes of CUDA
    aiperf) echo aiperf ;;
    aider) echo aider-chat ;;
    *) echo "no such client: $1" >&2; return 1 ;;
    esac
}

# Agents' prompts are longer than what the demo model was made for.
cp "$root"/src/duetto/demo/duetto-demo/* "$work/model"
sed -i 's/"max_position_embeddings": [0-9]*/"max_position_embeddings": 32768/' "$work/model/config.json"
"$root/.venv/bin/duetto" serve "$work/model" --served-model-name duetto-demo --port "$port" \
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

run_client() {
    name=$1
    if [ "$name" = peers ]; then
        "$root/.venv/bin/python" "$here/peers.py" "$target" --write "$root/docs/peers-tests.md"
        return
    fi
    if [ "$name" = node ]; then
        command -v npm >/dev/null || { echo "node: skipped, no npm"; return 0; }
        mkdir -p "$work/node"
        npm install --silent --no-audit --no-fund --prefix "$work/node" \
            openai ai @ai-sdk/openai @ai-sdk/openai-compatible zod || return 1
        (cd "$work/node" && node "$here/node.mjs" "$target")
        return
    fi
    wanted=$(packages "$name") || exit 2
    venv=$work/$name
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    # shellcheck disable=SC2086  # several packages are several words
    "$venv/bin/pip" install --quiet --disable-pip-version-check --upgrade $wanted || return 1
    "$venv/bin/python" "$here/with_$name.py" "$target"
}

failed=0
[ $# -gt 0 ] || set -- openai anthropic langchain langchain_anthropic pydantic_ai openai_agents instructor inspect litellm \
    llama_index lm_eval gptme guidellm aiperf aider node
for name in "$@"; do
    target=$url
    if [ -n "${RECORD:-}" ]; then
        mkdir -p "$here/transcripts"
        "$root/.venv/bin/python" "$here/record.py" "$url" $((port + 1)) "$here/transcripts/$name.json" &
        recorder=$!
        target=http://127.0.0.1:$((port + 1))
    fi
    run_client "$name" || failed=1
    if [ -n "${RECORD:-}" ]; then
        kill "$recorder"
        wait "$recorder"
    fi
done
exit $failed
