"""Where the ranks of an mpirun meet, when nobody exported MASTER_ADDR and MASTER_PORT.

A short-lived child of every rank starts MPI, hears from rank 0 an address that every host could reach and a
free port, finalizes MPI and ends; the trainer itself never holds MPI. An MPI alive in the trainer would keep
the whole job waiting after an uncaught exception, and hide the exit code. A child rather than an exec of the
trainer: a rank that waits for the others in vain is stopped after a time, and nothing of the caller (stdin,
`-c`, what `import torch` already did) has to run twice. For the launcher this is a rank whose wrapper ran an
MPI program and went on.
"""

import contextlib
import fcntl
import ipaddress
import json
import logging
import os
import secrets
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.ranks import (
    LOOPBACK,
    LaunchedRanks,
    RankEnvironment,
    apply_rank_environment,
    free_port,
    launched_ranks,
)

# From the start of one rank until all have started; a large machine may need a minute or two for it.
START_SECONDS = 180.0


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What MPI told one rank."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int


def ensure_rendezvous(
    environ: MutableMapping[str, str] = os.environ, start_seconds: float = START_SECONDS
) -> RankEnvironment:
    """The rank environment, its six variables set in `environ`; MPI is asked only under a launcher of MPI.

    Without a usable mpi4py a run on one host meets at 127.0.0.1 and a port made of the launcher's job id.
    Raises UserError for contradictory ranks, for hosts that cannot meet without mpi4py, for ranks of which
    some got MASTER_ADDR or MASTER_PORT and some did not, and what `rank_environment` raises.
    """
    ranks = launched_ranks(environ)
    if _needs_mpi(ranks, environ):
        met = _ask_mpi(ranks, environ, start_seconds)
        if isinstance(met, Meeting):
            _export(met, ranks, environ)
        elif not ranks.on_one_host:
            raise UserError(
                f"rank {ranks.rank} cannot learn {_lacking(environ) or 'its local rank'} over MPI ({met}): "
                "pip install mpi4py for the MPI that starts the ranks, or export MASTER_ADDR and MASTER_PORT "
                "on every host (Open MPI: mpirun -x MASTER_ADDR -x MASTER_PORT)"
            )
        elif ranks.rank == 0:
            logging.getLogger(__name__).warning(
                "no rendezvous over MPI (%s): all ranks are on this host and meet at %s", met, LOOPBACK
            )
    return apply_rank_environment(environ)


def main() -> None:
    """The child: prints a Meeting as JSON. Exit code 3 means no usable MPI, 4 that the ranks cannot meet."""
    try:
        import mpi4py

        mpi4py.rc.thread_level = "funneled"  # the listener's thread makes no MPI calls
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        print(f"mpi4py: {error}".splitlines()[0], file=sys.stderr)
        sys.exit(_NO_MPI)
    expected = sys.argv[-1]
    if expected != "None" and MPI.COMM_WORLD.Get_size() != int(expected):
        # A singleton: mpi4py found the library of another MPI than the launcher's.
        library, seen = MPI.Get_library_version().split(",")[0], MPI.COMM_WORLD.Get_size()
        print(f"mpi4py uses {library} and sees {seen} of the {expected} started ranks", file=sys.stderr)
        MPI.Finalize()
        sys.exit(_NO_MPI)
    try:
        meeting = _meet(MPI, os.environ)
    except UserError as error:
        print(error, file=sys.stderr)
        MPI.Finalize()
        sys.exit(_CANNOT_MEET)
    MPI.Finalize()
    print(json.dumps(asdict(meeting)))


_NO_MPI, _CANNOT_MEET = 3, 4


def _needs_mpi(ranks: LaunchedRanks, environ: Mapping[str, str]) -> bool:
    if ranks.launcher is None or ranks.by_srun or ranks.world_size == 1:
        return False
    return None in (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) or bool(_lacking(environ))


def _lacking(environ: Mapping[str, str]) -> str:
    return " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name))


def _export(met: Meeting, ranks: LaunchedRanks, environ: MutableMapping[str, str]) -> None:
    """Sets what neither the caller nor the launcher gave.

    The launcher's local rank stays: Open MPI 5 may number a host's ranks in another order than MPI does.
    """
    for variable, value in (
        ("RANK", met.rank),
        ("WORLD_SIZE", met.world_size),
        ("LOCAL_RANK", met.local_rank),
        ("LOCAL_WORLD_SIZE", met.local_world_size),
        ("MASTER_ADDR", met.master_address),
        ("MASTER_PORT", met.master_port),
    ):
        if variable not in ranks.names and not environ.get(variable):
            environ[variable] = str(value)


