"""Small tokenizers of the families that texts are aligned between, and texts that are hard to cut."""

import json
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SCRIPTS = [
    *("hello", "Hello", "the", "teacher", "Straße", "naïve", "cafe\u0301", "ﬁne", "İstanbul", "don't", "été"),
    *("привет", "мир", "γεια", "שלום", "مرحبا", "हिन्दी", "ไทย", "한국어", "日本語", "中文", "…", "½", "Ⅷ"),
    *(
        "😀",
        "👩\u200d👩\u200d👧",
        "🇩🇪",
        "👍🏽",
        "o\u0302\u0323",
        "\u0301",
        "\u200b",
        "\ufeff",
        "\x00",
        "\x7f",
        "\u00a0",
    ),
    *("def f(x):\n\treturn x+1\n", "a[i] != b;", "//", "#include <x>", "{}", "**kw", "<unk>", "##x", "▁"),
    *(
        " ",
        "  ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        "    ",
        ".",
        ",",
        "!?",
        "12",
        "345",
        "3.14159",
        "1,000,000",
        "0x1F",
    ),
]


def texts(count: int, seed: int = 0) -> list[str]:
    """Mixed scripts, emoji, combining marks, code, tabs, spaces and numbers; empty and one-token ones too."""
    generator = random.Random(seed)

    def piece() -> str:
        if generator.random() < 0.9:
            return generator.choice(SCRIPTS) + generator.choice(["", " ", " ", "  "])
        point = generator.choice([generator.randrange(0x3000), generator.randrange(0xE000, 0x20000)])
        return chr(point)

    sizes = [generator.choice([0, 1, 1, 2, 3, 5, 8, 13, 40]) for _ in range(count)]
    return ["".join(piece() for _ in range(size)) for size in sizes]


def byte_level(size: int = 500, seed: int = 1, **special: str) -> PreTrainedTokenizerFast:
    """BPE over bytes, digits one by one, as GPT-2 spells them."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = special or {"eos_token": "<eos>", "pad_token": "<pad>"}
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(dict.fromkeys(names.values())),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(2000, seed), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def sentence_piece(size: int = 800, seed: int = 2) -> PreTrainedTokenizerFast:
    """BPE with a byte for what it does not know, ▁ for spaces and one before the text, as Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    options = {"special_tokens": names, "limit_alphabet": 100, "show_progress": False}
    tokenizer.train_from_iterator(texts(2000, seed), trainers.BpeTrainer(vocab_size=size, **options))
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] in special]
    made = Tokenizer.from_str(json.dumps(plain))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def unigram(size: int = 3000, seed: int = 3) -> PreTrainedTokenizerFast:
    """Unigram over NFKC text, as T5 and XLM-R have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    options = {"special_tokens": special, "unk_token": "<unk>", "show_progress": False}
    tokenizer.train_from_iterator(texts(2000, seed), trainers.UnigramTrainer(vocab_size=size, **options))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def without(tokenizer: PreTrainedTokenizerFast, letter: str) -> PreTrainedTokenizerFast:
    """The same byte-level tokenizer, which has no token for one byte, and so leaves it out of every text."""
    (token,) = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(letter)[0][0]
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    names = plain["model"]["vocab"]
    names[f"no {token}"] = names.pop(token)
    plain["model"]["merges"] = [pair for pair in plain["model"]["merges"] if token not in "".join(pair)]
    made = Tokenizer.from_str(json.dumps(plain))
    return PreTrainedTokenizerFast(tokenizer_object=made, **tokenizer.special_tokens_map)
