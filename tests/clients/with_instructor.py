"""instructor: response models in its modes."""

from checks import MODEL, QUESTION, URL, needs, run

instructor = needs("instructor", "instructor")
import openai  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402

client = openai.OpenAI(max_retries=0)
ASK = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_retries": 0}


class Weather(BaseModel):
    city: str = Field(max_length=12)
    rains: bool


def mode(name):
    def check():
        made = instructor.from_openai(client, mode=instructor.Mode[name])
        limit = "max_output_tokens" if name.startswith("RESPONSES") else "max_tokens"
        got = made.create(response_model=Weather, **ASK, **{limit: 200})
        assert isinstance(got, Weather)

    check.__name__ = name.lower()
    return check


def streamed_partly():
    made = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    *_, last = made.create_partial(response_model=Weather, **ASK, max_tokens=200)
    assert last.rains is not None


def anthropic_tools():
    anthropic = needs("anthropic", "anthropic")
    own = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
    made = instructor.from_anthropic(own, mode=instructor.Mode.ANTHROPIC_TOOLS)
    assert isinstance(made.create(response_model=Weather, **ASK, max_tokens=200), Weather)


MODES = ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "RESPONSES_TOOLS")
run(*[mode(name) for name in MODES], streamed_partly, anthropic_tools)
