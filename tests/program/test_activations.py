from duetto.models.find import find_program
from duetto.program.activations import activation_bytes


def test_selected_rows_are_counted_as_such() -> None:
    program = find_program("tiny")  # hidden 64, 4 heads and 2 KV heads of 16, MLP of 128
    of_tokens = 64 + 64 + (4 + 2 + 2) * 16 + 4 * 16 + 2 * 128 + 128  # hidden … activated
    of_rows = 64 + 64 + 1024  # selected, normed, logits
    assert activation_bytes(program, 100, 7) == 4 * (100 * of_tokens + 7 * of_rows)
    assert activation_bytes(program, 1, 0, 2.0) == 2 * of_tokens
