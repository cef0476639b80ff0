"""The options of a workload: which reader they choose, and what they refuse."""

from pathlib import Path

import pytest

from duetto.core.errors import ConfigError
from duetto.measure.dataset import DatasetOptions

FIXTURES = Path(__file__).parent / "fixtures"


def no_tokenizer(text: str) -> int:
    raise AssertionError("only sharegpt counts tokens")


def load(**options: object) -> list[tuple[int, int]]:
    made = DatasetOptions(**options).load(no_tokenizer, seed=0)  # type: ignore[arg-type]
    return [(len(r.prompt_token_ids or ()), r.num_output_tokens) for r in made.requests]


def test_random() -> None:
    assert load(num_prompts=2, random_input_len=7, random_output_len=3) == [(7, 3)] * 2
    assert load(num_prompts=1, random_input_len=7, random_prefix_len=5) == [(12, 64)]


def test_a_range_ratio_alone_asks_for_uniform_lengths() -> None:
    lengths = {n for n, _ in load(random_input_len=10, random_range_ratio=0.5)}
    assert min(lengths) >= 5
    assert max(lengths) <= 15
    assert len(lengths) > 5


@pytest.mark.parametrize(
    ("name", "file"), [("azure", "azure_conv_5.csv"), ("mooncake", "mooncake_5.jsonl")]
)
def test_traces(name: str, file: str) -> None:
    options = DatasetOptions(dataset_name=name, dataset_path=FIXTURES / file)  # type: ignore[arg-type]
    assert options.has_times
    lengths = load(
        dataset_name=name, dataset_path=FIXTURES / file, num_prompts=2, max_input_len=9,
        max_output_len=4,
    )  # fmt: skip
    assert lengths == [(9, 4), (9, 4)]


def test_sharegpt_counts_with_the_tokenizer_it_is_given() -> None:
    options = DatasetOptions(
        dataset_name="sharegpt", dataset_path=FIXTURES / "sharegpt_4.json", sharegpt_output_len=5
    )
    made = options.load(lambda text: len(text.split()), seed=0)
    assert [r.num_output_tokens for r in made.requests] == [5, 5]
    assert not options.has_times


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"num_prompts": 0}, "--num-prompts 0"),
        ({"dataset_name": "azure", "num_prompts": 0}, "--num-prompts 0"),
        ({"dataset_name": "azure"}, "needs a file: --dataset-path"),
        ({"random_lengths": "fixed", "random_range_ratio": 0.5}, "--random-range-ratio 0.5 with"),
        ({"dataset_path": Path("x.csv")}, "--dataset-path with --dataset-name random"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        load(**options)
