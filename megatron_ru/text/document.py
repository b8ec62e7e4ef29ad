"""The record that every stage of the text pipeline speaks."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    text: str
    """What the model reads; may be empty."""

    file: str = ""
    """The file that the text was read from; empty when it came from none."""

    line: int = 0
    """The line of `file`, counted from 1; 0 when there is none."""

    fields: Mapping[str, object] = field(default_factory=dict)
    """Everything else that stood beside the text, such as its domain and its source."""

    @property
    def place(self) -> str:
        """`file:line`, the form that editors and terminals make clickable."""
        return f"{self.file}:{self.line}"
