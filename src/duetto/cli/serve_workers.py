"""A server whose engines are workers: one that starts them, and one to which they come."""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from socket import socket

from duetto import __version__
from duetto.build import FrontEnd, build_front, reuse_rules
from duetto.cli.door_options import DoorOptions
from duetto.cluster.facts import WorkerFacts, WorkerRole
from duetto.cluster.replicas import ReplicaPlan, Replicas, shares_of_cpus
from duetto.core.cpus import usable_cpus
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.options import flag_of
from duetto.models.programs import load_program
from duetto.routing.policies import RouterName
from duetto.runner.load import plan_model
from duetto.server.app import create_app
from duetto.server.http.serve import serve as run
from duetto.server.settings import ServerSettings
from duetto.workers_door import (
    DoorModel,
    WorkersDoor,
    door_config,
    door_model,
    numerics_in_words,
    reused_model,
)

MAX_WORKERS = 256  # that one server starts
_LOOK_S = 0.25


def serve_replicas(
    model: str,
    args: EngineArgs,
    options: DoorOptions,
    listener: socket,
    settings: ServerSettings,
    *,
    roles: dict[WorkerRole, int],
    router: RouterName,
    max_local_prefill: int | None,
    pin: bool,
) -> None:
    """Start workers of these roles, serve, and end them. Raises ConfigError."""
    front = build_front(model, args)
    known = door_model(front, args)
    count = sum(roles.values())
    args = _shared_memory(front, args, count)
    notes = []
    if pin and count > usable_cpus():
        notes.append(f"{count} workers share the {usable_cpus()} processors that there are")
    with (
        tempfile.TemporaryDirectory(prefix="duetto-") as folder,
        _door(known, router) as door,
    ):
        address = str(door.listen(f"ipc://{folder}/door", "--replicas"))
        plans = _plans(
            *(model, args, options, address, roles), max_local_prefill=max_local_prefill, pin=pin
        )
        replicas = Replicas(plans)
        try:
            replicas.start()
            _wait_for_all(door, replicas, count)
            replicas.keep()
            num_answering = count - roles.get("prefill", 0)
            _serve(front, known, door, options, listener, settings, num_answering, notes)
        finally:
            replicas.stop(options.shutdown_timeout)


def serve_joined(
    front: FrontEnd,
    known: DoorModel,
    door: WorkersDoor,
    options: DoorOptions,
    listener: socket,
    settings: ServerSettings,
    num_workers: int,
) -> None:
    """Serve with the workers that have come; more may come."""
    _serve(front, known, door, options, listener, settings, num_workers, [])


@contextmanager
def _door(known: DoorModel, router: RouterName) -> Iterator[WorkersDoor]:
    door = WorkersDoor(known, router, __version__)
    door.wire.start()
    try:
        yield door
    finally:
        door.close()


def _serve(
    front: FrontEnd,
    known: DoorModel,
    door: WorkersDoor,
    options: DoorOptions,
    listener: socket,
    settings: ServerSettings,
    num_workers: int,
    notes: list[str],
) -> None:
    facts = door.members.facts
    assert facts is not None and door.prices is not None, "a worker has joined"
    words = numerics_in_words(facts.numerics)
    reused = reused_model(front, known, facts)
    settings = replace(
        settings,
        served_model_name=(*options.served_model_name, front.name)[0],
        default_sampling=front.default_sampling,
        model_root=str(front.root),
        dtype=words.dtype,
        quantization=words.quantization,
        kv_cache_dtype=words.kv_dtype,
        backend=words.computed_by,
        max_drafts={} if front.companion is None else front.companion.max_drafts,
        embeddings=known.embeddings,
        reuse=reuse_rules(
            reused, options.default_reuse, allow_unmeasured=options.allow_unmeasured_reuse
        ),
    )
    app = create_app(
        open_engine=door.members.router.opened,
        codec=front.codec,
        config=door_config(facts.scheduler, max(num_workers, door.num_answering)),
        settings=settings,
        roof_time=door.prices.roof_time,
        grammars=front.grammars,
        speech=front.speech,
    )
    _announce(front, door, facts, settings, listener.getsockname(), notes)
    run(app, settings, listener, log_level=options.log_level)


