"""Short names of an engine's flags."""

from duetto.cli.short_flags import spelled_out


def test_short_names_are_spelled_out() -> None:
    assert spelled_out([]) == []
    given = ["serve", "m", "--tp", "2", "--pp=3", "--", "--tp"]
    want = ["serve", "m", "--tensor-parallel-size", "2", "--pipeline-parallel-size=3", "--", "--tp"]
    assert spelled_out(given) == want
    assert spelled_out(["fit", "m", "--tp", "2"]) == ["fit", "m", "--tp", "2"]
