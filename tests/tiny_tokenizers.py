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


def gemma_like() -> Tokenizer:
    """As in Gemma 2 and 3: no space in front, and runs of spaces that are added tokens."""
    tokenizer = byte_fallback_bpe()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens([AddedToken("▁" * n, normalized=False) for n in (2, 3, 4, 8)])
    tokenizer.add_tokens([AddedToken("\n" * n, normalized=False) for n in (1, 2)])
    tokenizer.add_tokens([AddedToken("<table>", normalized=False), "<0x0G>"])
    return tokenizer


def phi3_like() -> Tokenizer:
    """As in Phi-3: Llama 2's, with added tokens that swallow the spaces after them."""
    tokenizer = byte_fallback_bpe()
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("<|sys|>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("▁<PRE>", normalized=False), "<as text>"])
    return tokenizer


def mistral_like() -> Tokenizer:
    """As in Mistral v1's newer files: Metaspace in front of the first piece only."""
    tokenizer = byte_fallback_bpe()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def qwen_like() -> Tokenizer:
    """As in Qwen 2 and 3: what is encoded is composed first, so lengths may change."""
    tokenizer = byte_level_bpe()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), "é", "Ġx y"])
    return tokenizer


def gpt2_like() -> Tokenizer:
    """As in GPT-2 and RoBERTa: a space in front, and offsets without the spaces of a token."""
    tokenizer = byte_level_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    return tokenizer


def t5_like() -> Tokenizer:
    """As in T5 and XLM: NFKC, which makes two characters of one, and a token after each text."""
    tokenizer = unigram()
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return tokenizer


def bert_like() -> Tokenizer:
    """As in BERT: lower case, without accents, and a token before and after each text."""
    tokenizer = wordpiece()
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return tokenizer


# What encodes a text to other text, or says less about it.
STRANGE_KINDS: dict[str, Callable[[], Tokenizer]] = {
    make.__name__: make
    for make in (
        gemma_like,
        phi3_like,
        mistral_like,
        qwen_like,
        gpt2_like,
        t5_like,
        bert_like,
    )
}
ALL_KINDS = KINDS | STRANGE_KINDS
