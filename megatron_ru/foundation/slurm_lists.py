"""The two compressed lists that Slurm writes into the environment, read without scontrol."""

import re

from megatron_ru.foundation.errors import UserError


def expand_hosts(hosts: str) -> list[str]:
    """The names in a host list: `gpu[003-004,010],login1` gives gpu003, gpu004, gpu010, login1.

    Several brackets in a name multiply, the last one fastest. Raises UserError for what is no such list.
    """
    words = re.findall(r"(?:[^,\[\]\s]|\[[^\[\]\s]*\])+", hosts)
    if not words or ",".join(words) != hosts:
        raise UserError(f"{hosts!r} is not a Slurm host list such as gpu[003-005,010],login1")
    return [name for word in words for name in _names(word)]


def task_counts(counts: str) -> list[int]:
    """Tasks per node, node by node: `4(x2),3` gives 4, 4, 3. Raises UserError for what is no such list."""
    expanded: list[int] = []
    for word in counts.split(","):
        parts = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", word, re.ASCII)
        if parts is None:
            raise UserError(f"{counts!r} is not a Slurm list of task counts such as 4(x2),3")
        expanded += [int(parts[1])] * int(parts[2] or 1)
    return expanded


def _names(word: str) -> list[str]:
    opened = re.search(r"\[([^\]]*)\]", word)
    if opened is None:
        return [word]
    middles: list[str] = []
    for item in opened[1].split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", item, re.ASCII)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise UserError(f"{word!r} is not a Slurm host list such as gpu[003-005,010],login1")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        middles += [f"{number:0{len(ends[1])}d}" for number in range(first, last + 1)]
    head, tails = word[: opened.start()], _names(word[opened.end() :])
    return [f"{head}{middle}{tail}" for middle in middles for tail in tails]
