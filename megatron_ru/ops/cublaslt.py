"""Products of fp8 matrices that are written or added to an fp32 matrix, which torch has no function for.

cuBLASLt is in every process in which torch multiplies on a GPU; it is called where it lies, so nothing is compiled.
Source: NVIDIA, "cuBLAS Library", chapter cublasLt: the numbers below are those of its header, stable since CUDA 11.8.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WORKSPACE = 32 * 2**20
_COMPUTE_FP32, _TYPE_FP32 = 68, 0
_TYPES = {torch.float32: 0, torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}
_TRANSPOSE_A, _SCALE_A, _SCALE_B, _MOST_WORKSPACE = 3, 17, 18, 1
_TRANSPOSED = 1


class _Choice(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


class _Plan(NamedTuple):
    description: ctypes.c_void_p
    layouts: tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    choice: _Choice


@functools.cache
def library() -> ctypes.CDLL | None:
    """The cuBLASLt that torch has loaded, or None."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libcublasLt.so" in line}
    return ctypes.CDLL(paths.pop()) if paths else None


def put_fp8_product(out: Tensor, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, add: bool) -> None:
    """Writes scale_a · scale_b · (a · bᵀ) to `out`, or adds it there.

    out: [rows, columns] fp32, contiguous; a: [rows, depth], b: [columns, depth], both contiguous, fp8, not both e5m2,
    sizes multiples of 16; scales: fp32 scalars on the device. Raises RuntimeError with cuBLASLt's status when it has no
    kernel.
    """
    lt = library()
    assert lt is not None
    with torch.cuda.device(out.device):
        plan = _plan(out.device.index, tuple(out.shape), a.shape[1], a.dtype, b.dtype)
        # Row by row is column by column with operands exchanged: cuBLASLt sees outᵀ = b · aᵀ.
        for attribute, scale in ((_SCALE_A, scale_b), (_SCALE_B, scale_a)):
            _set(lt.cublasLtMatmulDescSetAttribute, plan.description, attribute, ctypes.c_void_p(scale.data_ptr()))
        one, kept = ctypes.c_float(1.0), ctypes.c_float(float(add))
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (b, a, out)]
        layout_b, layout_a, layout_out = plan.layouts
        _check(
            lt.cublasLtMatmul(
                _handle(out.device.index), plan.description, ctypes.byref(one), pointers[0], layout_b, pointers[1],
                layout_a, ctypes.byref(kept), pointers[2], layout_out, pointers[2], layout_out,
                ctypes.byref(plan.choice), ctypes.c_void_p(_workspace(out.device.index).data_ptr()),
                ctypes.c_size_t(_WORKSPACE), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            ),
            "cublasLtMatmul",
        )  # fmt: skip


@functools.cache
def _plan(device: int, shape: tuple[int, int], depth: int, a: torch.dtype, b: torch.dtype) -> _Plan:
    lt = library()
    assert lt is not None
    description = _made(lt.cublasLtMatmulDescCreate, _COMPUTE_FP32, _TYPE_FP32)
    _set(lt.cublasLtMatmulDescSetAttribute, description, _TRANSPOSE_A, ctypes.c_int32(_TRANSPOSED))
    # Fast accumulation stays off: thousands of tokens are summed here.
    rows, columns = shape
    layouts = (
        _layout(lt, b, depth, columns),
        _layout(lt, a, depth, rows),
        _layout(lt, torch.float32, columns, rows),
    )
    preference = _made(lt.cublasLtMatmulPreferenceCreate)
    size = ctypes.c_size_t(_WORKSPACE)
    _set(lt.cublasLtMatmulPreferenceSetAttribute, preference, _MOST_WORKSPACE, size)
    choice, found = _Choice(), ctypes.c_int()
    _check(
        lt.cublasLtMatmulAlgoGetHeuristic(
            _handle(device), description, layouts[0], layouts[1], layouts[2], layouts[2], preference, 1,
            ctypes.byref(choice), ctypes.byref(found),
        ),
        "cublasLtMatmulAlgoGetHeuristic",
    )  # fmt: skip
    lt.cublasLtMatmulPreferenceDestroy(preference)
    if not found.value:
        raise RuntimeError(f"cuBLASLt has no kernel that adds a {a} by {b} product of {shape} to fp32")
    return _Plan(description, layouts, choice)


def _layout(lt: ctypes.CDLL, dtype: torch.dtype, rows: int, columns: int) -> ctypes.c_void_p:
    """Of a matrix that lies column by column."""
    sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
    return _made(lt.cublasLtMatrixLayoutCreate, _TYPES[dtype], *sizes)


@functools.cache
def _handle(device: int) -> ctypes.c_void_p:
    lt = library()
    assert lt is not None
    return _made(lt.cublasLtCreate)


@functools.cache
def _workspace(device: int) -> Tensor:
    return torch.empty(_WORKSPACE, dtype=torch.uint8, device=torch.device("cuda", device))


def _made(create: Callable[..., int], *arguments: Any) -> ctypes.c_void_p:
    made = ctypes.c_void_p()
    _check(create(ctypes.byref(made), *arguments), "cuBLASLt")
    return made


def _set(function: Callable[..., int], owner: ctypes.c_void_p, attribute: int, value: Any) -> None:
    _check(function(owner, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))), "cuBLASLt")


def _check(status: int, call: str) -> None:
    if status:
        raise RuntimeError(f"{call} ended with status {status}; see cublasStatus_t in NVIDIA's cuBLAS documentation")
