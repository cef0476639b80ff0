"""The route of llama.cpp's fill in the middle. Knows no engine and no tokens."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from duetto.server.answering import Answering
from duetto.server.apis.asked import AskedPrompts
from duetto.server.apis.infill import InfillRequest, InfillTranslator, check_biases, read_infill
from duetto.server.apis.reading import decode
from duetto.server.apis.translator import Translator
from duetto.server.door import Job, RequestHead


class InfillApi:
    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    def routes(self) -> list[Route]:
        return [Route("/infill", self.infill, methods=["POST"])]

    async def infill(self, request: Request) -> Response:
        return await self._answering.answer(request, self._read, self._translator)

    def _read(self, body: bytes) -> AskedPrompts:
        """Runs on any thread."""
        answering = self._answering
        wire = decode(body, InfillRequest)
        answering.check_model(wire.model)
        check_biases(wire, answering.codec.vocab_size)
        return read_infill(wire, answering.settings.default_sampling)

    def _translator(self, asked: AskedPrompts, job: Job, arrival: RequestHead) -> Translator:
        del arrival
        model = self._answering.settings.served_model_name
        return InfillTranslator(asked, job, self._answering.codec, model)
