"""Compiles csrc/ into one shared library of torch operators, with the compilers that the machine has.

    build(kind="auto")      megatron-ru build, scripts/bootstrap.sh and setup.py

The CPU kernels need a C++ compiler and nothing else; CUDA kernels need an nvcc whose major version is that of the
CUDA which torch was built with. The library belongs to one torch version and one state of the sources; both stand in
its name. Object files are kept by the hash of what went into them, so a changed file alone is compiled again.

The module imports the standard library alone; torch is asked for its headers when something is built.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_ru import __version__
from megatron_ru.foundation.errors import UserError

KINDS = ("auto", "cpu", "cuda", "none")
KIND_VARIABLE = "MEGATRON_RU_BUILD"
ARCHS_VARIABLE = "MEGATRON_RU_CUDA_ARCHES"

_PACKAGE = Path(__file__).resolve().parents[1]
# -fno-math-errno and -fno-trapping-math allow vectors where C would want errno and traps; sums keep their order.
_CPU_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
_BINDING_FLAGS = ("-O2", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden")
_CUDA_FLAGS = ("-O3", "-std=c++20", "-Xcompiler=-fPIC", "--expt-relaxed-constexpr", "-lineinfo")
_TRIAL = "import torch; torch.ops.load_library({path!r}); torch.ops.megatron_ru.build_info()"
_KEPT_LINES = 12
_OBJECT_DAYS = 14


@dataclass(frozen=True, kw_only=True)
class Torch:
    """What the compiler has to know of the torch that the library is for."""

    version: str
    cuda: str | None
    """CUDA version it was built with."""
    cxx11_abi: bool
    folder: Path
    sees_gpu: bool

    @classmethod
    def running(cls) -> "Torch":
        """The torch of this interpreter. Raises UserError when there is none."""
        try:
            import torch
        except ImportError as error:
            raise UserError(f"the ops are built against torch, which cannot be imported here: {error}") from error
        return cls(
            version=torch.__version__,
            cuda=torch.version.cuda,
            cxx11_abi=bool(torch._C._GLIBCXX_USE_CXX11_ABI),
            folder=Path(torch.__file__).parent,
            sees_gpu=torch.cuda.is_available(),
        )

    @property
    def libraries(self) -> Path:
        """The folder of libtorch_cpu.so."""
        return self.folder / "lib"

    @property
    def includes(self) -> list[Path]:
        """The folders of its headers."""
        return [self.folder / "include", self.folder / "include/torch/csrc/api/include"]

    @property
    def cuda_wheels(self) -> list[Path]:
        """Folders of the CUDA wheels beside torch for its CUDA: include, lib and perhaps bin are in them."""
        beside = self.folder.parent / "nvidia"
        # From CUDA 13 on one folder holds them all; wheels for CUDA 12 may lie beside it.
        ours = beside / f"cu{(self.cuda or '').partition('.')[0]}"
        folders = [ours] if ours.is_dir() else sorted(beside.glob("*"))
        return [path for path in folders if (path / "include").is_dir() or (path / "bin").is_dir()]


@dataclass(frozen=True, kw_only=True)
class Nvcc:
    """A CUDA compiler."""

    path: Path
    version: tuple[int, int]

    @property
    def root(self) -> Path:
        """The folder that holds its bin, include and lib64."""
        return self.path.resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be built, and why that."""

    kind: str
    """cpu, cuda or none."""
    reason: str
    compiler: str | None = None
    nvcc: Nvcc | None = None
    archs: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Built:
    """The outcome."""

    path: Path | None
    """The library; None where nothing is built, for `plan.reason`."""
    plan: Plan
    compiled: int
    """How many files were compiled; 0 when the library was there."""
    seconds: float


