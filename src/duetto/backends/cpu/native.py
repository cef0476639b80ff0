"""The native module, or why there is none. Everything native in this room comes from here."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from duetto.core.errors import ConfigError

try:
    import duetto._native as native
except ImportError as error:  # no compiler when Duetto was installed, say: the rest still runs
    native = None  # type: ignore[assignment]
    _import_error: str | None = str(error)
else:
    _import_error = None

__all__ = ["choose_isa", "in_words", "native", "why_unavailable"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def why_unavailable() -> str | None:
    """What is missing for the cpu backend, in words; None if it can run."""
    if _import_error is not None:
        return (
            f"the native module cannot be loaded ({_import_error}); "
            f"it is built when Duetto is installed where there is a C++ compiler"
        )
    if not hasattr(native, "Group"):
        return "the native module is of another version; install Duetto again"
    return None


def choose_isa(name: str | None = None) -> str:
    """The instruction set to use; see _native.choose_isa. Raises ConfigError if it cannot be."""
    try:
        return native.choose_isa(name)
    except ValueError as error:  # says itself whether the environment asked
        raise ConfigError(str(error)) from None


def in_words(subject: str, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a native function; what it refuses becomes a ConfigError about `subject`."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise ConfigError(f"{subject}: {error}") from None
