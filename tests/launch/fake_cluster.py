"""Stand-ins for mpirun, srun, torchrun, singularity and module: they start real processes, all on this host."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

# Each rank appends what it sees of the world, on one line.
RANK = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
seen = {"environ": {name: os.environ.get(name) for name in names}, "words": sys.argv[2:], "all": dict(os.environ)}
with open(sys.argv[1], "a") as record:
    record.write(json.dumps(seen) + "\\n")
"""

MPIRUN = """
import os, subprocess, sys
words, exported = sys.argv[1:], {}
options = {}
while words[0].startswith("-"):
    option = words.pop(0)
    if option == "-x":
        name = words.pop(0)
        exported[name] = os.environ[name]
    elif option == "-mca":
        name = words.pop(0)
        options[name] = words.pop(0)
    else:
        options[option] = words.pop(0)
assert options["oob_tcp_keepalive_time"] == "5" and options["--bind-to"] == "none", options
size, per_node = int(options["-np"]), int(options["-npernode"])
hosts = open(options["-hostfile"]).read().splitlines()
assert len(hosts) * per_node == size and all(line.endswith(f" slots={per_node}") for line in hosts), hosts
ranks = []
for rank in range(size):
    # A remote rank has a bare environment and what -x names.
    numbers = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank % per_node, "LOCAL_SIZE": per_node}
    ompi = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in numbers.items()}
    ompi["TEST_HOST"] = hosts[rank // per_node].split()[0]
    ranks.append(subprocess.Popen(words, env={"PATH": "/usr/bin:/bin", **exported, **ompi}))
sys.exit(max(rank.wait() for rank in ranks))
"""

SRUN = """
import os, subprocess, sys
words, nodes, tasks = sys.argv[1:], int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
while words[0].startswith("--"):
    option = words.pop(0)
ranks = []
for rank in range(nodes * tasks):
    slurm = {"PROCID": rank, "NTASKS": nodes * tasks, "LOCALID": rank % tasks, "NODEID": rank // tasks, "STEP_ID": 0}
    environ = {**os.environ, **{f"SLURM_{name}": str(value) for name, value in slurm.items()}}
    ranks.append(subprocess.Popen(words, env=environ))
sys.exit(max(rank.wait() for rank in ranks))
"""

TORCHRUN = """
import os, subprocess, sys
words, options = sys.argv[1:], {"--nnodes": "1", "--node-rank": "0"}
while words[0] != "--no-python":
    name = words.pop(0)
    options[name] = words.pop(0)
per_node, node = int(options["--nproc-per-node"]), int(options["--node-rank"])
ranks = []
for local in range(per_node):
    torch = {"RANK": node * per_node + local, "WORLD_SIZE": int(options["--nnodes"]) * per_node, "LOCAL_RANK": local,
             "LOCAL_WORLD_SIZE": per_node, "MASTER_ADDR": options["--master-addr"],
             "MASTER_PORT": options["--master-port"]}
    environ = {**os.environ, **{name: str(value) for name, value in torch.items()}}
    ranks.append(subprocess.Popen(words[1:], env=environ))
sys.exit(max(rank.wait() for rank in ranks))
"""

SINGULARITY = """
import os, sys
words = sys.argv[1:]
assert words[:2] == ["exec", "--nv"], words
words = words[2:]
while words[0] == "--bind":
    words = words[2:]
os.environ["TEST_IMAGE"] = words[0]
os.execvp(words[1], words[1:])
"""

# With room behind each for the ports of further attempts.
_PORTS = iter(range(20000 + os.getpid() % 5000, 29980, 8))

PROGRAMS = {"mpirun": MPIRUN, "srun": SRUN, "torchrun": TORCHRUN, "singularity": SINGULARITY}


