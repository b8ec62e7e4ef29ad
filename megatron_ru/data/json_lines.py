"""The text of a line that is known, or hoped, to be a document."""

from megatron_ru.text.jsonl import parse_object

try:
    from orjson import loads

    def text_of(line: bytes, field: str) -> str:
        """The text; an exception of any kind, or something that is no string, where there is none."""
        found: str = loads(line)[field]
        return found

except ImportError:

    def text_of(line: bytes, field: str) -> str:
        """The text; raises MalformedLine where there is none."""
        return str(parse_object(line, field)[field])
