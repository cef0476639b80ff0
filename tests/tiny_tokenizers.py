"""Small tokenizers of every kind that checkpoints bring, trained on a few sentences."""

from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = """The quick brown fox jumps over the lazy dog, and the dog doesn't mind at all.
It was the best of times; it was the worst of times: prefill and decode, a duet of two voices.
def add(a, b):\n    return a + b  # four spaces\nNaïve café, Übergröße, ¿qué? Ça va, señor.
Добрый день, мир. 你好，世界！今日は良い天気です。 👩‍👩‍👧 🙂🙃 price: 12,345.67 €
""".splitlines()

SPECIAL = ["<unk>", "<s>", "</s>"]
_SPECIAL_TOKENS = [AddedToken(token, special=True) for token in SPECIAL]


def byte_level_bpe(vocab_size: int = 400) -> Tokenizer:
    """As in GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def byte_fallback_bpe() -> Tokenizer:
    """As in Llama 2, Mistral and Gemma: pieces with ▁, and bytes <0x00> for what has no piece."""
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyzTIüé,.世", "th", "▁t", "▁th", "he", "▁the"]:
        vocab[piece] = len(vocab)
    merges = [("t", "h"), ("▁", "t"), ("▁t", "h"), ("h", "e"), ("▁t", "he")]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(_SPECIAL_TOKENS)
    return tokenizer


def unigram() -> Tokenizer:
    """As exported from SentencePiece's unigram models (T5, XLM). Its trainer is not repeatable."""
    scores = dict.fromkeys(SPECIAL, 0.0) | {"▁": -3.0}
    for i, piece in enumerate(["the", "▁the", "▁of", "er", "▁d", "og", "ing", "▁do", "es", "▁▁"]):
        scores[piece] = -2.0 - i / 8
    for i, character in enumerate(sorted(set("".join(TEXT)) - {" "})):
        scores.setdefault(character, -6.0 - i / 64)
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(_SPECIAL_TOKENS)
    return tokenizer


def wordpiece() -> Tokenizer:
    """As in BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=250, special_tokens=_SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=_SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def character_level() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    for character in sorted(set("".join(TEXT)) | {"\n"}):
        vocab[character] = len(vocab)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(_SPECIAL_TOKENS)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make
    for make in (
        byte_level_bpe,
        byte_fallback_bpe,
        unigram,
        wordpiece,
        word_level,
        character_level,
    )
}
