"""What the first step needs and a load does not: loaded by a thread while the checkpoint is read.

That is cuBLAS with its workspace and the first kernels. Nothing here draws random numbers, meets other ranks or touches
the model.
"""

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

from megatron_ru.seams.seam import Seam

_ROWS = 256


def warm_up_seams() -> list[Seam]:
    """The seam around the loading."""
    return [
        Seam(
            target="megatron.training.training:load_checkpoint",
            make=_beside,
            reason="the processor and the device wait for files meanwhile",
        )
    ]


def _beside(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(*arguments: Any, **keywords: Any) -> Any:
        device = _device()
        if device is not None:
            # Nobody waits for it: what is not loaded by then, the first step loads.
            threading.Thread(target=warm_up, args=(device,), name="ru-warm-up", daemon=True).start()
        return original(*arguments, **keywords)

    return load_checkpoint


def warm_up(device: int) -> None:
    """Loads what can be loaded for this GPU; what fails is not missed before it is used."""
    try:
        _use_device(device)
    except Exception as error:
        logging.getLogger(__name__).debug("something was not warmed up: %s", error)


def _device() -> int | None:
    """The GPU of this thread; a new thread begins at the first one."""
    import torch

    from megatron_ru.seams.cpu_device import CPU_DEVICE

    return None if CPU_DEVICE.installed or not torch.cuda.is_initialized() else torch.cuda.current_device()


def _use_device(device: int) -> None:
    import torch

    torch.cuda.set_device(device)
    # A stream of its own: the default one belongs to the load.
    with torch.cuda.stream(torch.cuda.Stream()):
        for dtype in (torch.bfloat16, torch.float32):
            weight = torch.zeros(_ROWS, _ROWS, dtype=dtype, device="cuda", requires_grad=True)
            hidden = torch.nn.functional.silu(weight @ weight)
            torch.nn.functional.softmax(hidden, -1).sum().backward()
        torch.cuda.current_stream().synchronize()
