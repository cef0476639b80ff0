"""The command line. Each command is a file of its own and loads only when it runs."""

import signal
import sys
from contextlib import suppress
from io import TextIOWrapper

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from duetto import __version__
from duetto.cli.interrupt import INTERRUPTED
from duetto.cli.short_flags import spelled_out
from duetto.cli.units import HELP, read_units
from duetto.core.errors import DuettoError

app = App(
    name="duetto",
    version=__version__,
    help="Serve and study large language models: prefill and decode, played as a duet.",
    help_epilogue=HELP,
    config=read_units,
    default_parameter=Parameter(negative_iterable=(), allow_repeating=True),
)
app.command("duetto.cli.serve:serve", name="serve", help="Serve a model over HTTP.")
app.command("duetto.cli.router:router", name="router", help="A door to engines elsewhere.")
app.command("duetto.cli.worker:worker", name="worker", help="An engine for doors elsewhere.")
app.command("duetto.cli.chat:chat", name="chat", help="Talk with a model in the terminal.")
app.command("duetto.cli.complete:complete", name="complete", help="Continue a text.")
app.command("duetto.cli.run_batch:run_batch", name="run-batch", help="Answer a file of requests.")
app.command("duetto.cli.tokenize:tokenize", name="tokenize", help="Show how a text splits.")
app.command("duetto.cli.make_model:make_model", name="make-model", help="Write a random model.")
app.command("duetto.cli.bench:app", name="bench", help="Measure latency, throughput, serving.")
app.command("duetto.cli.roofline:roofline", name="roofline", help="What a step takes, and why.")
app.command("duetto.cli.calibrate:calibrate", name="calibrate", help="Measure this machine.")
app.command(
    "duetto.cli.calibrate_reuse:calibrate_reuse",
    name="calibrate-reuse",
    help="What reused KV does to answers.",
)
app.command("duetto.cli.fit:fit", name="fit", help="What fits, before it is loaded.")
app.command("duetto.cli.explain:explain", name="explain", help="Why a request was slow.")
app.command("duetto.cli.cache:app", name="cache", help="What a server's KV cache holds and keeps.")
app.command("duetto.cli.eval:evaluate", name="eval", help="Exact match on held-out worlds.")
app.command("duetto.cli.simulate:simulate", name="simulate", help="A load in virtual time.")
app.command("duetto.cli.plan:plan", name="plan", help="Find the cheapest layout for a load.")
app.command("duetto.cli.planner:planner", name="planner", help="Watch a cluster: how many workers?")
app.command("duetto.cli.doctor:doctor", name="doctor", help="What this machine offers Duetto.")


def main() -> None:
    """Run a command. An error that was raised on purpose is one line on stderr, and exit 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal may not know every character
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app(spelled_out(sys.argv[1:]), exit_on_error=False, print_error=False)
        finally:  # here, where it can still be told, and not at the interpreter's end
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        if str(error):  # what was broken off, and how to go on
            print(f"duetto: {error}", file=sys.stderr)
        _leave_interrupted()
    except CycloptsError as error:
        sys.exit(f"duetto: {_wrong_usage(error)}")
    except DuettoError as error:
        sys.exit(f"duetto: {error}")
    except BrokenPipeError:  # the reader of our output has gone
        _close_stdout()
        sys.exit(141)
    except OSError as error:  # a full disk, say; what a checkpoint lacks is a CheckpointError
        _close_stdout()
        sys.exit(f"duetto: {error}")
    except Exception as error:
        if not _comes_of_interrupt(error):
            raise
        _leave_interrupted()


def _wrong_usage(error: CycloptsError) -> str:
    """In one line, which a pipe does not wrap."""
    words = " ".join(str(error).split())
    if isinstance(error, UnusedCliTokensError):
        words = f"{' '.join(error.unused_tokens or ())}: is more than this command takes"
    command = " ".join(("duetto", *(error.command_chain or ())))
    return f"{words.removesuffix('.')} (see {command} --help)"


def _leave_interrupted() -> None:
    """By Ctrl-C, without more words; another one, which came of impatience, changes nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(INTERRUPTED)


def _comes_of_interrupt(error: BaseException | None) -> bool:
    """Whether this was raised while a KeyboardInterrupt was on its way out."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _close_stdout() -> None:
    """Give up what could not be written, or Python tries again at its end."""
    with suppress(OSError):
        sys.stdout.close()
