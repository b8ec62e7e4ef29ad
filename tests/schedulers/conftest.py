"""Real schedulers on hosts of this machine, each started once and ended with the session: `make test-schedulers`.

Fixtures for anybody: `hosts` (run, start, cut, heal, remove, restore, processes, left), `slurm`, `grid_engine`,
`open_mpi`. Where one cannot be had, its tests are skipped with the reason, and the end of the session counts them.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.schedulers import hosts as namespaces
from tests.schedulers import packages
from tests.schedulers.cluster import launch, make_environment, user_environment
from tests.schedulers.grid_engine_cluster import GridEngineCluster
from tests.schedulers.hosts import SYSTEM_PATH, Hosts
from tests.schedulers.slurm_cluster import SlurmCluster
from tests.schedulers.tiny_model import TinyModel
from tests.training_runs import Trainer

NOT_HERE = "no real scheduler"


# Before -m looks at the markers.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.schedulers)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many tests had no scheduler, and why: nobody shall take their silence for success."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NOT_HERE in str(report.longrepr)]
    reasons = {str(report.longrepr).partition(f"{NOT_HERE}: ")[2].rstrip("')") for report in skipped}
    if skipped:
        told = f"{len(skipped)} tests on real schedulers were NOT run: {'; '.join(sorted(reasons))}"
        terminalreporter.write_sep("!", told, red=True, bold=True)


def need(*wanted: dict[str, str]) -> None:
    reason = packages.why_missing(packages.HOSTS, *wanted) or namespaces.why_not()
    if reason is not None:
        pytest.skip(f"{NOT_HERE}: {reason}")


@pytest.fixture(scope="session")
def all_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Four hosts h0 (login) to h3 and the environment of a user on them."""
    need()
    folder = tmp_path_factory.mktemp("hosts")
    with Hosts(folder) as hosts:
        hosts.path.append(make_environment(folder) / "bin")
        hosts.environment.update(user_environment())
        yield hosts


@pytest.fixture
def hosts(all_hosts: Hosts) -> Iterator[Hosts]:
    """The hosts of the session; what a test leaves running on them is killed, and cut links are healed."""
    yield all_hosts
    for name in all_hosts.names:
        if not all_hosts.is_reachable(name):
            all_hosts.restore(name)
    all_hosts.clear()


@pytest.fixture(scope="session")
def slurm_session(all_hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    need(packages.SLURM)
    with SlurmCluster(all_hosts, tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_session: SlurmCluster, hosts: Hosts) -> Iterator[SlurmCluster]:
    """Slurm 22.05 over h1 and h2 with four GPUs each. A test's jobs are cancelled at its end."""
    yield slurm_session
    slurm_session.ask("scancel", "--user=root")
    slurm_session.wait_until_idle()


@pytest.fixture(scope="session")
def grid_engine_session(all_hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GridEngineCluster]:
    need(packages.GRID_ENGINE, packages.OPEN_MPI)
    with GridEngineCluster(all_hosts, tmp_path_factory.mktemp("grid_engine")) as cluster:
        yield cluster


@pytest.fixture
def grid_engine(grid_engine_session: GridEngineCluster, hosts: Hosts) -> Iterator[GridEngineCluster]:
    """Grid Engine 8.1.9 over h1 and h2 with the resource types of ABCI. A test's jobs are deleted at its end."""
    yield grid_engine_session
    grid_engine_session.clear()


@pytest.fixture(scope="session", params=["4.1", "5"])
def open_mpi(request: pytest.FixtureRequest, all_hosts: Hosts) -> dict[str, str]:
    """The variables that choose an Open MPI: Debian's, or pip's in this interpreter's environment."""
    need(packages.OPEN_MPI)
    path = all_hosts.login_environment()["PATH"]
    if request.param == "5":
        pip = Path(sys.executable).parent
        path = path.replace(SYSTEM_PATH, f"{pip}:{SYSTEM_PATH}")
    said = all_hosts.run("h0", ["mpirun", "--version"], env={"PATH": path}).stdout
    if f" {request.param}." not in said:
        pytest.skip(f"{NOT_HERE}: no Open MPI {request.param}: {said.strip()}")
    return {"PATH": path}


@pytest.fixture(scope="session")
def tiny_model(trainer: Trainer, all_hosts: Hosts) -> TinyModel:
    """A tiny model, and the losses of its undisturbed run by two ranks."""
    model = TinyModel(trainer)
    words = model.command("undisturbed")
    ran = launch(all_hosts, "local", "--gpus-per-node", "2", command=words, timeout=180)
    model.undisturbed = model.run("undisturbed", ran)
    return model