def _announce(
    front: FrontEnd,
    door: WorkersDoor,
    facts: WorkerFacts,
    settings: ServerSettings,
    address: tuple[str, int],
    notes: list[str],
) -> None:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    name, config = settings.served_model_name, facts.scheduler
    roles = [worker.role for worker in door.members.joined_workers]
    counted = ", ".join(f"{roles.count(role)} of role {role}" for role in dict.fromkeys(roles))
    if "decode" in roles and "prefill" not in roles:
        notes = [
            *notes,
            "no worker of role prefill has joined so far: prompts are computed at home",
        ]
    lines = [
        f"Duetto {__version__} serves {name} at http://{host}:{address[1]}/v1",
        f"  {len(roles)} worker{'s' * (len(roles) > 1)}: {counted}; each {facts.numerics}, context "
        f"{config.max_model_len}, {config.num_blocks} blocks of {config.block_size} tokens",
        *(f"  note: {note}" for note in (*front.notes, *notes)),
    ]
    print("\n".join(lines), file=sys.stderr)


def _wait_for_all(door: WorkersDoor, replicas: Replicas, count: int) -> None:
    """Raises ConfigError if one ends before all have joined: it has said why."""
    while not door.members.wait(lambda: len(door.members.joined_workers) >= count, _LOOK_S):
        reason = replicas.why_not()
        if reason is not None:
            raise ConfigError(f"--replicas: {reason} before it joined; it says above why")


def wait_for_first(door: WorkersDoor, num_called: int, timeout_s: float | None, what: str) -> None:
    """Until a worker answers requests, or all that were called do; None: for ever. Raises
    ConfigError, with what is wrong, once the time is over."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def is_complete() -> bool:
        return door.num_answering > 0 and len(door.members.joined_workers) >= num_called

    while not door.members.wait(is_complete, _LOOK_S):
        if deadline is None or time.monotonic() < deadline:
            continue
        if door.num_answering:
            return
        if door.num_prefilling:
            raise ConfigError(
                f"{what}: only workers of role prefill are here; one of role decode or both is "
                "needed to answer requests"
            )
        told = [f"{address} {reason}" for address, reason in door.unanswered.items()]
        raise ConfigError(f"{what}: no worker within {timeout_s:g} s: {'; '.join(told) or 'none'}")


def _plans(
    model: str,
    args: EngineArgs,
    options: DoorOptions,
    address: str,
    roles: dict[WorkerRole, int],
    *,
    max_local_prefill: int | None,
    pin: bool,
) -> list[ReplicaPlan]:
    count = sum(roles.values())
    shares = shares_of_cpus(count) if pin else [frozenset[int]()] * count
    all_roles = [role for role, number in roles.items() for _ in range(number)]
    plans = []
    for number, (role, cpus) in enumerate(zip(all_roles, shares, strict=True)):
        own = args
        if args.kv_offloading_disk is not None:  # a folder has one owner
            disk = Path(args.kv_offloading_disk) / f"worker-{number}"
            disk.mkdir(parents=True, exist_ok=True)
            own = replace(args, kv_offloading_disk=str(disk))
        command = (
            *(sys.executable, "-m", "duetto", "worker", model, f"--join={address}"),
            *(f"--role={role}", f"--log-level={_level(options.log_level)}"),
            f"--step-timeout-s={options.step_timeout_s}",
            f"--shutdown-timeout={options.shutdown_timeout}",
            *engine_flags(own),
        )
        if role == "decode" and max_local_prefill is not None:
            command = (*command, f"--max-local-prefill={max_local_prefill}")
        plans.append(ReplicaPlan(command, role, cpus))
    return plans


def _level(level: str) -> str:
    """Workers tell what is wrong; what requests do, the server tells."""
    return "warning" if level == "info" else level


def engine_flags(args: EngineArgs) -> list[str]:
    """The flags that mean these arguments."""
    flags = []
    for option in fields(EngineArgs):
        value, flag = getattr(args, option.name), flag_of(option.name)
        if value == option.default:
            continue
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            flags += [f"{flag}={each}" for each in value]
        elif isinstance(value, dict | list):
            flags.append(f"{flag}={json.dumps(value)}")
        else:
            flags.append(f"{flag}={value}")
    return flags


def _shared_memory(front: FrontEnd, args: EngineArgs, count: int) -> EngineArgs:
    """Give each worker its share of the memory for KV: each alone would plan for itself. Raises
    ConfigError where they cannot share what computes."""
    plan = plan_model(*load_program(front.root, args.asked_len), args)
    if plan.loader.memory is not None:
        raise ConfigError(
            "--replicas: the workers would share one GPU; start duetto worker for each GPU, with "
            "CUDA_VISIBLE_DEVICES, and duetto router --workers for them, or say --backend cpu"
        )
    if args.kv_cache_memory_bytes is not None or count == 1:
        return args
    left = max(0, plan.available_bytes - count * plan.loader.weight_bytes)
    return replace(
        args, kv_cache_memory_bytes=max(1, min(plan.kv.memory_bytes, left // (2 * count)))
    )
