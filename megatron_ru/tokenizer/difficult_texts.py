"""Texts on which tokenizers have been seen to disagree, and neighbours of them."""

import random
from collections.abc import Sequence

_ALONE = (
    "", " ", "  ", "\n", "\t", "\r\n", "\0", "\ufeff", "\u00a0", "\u3000", "\u200b", "▁", "▁▁", " ▁ ", "Ġ", "Ċ",
    "<0x0A>", "<0xBC>", "<0xDE>", "<0xF9>", "##", "</w>", "1234", "12 345,67", "½²³", "١٢٣", "1\n2", "a1b2", "x" * 300,
    "ab" * 150, " " * 70, "\n" * 40, "\t \t " * 20, "ааааа ааа", "=" * 90, "-" * 33 + ">" * 33,
    "'s 'll don't I'M can’t", "«Ёлка»", "ёЁ", "\u0435\u0308", "\u0439", "\u0438\u0306", "е\u0301",
    "a\u0301\u0323\u0307", "\u0301", " \u0301x", "ﬁ ﬀ ſ İ ı ß ẞ Ǆ", "Å Å Å", "ᾳ Σίσυφος", "שָׁלוֹם", "مرحبا بالعالم",
    "\u202eабв\u202c", "हिन्दी", "ไทย", "日本語 の　文", "한국어", "👩\u200d👩\u200d👧\u200d👦🏳\ufe0f\u200d🌈🇷🇺",
    "e\u200dx", "𝒳𐍈\U000e0041",
    "интеллект Интеллект ИНТЕЛЛЕКТ", "https://пример.рф/a?b=c&d=%20#e", "if x:\n    return\n\n\n\tpass  \n",
    " a  b   c ", "слово \n слово", "слово\n \n  слово", "слово\r\rслово\x0b\x0cслово\x85слово\u2028слово",
    "…—–-‐‑", "№§©™", "\ue000\uffff\U0010ffff",
)  # fmt: skip


def difficult_texts(control_pieces: Sequence[str] = ()) -> list[str]:
    """The texts, always the same: short ones, `control_pieces` alone and between letters, and mixtures of all that."""
    spelled = [*control_pieces[:64], *(f"a{piece}b {piece} {piece}\n" for piece in control_pieces[:64])]
    alone = [*_ALONE, *spelled]
    generator = random.Random(20_26)
    mixed = ["".join(generator.choices(alone, k=generator.randrange(2, 9))) for _ in range(200)]
    return [*alone, *mixed, "".join(generator.choices(alone, k=300))]