def _ask_mpi(ranks: LaunchedRanks, environ: Mapping[str, str], start_seconds: float) -> Meeting | str:
    """What MPI says, or why there is no usable MPI. Raises UserError when the ranks cannot meet."""
    package_root = str(Path(__file__).resolve().parents[2])
    program = (
        f"import sys; sys.path.append({package_root!r}); from megatron_ru.foundation.mpi_rendezvous import main; main()"
    )
    process_manager = environ.get("PMI_FD", "")  # an open descriptor, by which MPICH's ranks talk to hydra
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-c", program, str(ranks.world_size)],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            pass_fds=[int(process_manager)] if process_manager.isdigit() else [],
            timeout=start_seconds,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"rank {ranks.rank} waited {start_seconds:.0f} s for the other ranks of {ranks.launcher}: if "
            "only some ranks have MASTER_ADDR and MASTER_PORT, give them to all (Open MPI: mpirun "
            "-x MASTER_ADDR -x MASTER_PORT), else look for hosts on which nothing started"
        ) from None
    complaint = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    if child.returncode == _NO_MPI:
        return complaint
    if child.returncode == _CANNOT_MEET:
        raise UserError(complaint)
    if child.returncode != 0:
        raise UserError(
            f"MPI failed in rank {ranks.rank} while rank 0's address was being sent ({complaint}): export "
            "MASTER_ADDR and MASTER_PORT to do without MPI"
        )
    # A library may print above our line.
    return Meeting(**json.loads(child.stdout.strip().splitlines()[-1]))


def _meet(mpi: Any, environ: Mapping[str, str]) -> Meeting:
    """Collective over all ranks. Raises UserError in all of them, or in none."""
    world = mpi.COMM_WORLD
    host = world.Split_type(mpi.COMM_TYPE_SHARED)
    rank, world_size = world.Get_rank(), world.Get_size()
    local_rank, local_world_size = host.Get_rank(), host.Get_size()
    host.Free()
    address = _same_everywhere(world, "MASTER_ADDR", environ)
    port = _same_everywhere(world, "MASTER_PORT", environ)
    if port is None:
        port = world.bcast(str(free_port()) if rank == 0 else None)
    if address is None:
        on_one_host = world.allreduce(local_world_size, op=mpi.MIN) == world_size
        address = LOOPBACK if on_one_host else _reachable_address(world, int(port), leads_host=local_rank == 0)
    return Meeting(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_address=address,
        master_port=int(port),
    )


def _same_everywhere(world: Any, name: str, environ: Mapping[str, str]) -> str | None:
    """The variable's value on the ranks that have it."""
    values = world.allgather(environ.get(name) or None)
    given = sorted({value for value in values if value is not None})
    if len(given) > 1:
        first, second = given[:2]
        raise UserError(
            f"{name} is {first} for rank {values.index(first)} and {second} for rank {values.index(second)}: "
            f"export one value for all ranks, or unset {name} everywhere"
        )
    return given[0] if given else None


def _reachable_address(world: Any, port: int, leads_host: bool) -> str:
    """The first of rank 0's addresses that a process on every host could connect to."""
    nonce = secrets.token_bytes(16)
    with contextlib.ExitStack() as stack:
        offer = None
        if world.Get_rank() == 0:
            stack.enter_context(_listening(port, nonce))
            offer = (_own_addresses(), nonce)
        candidates, nonce = world.bcast(offer)
        reached = [not leads_host or _answers(address, port, nonce) for address in candidates]
        everywhere = [all(column) for column in zip(*world.allgather(reached), strict=True)]
        world.barrier()
    for address, good in zip(candidates, everywhere, strict=True):
        if good:
            return str(address)
    raise UserError(
        f"no address of rank 0's host ({', '.join(candidates)}) was reached on port {port} from every host: "
        "open the hosts' firewall to each other, or export MASTER_ADDR and MASTER_PORT"
    )


def _own_addresses() -> list[str]:
    """The IPv4 addresses of this host's interfaces in the kernel's order, and last the host's own name."""
    addresses = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, interface in socket.if_nameindex():
            request = struct.pack("256s", interface.encode())
            with contextlib.suppress(OSError):  # an interface without IPv4
                reply = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
                addresses.append(ipaddress.IPv4Address(reply[20:24]))
    usable = [str(address) for address in addresses if not (address.is_loopback or address.is_link_local)]
    return [*dict.fromkeys(usable), socket.gethostname()]


_SIOCGIFADDR = 0x8915  # linux/sockios.h


@contextlib.contextmanager
def _listening(port: int, nonce: bytes) -> Any:
    """Tells whoever connects the nonce, so that a stranger on that port is not taken for rank 0."""
    with socket.create_server(("", port), backlog=1024) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):  # the server was shut down
                while True:
                    connection, _ = server.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.settimeout(_PROBE_SECONDS)
                        connection.sendall(nonce)
                        # The other side closes first, so that no TIME_WAIT stays on this port.
                        connection.recv(1)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


_PROBE_SECONDS = 3.0


def _answers(address: str, port: int, nonce: bytes) -> bool:
    with (
        contextlib.suppress(OSError),
        socket.create_connection((address, port), timeout=_PROBE_SECONDS) as connection,
        connection.makefile("rb") as stream,
    ):
        return stream.read(len(nonce)) == nonce
    return False
