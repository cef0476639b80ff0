"""inspect-ai: a task with a tool, over chat and Responses."""

import tempfile

from checks import MODEL, QUESTION, URL, needs, run

inspect_ai = needs("inspect-ai", "inspect_ai")
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.scorer import includes  # noqa: E402
from inspect_ai.solver import generate, use_tools  # noqa: E402
from inspect_ai.tool import tool  # noqa: E402


@tool
def rains():
    async def execute(today: bool):
        """Whether it rains.

        Args:
            today: or tomorrow
        """
        return f"no {today}"

    return execute


def task_with_a_tool():
    task = inspect_ai.Task(
        dataset=[Sample(input=QUESTION, target="no")],
        solver=[use_tools(rains(), tool_choice="any"), generate(tool_calls="single")],
        scorer=includes(),
    )
    for responses_api in (False, True):
        (log,) = inspect_ai.eval(
            task,
            model=f"openai/{MODEL}",
            model_base_url=URL + "/v1",
            model_args={"responses_api": responses_api},
            max_tokens=100,
            display="none",
            log_dir=tempfile.mkdtemp(),
        )
        assert log.status == "success", log.error
        assert [m.role for m in log.samples[0].messages] == ["user", "assistant", "tool"]


run(task_with_a_tool)
