"""What a piece of a vocabulary stands for in text, whatever the format calls it."""

from functools import cache

from megatron_ru.tokenizer.loading import HuggingFaceTokenizer, Tokenizer


def piece_texts(tokenizer: Tokenizer) -> set[bytes]:
    """The bytes of text of each piece, a blank for the sign of one, single bytes and control tokens left out.

    So pieces of different formats can be compared: `▁the` of sentencepiece and `Ġthe` of byte-level BPE are one.
    """
    pieces = tokenizer.text_pieces()
    if is_byte_level(tokenizer):
        table = byte_level_table()
        return {
            bytes(table[character] for character in piece)
            for piece in pieces
            if len(piece) > 1 and all(character in table for character in piece)
        }
    return {piece.replace("▁", " ").encode("utf-8") for piece in pieces}


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether its pieces spell bytes by stand-in characters."""
    return isinstance(tokenizer, HuggingFaceTokenizer) and "ByteLevel" in str(tokenizer.description.get("decoder"))


@cache
def byte_level_table() -> dict[str, int]:
    """The byte of each stand-in character of GPT-2: printable Latin-1 is itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}