def build(
    kind: str = "auto",
    archs: Sequence[int] = (),
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Built:
    """Builds what `plan_build` chooses, unless it is there already. `force` compiles every file again.

    Several processes may call it at once: one builds, the others wait and find the library. Raises UserError with the
    compiler's last lines when it fails.
    """
    started = time.monotonic()
    if kind == "none":
        return Built(path=None, plan=Plan(kind="none", reason="asked for none"), compiled=0, seconds=0.0)
    torch = Torch.running()
    plan = plan_build(kind, archs, torch)
    if plan.kind == "none":
        return Built(path=None, plan=plan, compiled=0, seconds=time.monotonic() - started)
    sources = sources_folder()
    if sources is None:
        raise UserError(
            f"the sources of the ops were not found: neither {_PACKAGE.parent / 'csrc'} nor {_PACKAGE / 'csrc'} holds "
            "bindings.cpp; install megatron-ru from its wheel or from a checkout"
        )
    folder = output_folder()
    found = source_hash(sources, plan.kind)
    name = library_name(torch.version, plan.kind, plan.archs, found)
    target = folder / name
    with _locked(folder / ".lock"):
        if target.exists() and not force:
            # The newest library is the one that is loaded, so the one that was asked for becomes that.
            os.utime(target)
            return Built(path=target, plan=plan, compiled=0, seconds=time.monotonic() - started)
        say(f"building {name} ({plan.reason})")
        compiled = _compile_and_link(sources, plan, torch, target, force)
        if source_hash(sources, plan.kind) != found:
            # The name would promise what the library does not hold.
            target.unlink()
            raise UserError(
                f"sources in {sources} have changed while they were compiled: run `megatron-ru build` again"
            )
        _remove_stale(folder, target, torch.version, plan.kind)
    return Built(path=target, plan=plan, compiled=compiled, seconds=time.monotonic() - started)


def plan_build(kind: str, archs: Sequence[int], torch: Torch) -> Plan:
    """Which kernels `kind` stands for on this machine, with which compilers.

    `auto`, which MEGATRON_RU_BUILD may replace, takes CUDA kernels where torch sees a GPU or architectures are named,
    since they take minutes to compile; else CPU kernels; else none. Raises UserError when what was asked for by name
    cannot be built.
    """
    if kind == "auto":
        kind = os.environ.get(KIND_VARIABLE) or "auto"
    if kind not in KINDS:
        raise UserError(f"{kind!r} is no kind of build ({KIND_VARIABLE} or --kind): expected {', '.join(KINDS)}")
    archs = tuple(archs) or _archs_of_environment()
    if kind == "none":
        return Plan(kind="none", reason=f"{KIND_VARIABLE}=none")
    compiler = find_compiler()
    if compiler is None:
        reason = "no C++ compiler was found: apt install g++, or set CXX"
        if kind == "auto":
            return Plan(kind="none", reason=reason)
        raise UserError(f"the {kind} ops cannot be built: {reason}")
    if kind == "cpu":
        return Plan(kind="cpu", reason="asked for", compiler=compiler)
    nvcc, missing = _nvcc_for(torch)
    if nvcc is None:
        if kind == "auto":
            return Plan(kind="cpu", reason=f"CPU ops alone: {missing}", compiler=compiler)
        raise UserError(f"the CUDA ops cannot be built: {missing}")
    if kind == "auto" and not torch.sees_gpu and not archs:
        reason = (
            f"CPU ops alone: torch sees no GPU here (megatron-ru build --kind cuda compiles for one with {nvcc.path})"
        )
        return Plan(kind="cpu", reason=reason, compiler=compiler)
    archs = archs or default_archs(nvcc)
    why = "asked for" if kind == "cuda" else "torch sees a GPU" if torch.sees_gpu else "architectures were named"
    return Plan(kind="cuda", reason=why, compiler=compiler, nvcc=nvcc, archs=tuple(sorted(set(archs))))


def default_archs(nvcc: Nvcc) -> tuple[int, ...]:
    """A100 and H100 or H200; V100 too where nvcc can still compile for it."""
    return (80, 90) if nvcc.version >= (13, 0) else (70, 80, 90)


def parse_archs(words: str) -> tuple[int, ...]:
    """Compute capabilities as whole numbers from `80,90`, `8.0;9.0` or `sm_80 sm_90`. Raises UserError."""
    found = []
    for word in re.split(r"[\s,;]+", words.strip()):
        digits = re.fullmatch(r"(?:sm_|compute_)?(\d{1,2})\.?(\d)", word)
        if digits is None:
            raise UserError(f"{word!r} is no CUDA architecture: expected numbers such as 80,90 for A100 and H100")
        found.append(int(digits[1] + digits[2]))
    return tuple(found)


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of g++, c++ and clang++ on PATH."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


def find_nvccs(torch: Torch) -> list[Nvcc]:
    """Every nvcc that runs: of CUDA_HOME, /usr/local/cuda, PATH and the CUDA wheels beside torch, in that order."""
    homes = [Path(value) for name in ("CUDA_HOME", "CUDA_PATH") if (value := os.environ.get(name))]
    candidates = [home / "bin/nvcc" for home in (*homes, Path("/usr/local/cuda"))]
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates += [wheel / "bin/nvcc" for wheel in torch.cuda_wheels]
    found: list[Nvcc] = []
    for path in candidates:
        version = _nvcc_version(path) if path.is_file() else None
        if version is not None and path.resolve() not in [nvcc.path.resolve() for nvcc in found]:
            found.append(Nvcc(path=path, version=version))
    return found


def sources_folder() -> Path | None:
    """csrc of the checkout, or the copy that a wheel carries; None when neither holds the bindings."""
    for folder in (_PACKAGE.parent / "csrc", _PACKAGE / "csrc"):
        if (folder / "bindings.cpp").is_file():
            return folder
    return None


def source_hash(folder: Path, kind: str) -> str:
    """Twelve hexadecimal digits of what a library of `kind`, cpu or cuda, is made from: sources and flags."""
    cuda = kind == "cuda"
    digest = hashlib.sha256(repr((_CPU_FLAGS, _BINDING_FLAGS, _CUDA_FLAGS if cuda else ())).encode())
    for path in _sources(folder, ".cpp", ".h", *((".cu", ".cuh") if cuda else ())):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def library_name(torch_version: str, kind: str, archs: Sequence[int], sources: str) -> str:
    """`megatron_ru_ops-0.1.0-torch2.14.1+cu130-cuda_80_90-0123456789ab.so`."""
    built_for = "_".join([kind, *map(str, archs)])
    return f"megatron_ru_ops-{__version__}-torch{torch_version}-{built_for}-{sources}.so"


def output_folders() -> tuple[Path, Path]:
    """Where libraries lie: in the package, and in the user's cache for packages that cannot be written to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return _PACKAGE / "ops/_compiled", cache / "megatron_ru"


def output_folder() -> Path:
    """The first of `output_folders` that can be written to, created. Raises UserError when none can."""
    for folder in output_folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            # What is built is nobody's source, whatever the checkout around it ignores.
            (folder / ".gitignore").write_text("*\n")
            return folder
    tried = " or ".join(map(str, output_folders()))
    raise UserError(f"the library cannot be written to {tried}: make one of them writable")


def _archs_of_environment() -> tuple[int, ...]:
    words = os.environ.get(ARCHS_VARIABLE, "")
    return parse_archs(words) if words.strip() else ()


def _nvcc_for(torch: Torch) -> tuple[Nvcc | None, str]:
    """An nvcc of torch's CUDA major version, or None and why."""
    if torch.cuda is None:
        return None, f"torch {torch.version} is built without CUDA"
    found = find_nvccs(torch)
    if not found:
        return None, "no nvcc was found in CUDA_HOME, /usr/local/cuda, PATH or the CUDA wheels"
    major = int(torch.cuda.partition(".")[0])
    for nvcc in found:
        if nvcc.version[0] == major:
            return nvcc, ""
    versions = ", ".join(f"{nvcc.path} is {nvcc.version[0]}.{nvcc.version[1]}" for nvcc in found)
    return None, f"torch {torch.version} is built with CUDA {torch.cuda} and needs an nvcc {major}.x; {versions}"


def _nvcc_version(path: Path) -> tuple[int, int] | None:
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release (\d+)\.(\d+)", shown.stdout)
    return (int(release[1]), int(release[2])) if release else None


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One file to compile."""

    source: Path
    command: tuple[str, ...]
    object_path: Path


def _compile_and_link(sources: Path, plan: Plan, torch: Torch, target: Path, force: bool) -> int:
    """The number of compiled files; the library appears under its name once it is whole."""
    objects = _object_folder(target.parent)
    steps = _steps(sources, plan, torch, objects)
    missing = [step for step in steps if force or not step.object_path.exists()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=max(1, int(os.environ.get("MAX_JOBS") or cores))) as pool:
        # The first failure ends the build; what has not begun is given up.
        try:
            for _ in pool.map(_compile, missing):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _link([step.object_path for step in steps], plan, torch, target)
    _forget_old_objects(objects)
    return len(missing)


def _steps(sources: Path, plan: Plan, torch: Torch, objects: Path) -> list[_Step]:
    """The files in the order they are compiled: the bindings first, which take longest."""
    assert plan.compiler is not None
    headers = hashlib.sha256(b"\0".join(path.read_bytes() for path in _sources(sources, ".h", ".cuh"))).hexdigest()
    include = f"-I{sources / 'include'}"
    binding = [plan.compiler, *_BINDING_FLAGS, include, *(f"-isystem{path}" for path in torch.includes)]
    binding.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}")
    commands: list[tuple[Path, list[str]]] = []
    if plan.nvcc is not None:
        # A string, which `torch.ops.megatron_ru.build_info()` tells.
        binding.append(f'-DMEGATRON_RU_CUDA="{",".join(map(str, plan.archs))}"')
        binding += [f"-isystem{path}" for path in _cuda_includes(plan.nvcc, torch)]
    commands.append((sources / "bindings.cpp", binding))
    if plan.nvcc is not None:
        cuda = [str(plan.nvcc.path), *_CUDA_FLAGS, f"-ccbin={plan.compiler}", include, *_gencode(plan.archs)]
        commands += [(path, cuda) for path in sorted(sources.glob("*.cu"))]
    cpu = [plan.compiler, *_CPU_FLAGS, include]
    commands += [(path, cpu) for path in sorted((sources / "cpu").glob("*.cpp"))]
    steps = []
    for path, command in commands:
        tool = _tool_version(command[0])
        parts = (headers, tool, torch.version, str(torch.folder), repr(command), path.read_bytes().hex())
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        made = objects / f"{path.stem}-{key}.o"
        steps.append(_Step(source=path, command=tuple(command), object_path=made))
    return steps


def _gencode(archs: Sequence[int]) -> list[str]:
    """Machine code for each architecture, and PTX of the last for those that come after it."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def _cuda_includes(nvcc: Nvcc, torch: Torch) -> list[Path]:
    folders = [nvcc.root / "include", *(wheel / "include" for wheel in torch.cuda_wheels)]
    return [folder for folder in folders if folder.is_dir()]


def _compile(step: _Step) -> None:
    with _whole(step.object_path) as temporary:
        _run([*step.command, "-c", str(step.source), "-o", str(temporary)], f"compiling {step.source.name}")


def _link(objects: Sequence[Path], plan: Plan, torch: Torch, target: Path) -> None:
    assert plan.compiler is not None
    command = [plan.compiler, "-shared", *map(str, objects), f"-L{torch.libraries}", "-lc10", "-ltorch_cpu", "-ltorch"]
    command += _openmp(torch)
    if plan.nvcc is not None:
        # Torch's operators on CUDA are found by name at run time; the linker would leave the library out.
        command += ["-lc10_cuda", "-ltorch_cuda", str(_cuda_runtime(plan.nvcc, torch))]
    command.append(f"-Wl,-rpath,{torch.libraries}")
    with _whole(target) as temporary:
        _run([*command, "-o", str(temporary)], f"linking {target.name}")
        # A library that does not fit this torch ends the process that loads it: another process finds out.
        _run([sys.executable, "-c", _TRIAL.format(path=str(temporary))], f"loading {target.name}")


def _openmp(torch: Torch) -> list[str]:
    """Flags for the OpenMP runtime that torch brings, so that one pool of threads serves both."""
    carried = sorted(torch.libraries.glob("libgomp*.so*"))
    return [str(carried[0])] if carried else ["-fopenmp"]


def _cuda_runtime(nvcc: Nvcc, torch: Torch) -> Path:
    """libcudart.so of the toolkit, or of the wheel that torch uses: the same name, so one copy is loaded."""
    folders = [nvcc.root / "lib64", nvcc.root / "lib", nvcc.root / "targets/x86_64-linux/lib"]
    folders += [wheel / "lib" for wheel in torch.cuda_wheels]
    for folder in folders:
        found = sorted(folder.glob("libcudart.so*"))
        if found:
            return found[0]
    raise UserError(f"libcudart.so was not found beside {nvcc.path} or torch: install the CUDA runtime's package")


def _run(command: Sequence[str], doing: str) -> None:
    shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if shown.returncode != 0:
        lines = [line for line in shown.stdout.splitlines() if line.strip()]
        # The first error explains, the lines after it follow from it.
        last = max(0, len(lines) - _KEPT_LINES)
        first = next((number for number, line in enumerate(lines) if "rror: " in line), last)
        said = "\n    ".join(lines[first : first + _KEPT_LINES])
        raise UserError(f"{doing} failed: {command[0]} ended with {shown.returncode} and said:\n    {said}")


def _tool_version(program: str) -> str:
    shown = subprocess.run([program, "--version"], capture_output=True, text=True)
    return shown.stdout


def _object_folder(library_folder: Path) -> Path:
    """Where object files are kept: build/ of a checkout, else beside the library."""
    checkout = _PACKAGE.parent
    folder = checkout / "build/ops" if (checkout / "csrc").is_dir() and os.access(checkout, os.W_OK) else None
    folder = folder or library_folder / "objects"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _forget_old_objects(folder: Path) -> None:
    oldest = time.time() - _OBJECT_DAYS * 86400
    for path in folder.glob("*.o"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()


def _remove_stale(folder: Path, target: Path, torch_version: str, kind: str) -> None:
    """Removes libraries that `target` replaces: older sources, same torch and kind. They would never be loaded."""
    for path in folder.glob("megatron_ru_ops-*.so"):
        same = f"-torch{torch_version}-{kind}" in path.name
        if same and path != target and not path.name.endswith(target.name.rpartition("-")[2]):
            with contextlib.suppress(OSError):
                path.unlink()


def _sources(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A temporary name beside `target`, renamed to it when the block succeeds and removed when it does not."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock file; waits while another process does, and says so once."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("megatron-ru: another process is building the ops; waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
