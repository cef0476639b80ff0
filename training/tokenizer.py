"""The demo models' tokenizer: byte-level BPE learned from training worlds, and its chat template.

Names are cut into their two syllables before merges are counted, so no merge spans the cut, and a
held-out name is made of the same tokens as any other.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from duetto.evals.worlds.names import BEGINNINGS, ENDINGS
from duetto.evals.worlds.prompt import user_turn
from duetto.evals.worlds.relations import NOT_STATED
from duetto.evals.worlds.story import Style
from duetto.evals.worlds.world import WorldOptions, draw_world

END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS = (
    "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip
MAX_TOKENS = 4096
NUM_WORLDS = 4000
EVERY_WORDING = Style(value_first=True)

# An answer begins with a space, as a name inside a document does, so that both are the same tokens.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|> ' + message['content'] | trim + '<|end|>\\n' }}
{%- else %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""

_CUT = re.compile(
    rf"\b({'|'.join(BEGINNINGS)})"
    rf"(?=(?:{'|'.join(e for endings in ENDINGS.values() for e in endings)})\b)"
)


def train_tokenizer(num_worlds: int = NUM_WORLDS) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_TOKENS,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(num_worlds), trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, out: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _pieces(num_worlds: int) -> Iterator[str]:
    """Training text, cut inside names: the documents of worlds, and one question about each."""
    yield f" {NOT_STATED}"
    for seed in range(num_worlds):
        world = draw_world(seed, "train", WorldOptions(style=EVERY_WORDING))
        question = world.questions[seed % len(world.questions)]
        text = user_turn(world.documents, question.text)["content"]
        yield from _CUT.sub(lambda found: found[0] + "\0", text).split("\0")
