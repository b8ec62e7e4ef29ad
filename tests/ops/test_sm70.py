"""The CUDA sources compile for a V100 too: by CUDA 12's run-time compiler, which needs no GPU and no nvcc.

CUDA 13, whose nvcc builds the library elsewhere, has forgotten sm_70. The compiler comes as a Python package
(nvidia-cuda-nvrtc-cu12) and knows no launches, so the launchers are left out under `__CUDACC_RTC__`, and each file ends
with one instantiation of each of its kernels.
"""

import ctypes
import importlib.metadata
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SOURCES = sorted((PROJECT / "csrc").glob("*.cu"))
PACKAGES = {"nvidia-cuda-nvrtc-cu12": "libnvrtc.so.12", "nvidia-cuda-runtime-cu12": "cuda_bf16.h"}
ARCHS = (70, 80, 90)


class Compiler:
    """NVRTC of CUDA 12, loaded from its own package: torch's CUDA 13 libraries stay as they are."""

    def __init__(self, library, headers):
        self._nvrtc = ctypes.CDLL(str(library))
        self._headers = headers
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def cubin(self, name, text, arch, kernels=()):
        """Machine code for `arch`, with the plain functions in `kernels` kept; raises RuntimeError with the log."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        try:
            for kernel in kernels:
                self._call("nvrtcAddNameExpression", program, f"megatron_ru::{kernel}".encode())
            options = [
                f"--gpu-architecture=sm_{arch}",
                "--std=c++17",
                # The header of the launchers declares functions of the host.
                "--device-as-default-execution-space",
                f"--include-path={PROJECT / 'csrc'}",
                f"--include-path={self._headers}",
            ]
            words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if self._nvrtc.nvrtcCompileProgram(program, len(options), words) != 0:
                raise RuntimeError(self._text("nvrtcGetProgramLog", program).decode())
            return self._text("nvrtcGetCUBIN", program)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _text(self, function, program):
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        found = ctypes.create_string_buffer(size.value)
        self._call(function, program, found)
        return found.raw

    def _call(self, function, *arguments):
        status = getattr(self._nvrtc, function)(*arguments)
        assert status == 0, f"{function} returned {status}"


def installed(package, file):
    """The path of a package's file."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: pip install -e '.[dev]'")
    return next(Path(entry.locate()) for entry in files if entry.name == file)


@pytest.fixture(scope="module")
def compiler():
    library, header = (installed(package, file) for package, file in PACKAGES.items())
    return Compiler(library, header.parent)


def kernels_of(text):
    """The names of the kernels in a source: (those that are templates, the others)."""
    text = re.sub(r"//[^\n]*", "", text)
    found = {True: set(), False: set()}
    for match in re.finditer(r"(template\s*<[^{};]*>\s*)?__global__\s+void\s+([^{;]*)", text):
        words = re.sub(r"__launch_bounds__\s*\([^()]*\)", "", match[2])
        name = re.match(r"\s*(\w+)\s*\(", words)
        if name is not None:
            found[match[1] is not None].add(name[1])
    return found[True], found[False]


def test_there_are_sources():
    assert len(SOURCES) >= 5
    assert all(any(kernels_of(path.read_text(encoding="utf-8"))) for path in SOURCES)


def test_compiler_is_one_that_knows_a_v100(compiler):
    assert compiler.version[0] == 12


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_compiles(compiler, path, arch):
    text = path.read_text(encoding="utf-8")
    templates, plain = kernels_of(text)
    cubin = compiler.cubin(path.name, text, arch, plain)
    assert cubin.startswith(b"\x7fELF")
    # A mangled name holds each of its words behind its length.
    assert sorted(name for name in templates | plain if f"{len(name)}{name}".encode() not in cubin) == []


def test_an_instruction_that_a_v100_lacks_is_noticed(compiler):
    """cp.async came with sm_80."""
    text = (
        "__global__ void copy(float4* to, const float4* from) {\n"
        "  extern __shared__ float4 buffer[];\n"
        "  unsigned at = __cvta_generic_to_shared(buffer);\n"
        '  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at), "l"(from));\n'
        "  to[0] = buffer[0];\n"
        "}\n"
    )
    assert compiler.cubin("copy.cu", text, 80)
    with pytest.raises(RuntimeError, match="sm_80"):
        compiler.cubin("copy.cu", text, 70)


def test_kernels_are_found_in_a_source():
    text = (
        "template <typename T, int kSize>\n__global__ void __launch_bounds__(256, 2) first(const A call) {}\n"
        "__global__ void second(int a) {}\n"
        "#ifdef __CUDACC_RTC__\ntemplate __global__ void megatron_ru::first<float, 2>(const A);\n#endif\n"
    )
    assert kernels_of(text) == ({"first"}, {"second"})
