import os
import subprocess
import sys
from pathlib import Path

from tests.launch.targets.scripts import render, start


def test_one_node_and_several():
    assert start(render("torchrun", gpus_per_node=4, guard=False)).endswith(
        "exec bash -c 'exec torchrun --nproc-per-node 4 \\\n"
        '        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --no-python "$@"\' node \\\n'
        '    "${ru_command[@]}"\n'
    )
    several = render("torchrun", nodes=3).text
    assert (
        '--nodes 3 --node "$NODE" --port "$((PORT + 1))" -- \\\n'
        '    bash -c \'exec torchrun --nnodes 3 --node-rank "$NODE" --nproc-per-node 8 \\\n'
        '        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --no-python "$@"\' node \\\n'
        '    "$ru_python" -m megatron_ru keep -- "${ru_command[@]}" <&0 &\n'
    ) in several


def test_several_nodes_ask_for_what_only_the_user_knows():
    text = render("torchrun", nodes=3).text
    shown = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env={"PATH": "/bin", "NODE": "0"})
    assert shown.returncode != 0
    assert "MASTER: an address of machine 0 that all others reach" in shown.stderr


def test_two_ranks_of_the_real_torchrun():
    shell = 'echo "$RANK $WORLD_SIZE $MASTER_ADDR $*"'
    text = render("torchrun", gpus_per_node=2, command=("bash", "-c", shell, "-", "a b", "--x", "$(c)")).text
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shown = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=environ)
    assert shown.returncode == 0, shown.stderr
    assert sorted(shown.stdout.splitlines()) == ["0 2 127.0.0.1 a b --x $(c)", "1 2 127.0.0.1 a b --x $(c)"]
