"""The sentences of lessons.md that depend on figures say what the figures say."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from cli.in_process import duetto

pytest.importorskip("matplotlib", reason="pictures need the plot extra")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import lessons  # type: ignore[import-not-found]
from lessons_pictures import draw_splits  # type: ignore[import-not-found]


def split_results(**sustained: float) -> Any:
    """Every line at rates of 1, 2 and 4; within the limits up to what is given for its name."""
    found = {}
    for shape in lessons.SHAPES:
        for name in (*lessons.FOUR, lessons.SLOW_NAME):
            most = sustained.get(name.split(" ")[0] if "chunked" not in name else "chunked", 4)
            most = sustained.get("slow", most) if name == lessons.SLOW_NAME else most
            values = [(rate, 1.0 if rate <= most else 0.5) for rate in (1, 2, 4)]
            found[f"{shape}: {name}"] = [
                (rate, {"attainment": good, "itl_p99": 10.0 * rate}) for rate, good in values
            ]
    return found


def test_a_link_that_costs_nothing_is_not_said_to_lose() -> None:
    assert lessons.of_the_link(split_results()).endswith("fewer with none of the shapes.")
    shapes = "long prompts, balanced and long answers."
    assert lessons.of_the_link(split_results(slow=2)).endswith(f"fewer with {shapes}")


def test_splits_and_equal_replicas_are_compared_by_what_they_sustain() -> None:
    sentence = lessons.against_four(split_results(chunked=2), "balanced")
    assert "1 prefill + 3 decode sustains 4 requests/s" in sentence
    assert sentence.endswith("four equal replicas 2.")


def test_tails_are_compared_where_all_keep_up() -> None:
    assert lessons.of_the_baseline(split_results(chunked=2)).startswith("At 2 requests/s")
    assert lessons.of_the_baseline(split_results(chunked=0)).startswith("At 1 requests/s")


def test_a_tpot_that_is_alike_is_not_said_to_be_longer() -> None:
    def policies(*continuous: float) -> Any:
        return {
            "static": [(rate, {"tpot_p50": 10.0}) for rate in (1, 2, 4)],
            "continuous": list(zip((1, 2, 4), ({"tpot_p50": x} for x in continuous), strict=True)),
        }

    assert ": at none of these rates" in lessons.of_streams_in_company(policies(10, 10.5, 9))
    assert ": at 2 and 4 requests/s" in lessons.of_streams_in_company(policies(10, 12, 13))


def test_numbers_at_an_axis_have_no_powers(tmp_path: Path) -> None:
    file = tmp_path / "splits.svg"
    draw_splits(split_results(), lessons.SHAPES, file)
    text = file.read_text()
    assert "mathdefault" not in text and "\\times" not in text
    assert "<!-- 40 -->" in text


@pytest.mark.parametrize("words", list(lessons.examples(10)))
def test_a_command_of_the_page_gives_its_row(words: str) -> None:
    """With a quarter of the load: what is compared is that both simulate the same."""
    point = lessons.examples(10)[words]
    shown = shlex.split(lessons.command(point).replace("\\\n", " "))
    assert shown[0] == "duetto"
    done = duetto(*shown[1:], "--json")
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout.splitlines()[-1]), lessons.simulated(point)
    assert found["num_devices"] == (4 if "long prompts" in words else 1)
    for name in ("ttft", "itl", "tpot"):
        key = f"{name}_p50"
        assert found[f"median_{name}_ms"] == pytest.approx(expected[key])
    assert found["p99_itl_ms"] == pytest.approx(expected["itl_p99"])


def test_the_page_has_the_commands() -> None:
    page = lessons.PAGE.read_text()
    for point in lessons.examples(40).values():
        assert lessons.command(point) in page
