"""A template costs no more than its budget, whatever it does, and the next chat is answered."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from time import process_time

import pytest

from duetto.checkpoints import chat_template, template_process
from duetto.checkpoints.chat_template import ChatTemplate
from duetto.checkpoints.template_process import MAX_BYTES, TemplateProcesses
from duetto.core.errors import CheckpointError, InvalidRequest

FILE = Path("model/chat_template.jinja")
USER = {"role": "user", "content": "Hello"}
DOUBLING = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
)
DEEP = "{% for a in range(99999) %}"
BOMBS = {
    "nested ranges": DEEP * 3 + "{% endfor %}" * 3,
    "power": "{{ 9 ** (9 ** 9) }}",
    "power that shows while it runs": "{{ 9 ** (messages | length + 10 ** 9) }}",
    "constant text": "{{ ('a' * 10 ** 9) | length }}",
    "text": "{{ 'a' * (messages | length * 10 ** 9) }}",
    "list": "{{ ([[]] * 10 ** 9) | length }}",
    "doubling ~": DOUBLING % ("'aa'", "ns.x ~ ns.x"),
    "doubling +": DOUBLING % ("'aa'", "ns.x + ns.x"),
    "doubling *": DOUBLING % ("3", "ns.x * ns.x"),
    "doubling lists": DOUBLING % ("[1, 2]", "ns.x + ns.x"),
    "doubling by replace": DOUBLING % ("'a'", "ns.x | replace('a', 'aa')"),
    "doubling by format": DOUBLING % ("'a'", "'%s%s' | format(ns.x, ns.x)"),
    "doubling by join": DOUBLING % ("'a'", "[ns.x, ns.x] | join"),
    "indent": "{{ 'a\\nb' | indent(10 ** 9) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format operator": "{{ '%1000000000d' % 1 }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "center": "{{ 'a' | center(10 ** 9) }}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "zfill": "{{ 'a'.zfill(10 ** 9) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "join": "{{ ('a' * 9999).join(['b'] * 99999) }}",
    "tojson": "{{ messages | tojson(indent=10 ** 9) }}",
    "batch": "{{ ['a'] | batch(10 ** 9, 'x') | list }}",
    "slice": "{{ range(99999) | slice(10 ** 8) | list }}",
    "wordwrap": "{{ ('a ' * 999999) | wordwrap(1) | length }}",
    "a macro": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": (
        "{% for x in [60] recursive %}{% if x %}{{ loop([x-1, x-1]) }}{% endif %}{% endfor %}"
    ),
    "cycle": DEEP + "{{ loop.cycle(*range(99999)) }}{% endfor %}",
    "lipsum": "{{ lipsum(n=1, min=10 ** 8, max=10 ** 9) }}",
    "sort": "{{ (range(99999) | list * 99) | sort | length }}",
    "digits": "{{ ('1' * 4000) | int ** 999 ** 2 }}",
    "bytes": "{{ (10 ** 9).to_bytes(10 ** 9, 'big') | length }}",
    "tags": "{{ ('<' * 9999999) | striptags | length }}",
    "time": "{{ strftime_now('%c' * 9999999) | length }}",
    "rounding": "{{ 3 | round(10 ** 9, 'ceil') }}",
    "output": DEEP + "{{ 'x' * 99999 }}{% endfor %}",
    "captured output": "{% set x %}" + DEEP + "{{ 'x' * 99999 }}{% endfor %}{% endset %}{{ x }}",
    "a long source": "{{ 1 }}" * 120_000,
}
# Prints, for each bomb that is not refused or takes too long, why; then the largest process.
TRY = """
import json, resource, sys
from pathlib import Path
from duetto.core.errors import CheckpointError, InvalidRequest
from duetto.checkpoints.chat_template import ChatTemplate
def usage(): return resource.getrusage(resource.RUSAGE_CHILDREN)
faults = []
for name, source in json.load(sys.stdin).items():
    before = usage()
    template = ChatTemplate(source, Path("f"))
    try:
        text = template.render([{"role": "user", "content": "a"}])
        faults.append([name, "rendered", len(text)])
    except InvalidRequest:
        pass
    del template
    after = usage()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if cpu_s > 2:  # twice 0.25 s and two starts, which a busy machine makes longer
        faults.append([name, "computed", cpu_s])
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([faults, usage().ru_maxrss * unit]))
"""


def test_bombs_are_refused_within_the_budget() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRY], input=json.dumps(BOMBS), capture_output=True, text=True
    )
    faults, max_bytes = json.loads(done.stdout)
    assert faults == []
    assert sys.platform == "darwin" or max_bytes <= MAX_BYTES * 1.05


def test_the_waiting_thread_computes_nothing() -> None:
    template = ChatTemplate(BOMBS["nested ranges"], FILE)
    before = process_time()
    with pytest.raises(InvalidRequest, match=r"takes more than 0\.25 s of computing"):
        template.render([USER])
    assert process_time() - before < 0.2


def test_a_bomb_that_a_client_sets_off_ends_its_chat_only() -> None:
    source = (
        "{% if fuse %}" + DEEP * 2 + "{% endfor %}" * 2 + "{% endif %}{{ messages[0].content }}"
    )
    template = ChatTemplate(source, FILE)
    assert template.note is None
    with ThreadPoolExecutor(4) as threads:
        bombs = [
            threads.submit(template.render, [USER], template_kwargs={"fuse": 1}) for _ in range(3)
        ]
        assert [template.render([USER]) for _ in range(10)] == ["Hello"] * 10
        for bomb in bombs:
            assert isinstance(bomb.exception(), InvalidRequest)
    assert template.render([USER]) == "Hello"


def test_many_threads_get_their_own_answers() -> None:
    template = ChatTemplate("{{ messages[0].content }}", FILE)
    texts = [f"{i}{'é😀' * i}" for i in range(200)]
    with ThreadPoolExecutor(8) as threads:
        asked = threads.map(lambda text: template.render([{**USER, "content": text}]), texts)
        assert list(asked) == texts


def test_large_chats_are_within_the_budget() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}", FILE)
    for text in ("w " * 2**20, "😀" * 2**19):
        assert template.render([{**USER, "content": text}]) == text + "\n"
    assert len(template.render([USER] * 5000)) == 30_000


def processes_of(template: ChatTemplate) -> TemplateProcesses:
    return template._processes


def test_a_process_that_others_ended_is_started_again() -> None:
    template = ChatTemplate("{{ messages[0].content }}", FILE)
    (process,) = processes_of(template)._idle
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()
    assert template.render([USER]) == "Hello"


def test_a_process_that_is_stopped_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "WALL_PER_CPU", 1)
    template = ChatTemplate("{{ messages[0].content }}", FILE)
    (process,) = processes_of(template)._idle
    os.kill(process._process.pid, signal.SIGSTOP)
    with pytest.raises(InvalidRequest, match="takes longer than 0"):
        template.render([USER])
    assert not process.is_alive
    assert len(processes_of(template)._idle) == 1  # another one is there already
    assert template.render([USER]) == "Hello"


def test_processes_end_with_their_template() -> None:
    template = ChatTemplate("{{ messages[0].content }}", FILE)
    (process,) = processes_of(template)._idle
    pid = process._process.pid
    del process, template
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_processes_end_with_the_server() -> None:
    """Also where it has no time to end them."""
    code = (
        "import os, signal; from pathlib import Path\n"
        "from duetto.checkpoints.chat_template import ChatTemplate\n"
        "template = ChatTemplate('a', Path('f'))\n"
        "print(template._processes._idle[0]._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid, gone = int(done.stdout), Event()

    def wait() -> None:
        while Path(f"/proc/{pid}").exists() and not gone.wait(0.02):
            pass
        gone.set()

    thread = Thread(target=wait)
    thread.start()
    thread.join(30)
    ended = gone.is_set()
    gone.set()
    assert ended


def test_where_the_system_holds_no_limit_the_process_looks_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on macOS: a stand-in for a system without /proc.

    Linux counts as a program's largest size also that of the one which started it, and pytest is
    large; a fork counts from its own.
    """
    start = template_process._START.replace(
        "from duetto.checkpoints.template_child import main; ",
        "import os; pid = os.fork(); "
        "pid and os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])); "
        "import duetto.checkpoints.template_child as child; from pathlib import Path; "
        "child._STATM = Path('/nowhere'); main = child.main; ",
    )
    assert "nowhere" in start
    monkeypatch.setattr(template_process, "_START", start)
    source = "{% if fuse %}" + DOUBLING % ("'aa'", "ns.x ~ ns.x") + "{% endif %}ok"
    template = ChatTemplate(source, FILE)
    assert template.render([USER]) == "ok"
    with pytest.raises(InvalidRequest, match="takes more than"):
        template.render([USER], template_kwargs={"fuse": 1})
    assert template.render([USER]) == "ok"


def test_a_process_knows_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUETTO_API_KEY", "secret")
    (process,) = processes_of(ChatTemplate("a", FILE))._idle
    environment = Path(f"/proc/{process._process.pid}/environ")
    assert not environment.exists() or b"secret" not in environment.read_bytes()


def test_a_second_process_waits_for_the_first_to_be_busy() -> None:
    template = ChatTemplate("{{ messages[0].content }}", FILE)
    for _ in range(20):
        template.render([USER])
    assert processes_of(template)._num_processes == 1


def test_the_source_is_limited() -> None:
    with pytest.raises(CheckpointError, match="longer than"):
        ChatTemplate("a" * (chat_template._MAX_SOURCE_CHARACTERS + 1), FILE)
    with pytest.raises(CheckpointError, match="half a surrogate"):
        ChatTemplate("a\ud83d", FILE)