class FakeCluster:
    """A folder with the stand-ins, and the environment that each scheduler gives to its script."""

    def __init__(self, folder, job="54321"):
        self.folder, self.job = folder, job
        self.record = folder / "record.jsonl"
        (folder / "rank.py").write_text(RANK)
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name, source in PROGRAMS.items():
            (self.programs / name).write_text(f"#!{sys.executable}\n{source}")
            (self.programs / name).chmod(0o755)
        # The python3 of the job's environment, which can import us.
        (self.programs / "python3").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
        (self.programs / "python3").chmod(0o755)

    def command(self, *words):
        """The words of a rank that records itself and what it was called with."""
        return (sys.executable, str(self.folder / "rank.py"), str(self.record), *words)

    def run(self, script, job):
        """The records of the ranks, by rank, after the script ran as its scheduler would run it."""
        self.record.unlink(missing_ok=True)
        # Those of several nodes wait for each other.
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda environ: self.bash(script.text, environ), self.environments(job)))
        seen = [json.loads(line) for line in self.record.read_text().splitlines()]
        return sorted(seen, key=lambda one: int(one["environ"]["RANK"]))

    def bash(self, text, environ):
        file = self.folder / f"job{environ.get('NODE', '')}.sh"
        file.write_text(text)
        # What a forgotten export in the user's shell would bring along.
        stale = {"RANK": "77", "WORLD_SIZE": "78", "MASTER_ADDR": "stale", "MASTER_PORT": "1", "LOCAL_RANK": "79"}
        environ = {"PATH": f"{self.programs}:/usr/sbin:/usr/bin:/bin:/sbin", **stale, **environ}
        shown = subprocess.run(["bash", str(file)], cwd=self.folder, env=environ, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr + shown.stdout
        return shown.stdout

    def environments(self, job):
        """One environment for each time that the script is run."""
        # The script's own host comes last here, and rank 0 has to be on it all the same.
        hosts = [f"other{number}.cluster" for number in range(job.nodes - 1)] + [socket.gethostname()]
        listed = self.folder / "hosts"
        if job.target in ("abci-v", "abci-a"):
            listed.write_text("".join(f"{host}\n" for host in hosts))
            return [{"JOB_ID": self.job, "SGE_JOB_HOSTLIST": str(listed), "SGE_TASK_ID": "3"}]
        if job.target == "abci-h":
            listed.write_text("".join(f"{host}\n" * 8 for host in hosts))
            environ = {"PBS_JOBID": f"{self.job}.pbs1", "PBS_NODEFILE": str(listed), "PBS_O_WORKDIR": str(self.folder)}
            return [{**environ, "PBS_ARRAY_INDEX": "3"}]
        if job.target == "slurm":
            tasks = 1 if job.torchrun else job.gpus_per_node
            slurm = {"JOB_ID": self.job, "NNODES": job.nodes, "NTASKS_PER_NODE": tasks, "ARRAY_TASK_ID": 3}
            return [{f"SLURM_{name}": str(value) for name, value in slurm.items()}]
        if job.target == "torchrun" and job.nodes > 1:
            port = two_free_ports()
            return [{"NODE": str(node), "MASTER": "127.0.0.1", "PORT": str(port)} for node in range(job.nodes)]
        return [{}]


def two_free_ports():
    """A port on which nobody listens, nor on the one behind it; another one each time."""
    for port in _PORTS:
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("", port))
            other.bind(("", port + 1))
            return port
    raise AssertionError("no two free ports side by side")


def job_fields(target, folder):
    """Fields of a small job that the target takes, as keywords for JobSpec."""
    fields = {
        "abci-v": {"nodes": 2, "gpus_per_node": 4, "time": "32:00:00", "group": "gaa50000"},
        "abci-a": {"nodes": 2, "gpus_per_node": 8, "time": "32:00:00", "group": "gaa50000"},
        "abci-h": {"nodes": 2, "gpus_per_node": 8, "time": "32:00:00", "group": "gaa50000"},
        "slurm": {"nodes": 2, "gpus_per_node": 4, "time": "32:00:00"},
        "mpirun": {"nodes": 2, "gpus_per_node": 2, "hostfile": os.path.join(folder, "my hosts")},
        "torchrun": {"nodes": 2, "gpus_per_node": 2},
        "local": {"gpus_per_node": 3},
    }[target]
    if target == "mpirun":
        with open(fields["hostfile"], "w") as stream:
            stream.write(f"# mine\n{socket.gethostname()} slots=64\n\nother0 slots=1\n")
    return {"target": target, **fields}
