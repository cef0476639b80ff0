"""The routes that tell how the server stands, under the names that users of vLLM (/load,
/tokenizer_info), of SGLang (/server_info) and of llama.cpp (/props, /slots) know. All that is told
is true; they tell more.

Of other tenants' requests one learns that they run, and nothing else.
"""

import asyncio
from itertools import islice

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from duetto.core.config import SchedulerConfig
from duetto.core.sampling_params import SamplingParams
from duetto.core.text import TextCodec
from duetto.server.http.errors import json_response, overloaded
from duetto.server.http.json_parts import Json
from duetto.server.observe.history import Running
from duetto.server.relay import Relay
from duetto.server.settings import ServerSettings

_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class ServerStatus:
    """The handlers, one method each."""

    def __init__(
        self, relay: Relay, codec: TextCodec, config: SchedulerConfig, settings: ServerSettings
    ) -> None:
        self._relay = relay
        self._codec = codec
        self._config = config
        self._settings = settings

    def routes(self) -> list[Route]:
        return [
            Route("/load", self.load),
            Route("/v1/load", self.load),
            Route("/server_info", self.server_info),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/props", self.props),
            Route("/slots", self.slots),
        ]

    async def load(self, _: Request) -> Response:
        num_live, num_started = self._relay.num_live, len(self._relay.started_ids())
        return json_response(
            {
                "server_load": num_live,
                "num_running": num_started,
                "num_waiting": num_live - num_started,
                "max_num_seqs": self._config.max_num_seqs,
                "max_num_queued_reqs": self._settings.max_num_queued_reqs,
            }
        )

    async def server_info(self, _: Request) -> Response:
        config, settings = self._config, self._settings
        return json_response(
            {
                "version": settings.version,
                "system_fingerprint": settings.system_fingerprint,
                "served_model_names": list(settings.model_names),
                "dtype": settings.dtype,
                "quantization": settings.quantization,
                "kv_cache_dtype": settings.kv_cache_dtype,
                "backend": settings.backend,
                "runner": "pooling" if config.is_pooling else "generate",
                "max_model_len": config.max_model_len,
                "num_blocks": config.num_blocks,
                "block_size": config.block_size,
                "max_num_seqs": config.max_num_seqs,
                "max_num_batched_tokens": config.max_num_batched_tokens,
                "max_num_queued_reqs": settings.max_num_queued_reqs,
                "max_logprobs": config.max_logprobs,
                "scheduling_policy": config.scheduling_policy,
                "enable_prefix_caching": config.enable_prefix_caching,
                "enable_chunked_prefill": config.enable_chunked_prefill,
                "max_drafts": dict(settings.max_drafts),
            }
        )

    async def tokenizer_info(self, _: Request) -> Response:
        """What an evaluation needs to count and render as this server does, with /tokenize."""
        codec = self._codec
        before = codec.encode_apart("x")[0]
        eos = min(codec.eos_token_ids, default=None)
        facts = await asyncio.to_thread(codec.chat_template_facts)  # may render the template
        return json_response(
            {
                "tokenizer_class": type(codec).__name__,
                "model_max_length": self._config.max_model_len,
                "bos_token": codec.token_text(before[0]) if before else None,
                "eos_token": None if eos is None else codec.token_text(eos),
                "chat_template": None if facts is None else facts.source,
            }
        )

    async def props(self, _: Request) -> Response:
        settings = self._settings
        sampling = SamplingParams(**settings.default_sampling)
        params = {name: getattr(sampling, name) for name in _SAMPLING}
        return json_response(
            {
                "default_generation_settings": {
                    "n_ctx": self._config.context_length,
                    "params": params,
                },
                "total_slots": self._config.max_num_seqs,
                "model_alias": settings.served_model_name,
                "modalities": {"vision": False, "audio": False},
                "endpoint_slots": True,
                "endpoint_props": False,  # whether they can be changed
                "endpoint_metrics": True,
                "build_info": f"duetto-{settings.version}",
            }
        )

    async def slots(self, request: Request) -> Response:
        """A slot for each request that may run. Here none belongs to a request: they are numbered
        by the age of those that run. With fail_on_no_slot=1 it is 503 if all are taken."""
        started, total = self._relay.started_ids(), self._config.max_num_seqs
        runs = (r for r in self._relay.history.running(b"") if r.request_id in started)
        running = [*islice(runs, total)]  # one that was preempted waits, and counts no more
        if request.query_params.get("fail_on_no_slot") == "1" and len(running) == total:
            raise overloaded(f"all {total} slots are taken")
        tenant = request.scope["state"].get("tenant", b"")
        rows = [*(self._taken(r, tenant) for r in running), *[_FREE] * (total - len(running))]
        n_ctx, speculates = self._config.context_length, bool(self._settings.max_drafts)
        return json_response(
            [
                {"id": index, "n_ctx": n_ctx, "speculative": speculates, **row}
                for index, row in enumerate(rows)
            ]
        )

    def _taken(self, running: Running, tenant: bytes) -> Json:
        if not running.owner.startswith(tenant):
            return {"is_processing": True}
        return {
            "is_processing": True,
            "id_task": running.name,
            "n_prompt_tokens": running.num_prompt_tokens,
            "next_token": [{"n_decoded": running.num_output_tokens}],
        }


_FREE: Json = {"is_processing": False}
