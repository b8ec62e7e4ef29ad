"""What faulthandler writes about a process, read back."""

import re
from collections.abc import Sequence

_BLOCK = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*?(?:most recent call first).*$", re.M)
_FRAME = re.compile(r'^ {2}File "(.*)", line (\d+|\?\?\?) in (.*)$', re.M)
# Files and functions in which a rank waits for others. With CUDA it is the synchronisation that waits.
_WAITING_FILE = re.compile(r"torch/distributed/|megatron/core/pipeline_parallel/p2p_communication|mpi4py")
_WAITING_CALL = re.compile(
    r"all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|barrier|broadcast|\bsynchronize\b|batch_isend_irecv", re.I
)
_LOOKED_AT = 6


def frames_of(written: str) -> tuple[str, ...]:
    """`FILE:LINE in FUNCTION` of the thread that was asked, innermost first, from the last time that it was asked."""
    starts = list(_BLOCK.finditer(written))
    asked = [start for start in starts if start[0].startswith("Current")]
    if not starts:
        return ()
    start = (asked or starts)[-1]
    following = [other.start() for other in starts if other.start() > start.start()]
    block = written[start.end() : following[0] if following else len(written)]
    return tuple(f"{file}:{line} in {function}" for file, line, function in _FRAME.findall(block))


def waits_for_others(frames: Sequence[str]) -> bool:
    """Whether the innermost of these frames are those of a collective."""
    return any(
        _WAITING_FILE.search(frame) or _WAITING_CALL.search(frame.rpartition(" in ")[2])
        for frame in frames[:_LOOKED_AT]
    )
