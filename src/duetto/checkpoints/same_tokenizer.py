"""Whether two models mean the same by each token id. Compares tokenizers, never weights."""

from duetto.checkpoints.tokenizer import Tokenizer


def difference(target: Tokenizer, draft: Tokenizer) -> str | None:
    """The first id that does not stand for the same text in both; None if there is none.

    How text is cut does not count, as ids are all that a draft exchanges with its target; nor do
    rows without a token, of which there may be more or fewer.
    """
    ours, theirs = target.tokens(), draft.tokens()
    for token_id in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(token_id), theirs.get(token_id)
        if one != other:
            return (
                f"token {token_id} is {_shown(one)} in the model's tokenizer and {_shown(other)} "
                f"in the draft's, of {len(ours)} and {len(theirs)} tokens"
            )
    return None


def _shown(token: tuple[str, bool] | None) -> str:
    if token is None:
        return "missing"
    text, is_special = token
    return f"{text[:40]!r}{' (special)' if is_special else ''}"
