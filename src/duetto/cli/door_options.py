"""The flags of every command that serves HTTP."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from duetto import __version__
from duetto.build import reuse_choice
from duetto.core.reuse_choice import OFF, ReuseChoice
from duetto.server.settings import STORED_BYTES, ServerSettings

API_KEY_VARIABLE = "DUETTO_API_KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorOptions:
    """How a model is served, wherever its engine is."""

    host: str = "127.0.0.1"
    """The address to listen on; one that others can reach needs --api-key."""
    port: int = 8000
    """The port to listen on."""
    served_model_name: Annotated[tuple[str, ...], Parameter(show_default=False, negative="")] = ()
    """The name clients ask for; may be repeated, and replies show the first. By default that of
    the directory."""
    any_model_name: Annotated[bool, Parameter(negative="")] = False
    """Accept whatever name clients ask for; replies show the served one."""
    api_key: Annotated[tuple[str, ...], Parameter(show_default=False)] = ()
    """A key that clients must bring; may be repeated. Also read from DUETTO_API_KEY."""
    insecure_no_auth: Annotated[bool, Parameter(negative="")] = False
    """Serve without a key, also on a public address or under a foreign host name."""
    allowed_origins: Annotated[tuple[str, ...], Parameter(show_default=False, negative="")] = ()
    """A web page that may use the server, as its origin: https://app.example, app://*, or * for
    all; may be repeated. By default those of this machine."""
    max_num_queued_reqs: int = 256
    """Most requests that wait; more are told to come back (503). While others ask, one client
    (an API key, or an address where there are none) may have half of them (then 429)."""
    sse_keep_alive_interval: float = 15.0
    """Seconds of silence after which a stream gets a comment."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests have to end once the server is told to stop."""
    step_timeout_s: float | Literal["auto", "off"] = "auto"
    """Seconds that a step may take, after which the server ends with exit code 70, for a
    supervisor to start it again; auto is ten times what was predicted, and at least 10."""
    store_responses: bool = True
    """Keep what /v1/responses answers in memory, so that clients may go on from it."""
    reuse: str = OFF
    """How texts are reused that callers mark as reusable (docs/api.md), where they do not choose
    themselves: off, or a method with its numbers, as first:16. This changes answers."""
    allow_unmeasured_reuse: Annotated[bool, Parameter(negative="")] = False
    """Let --reuse and callers choose what was not measured to be good enough on this model."""
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "info"
    """How much is logged, on stderr. info: a line for each request, and one of throughput every
    ten seconds while busy. debug: also uvicorn's own, and replies beside answers."""

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.api_key, *filter(None, [os.environ.get(API_KEY_VARIABLE)]))

    @property
    def default_reuse(self) -> ReuseChoice | None:
        """Raises ConfigError."""
        return reuse_choice(self.reuse)

    def settings(self, model: str, seed: int | None) -> ServerSettings:
        """All that is known before the model is. Raises ConfigError."""
        names = self.served_model_name
        return ServerSettings(
            served_model_name=names[0] if names else model,
            other_model_names=names[1:],
            accepts_any_model=self.any_model_name,
            version=__version__,
            seed=seed,
            api_keys=self.keys,
            allowed_origins=self.allowed_origins,
            only_local_hosts=not self.keys and not self.insecure_no_auth,
            max_num_queued_reqs=self.max_num_queued_reqs,
            sse_keep_alive_s=self.sse_keep_alive_interval,
            shutdown_timeout_s=self.shutdown_timeout,
            step_timeout_s=self.step_timeout_s,
            max_stored_bytes=STORED_BYTES if self.store_responses else 0,
        )
