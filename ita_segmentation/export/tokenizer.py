"""open_clip's byte-pair tokenizer as a `tokenizer.json`, which the package `tokenizers` and the browser page read."""

from typing import Any

CLEANED_RANGES = ((0x80, 0x300), (0x2000, 0x2070), (0xFB00, 0xFB07), (0xFF00, 0xFFF0))
"""Characters among which ftfy replaces single ones: ligatures, curly quotes, characters of full width."""


def build_tokenizer(model: Any) -> Any:
    """Build the tokenizer of a model's text tower.

    It cleans text as open_clip does, but for text whose encoding was mistaken, which ftfy would repair.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    settings = model.config.clip_model_config["text_cfg"].get("tokenizer_kwargs") or {}
    clean = settings.get("clean", "lower")
    if settings.get("reduction_mask") or clean not in ("lower", "whitespace"):
        raise ValueError(f"the text tower's tokenizer has rules that cannot be exported: {settings}")
    source = model.clip_backbone.tokenizer
    special = list(source.all_special_ids)
    bpe = models.BPE(
        vocab={token: index for token, index in source.encoder.items() if index not in special},
        merges=sorted(source.bpe_ranks, key=source.bpe_ranks.__getitem__),
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
    )
    tokenizer = Tokenizer(bpe)
    replaced = [normalizers.Replace(old, new) for old, new in _replacements().items()]
    cleaned = [*replaced, normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if clean == "lower":
        cleaned.append(normalizers.Lowercase())
    tokenizer.normalizer = normalizers.Sequence(cleaned)
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    names = {index: token for token, index in source.encoder.items()}
    tokenizer.add_special_tokens([AddedToken(names[index], normalized=False) for index in special])
    return tokenizer


def _replacements() -> dict[str, str]:
    """Single characters that open_clip's cleaning replaces, beyond composing them."""
    import unicodedata

    import ftfy

    found = {}
    for first, last in CLEANED_RANGES:
        for character in map(chr, range(first, last)):
            fixed = ftfy.fix_text(character)
            if character.isprintable() and fixed != unicodedata.normalize("NFC", character):
                found[character] = fixed
    return found
