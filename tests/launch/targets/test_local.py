import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.targets.scripts import render

WHOLE = """\
#!/bin/bash
# This machine: 1 node x 2 GPUs = 2 ranks. To start: bash FILE
# shellcheck disable=SC1091,SC2016,SC2054
set -euo pipefail
{free_port}
# Variables of every rank.
export A='x '"'"'y'

# What every rank runs.
ru_command=(
    python train.py
    --lr 3e-4
    --text 'a b $(c)'
)

# What runs guard and keepers.
ru_python=${{RU_PYTHON:-python3}}
if ! "$ru_python" -m megatron_ru guard --help >/dev/null 2>&1; then
    echo "$ru_python ($(command -v "$ru_python" || echo none on PATH)) cannot import megatron_ru, \\
which is to guard this job: name an environment that holds it with --virtual-environment FOLDER, or say --no-guard" >&2
    exit 2
fi

export MASTER_ADDR=127.0.0.1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2
MASTER_PORT=$(ru_free_port "$$" "$MASTER_ADDR")
export MASTER_PORT

# Starts the ranks and ends with the code of the first to fail, which takes the others with it.
# shellcheck disable=SC2329
ru_start_ranks() {{
    local ru_rank ru_code
    ru_ranks=()
    trap 'kill "${{ru_ranks[@]}}" 2>/dev/null || true; exit 143' TERM
    trap 'kill "${{ru_ranks[@]}}" 2>/dev/null || true; exit 130' INT
    for ((ru_rank = 0; ru_rank < WORLD_SIZE; ru_rank++)); do
        (unset -f ru_start_ranks; export RANK=$ru_rank LOCAL_RANK=$ru_rank; exec "$@") &
        ru_ranks+=("$!")
    done

    # The first rank that fails takes the others with it. (`wait -n` forgets ranks that ended before it was called.)
    ru_code=0
    while [ "${{#ru_ranks[@]}}" -gt 0 ] && [ "$ru_code" -eq 0 ]; do
        for ru_rank in "${{!ru_ranks[@]}}"; do
            if kill -0 "${{ru_ranks[ru_rank]}}" 2>/dev/null; then continue; fi
            wait "${{ru_ranks[ru_rank]}}" || ru_code=$?
            unset "ru_ranks[ru_rank]"
            if [ "$ru_code" -ne 0 ]; then break; fi
        done
        sleep 0.2
    done
    kill "${{ru_ranks[@]}}" 2>/dev/null || true
    wait
    exit "$ru_code"
}}
export -f ru_start_ranks

"$ru_python" -m megatron_ru guard --job "$$" --address "$MASTER_ADDR" --stall 90 -- \\
    bash -euo pipefail -c 'ru_start_ranks "$@"' local "$ru_python" -m megatron_ru keep -- "${{ru_command[@]}}" <&0 &
ru_guard=$!
# The guard passes signals on to the ranks; this shell outlives them, to clean up.
trap 'kill -USR1 "$ru_guard" 2>/dev/null || true' USR1
trap 'kill -USR2 "$ru_guard" 2>/dev/null || true' USR2
trap 'kill -TERM "$ru_guard" 2>/dev/null || true' TERM
trap 'kill -INT "$ru_guard" 2>/dev/null || true' INT
while kill -0 "$ru_guard" 2>/dev/null; do wait "$ru_guard" || true; done
ru_code=0
wait "$ru_guard" || ru_code=$?
exit "$ru_code"
"""


def test_the_whole_script():
    from megatron_ru.launch.shell_parts import FREE_PORT

    command = ("python", "train.py", "--lr", "3e-4", "--text", "a b $(c)")
    script = render("local", gpus_per_node=2, env={"A": "x 'y"}, command=command, stall=90)
    assert script.text == WHOLE.format(free_port=FREE_PORT)
    assert script.submit == ("bash",)


@pytest.mark.parametrize(
    ("command", "code"),
    [('exit "$((RANK == 2 ? 7 : 0))"', 7), ("exit 0", 0), ('if [ "$RANK" = 1 ]; then exit 3; fi; exec sleep 30', 3)],
)
@pytest.mark.parametrize("guard", [True, False])
def test_the_code_of_the_first_rank_to_fail_and_nobody_is_left(command, code, guard):
    text = render("local", gpus_per_node=3, command=("bash", "-c", command), guard=guard).text
    started = time.monotonic()
    environ = {**os.environ, "RU_PYTHON": sys.executable}
    assert subprocess.run(["bash", "-c", text], env=environ).returncode == code
    assert time.monotonic() - started < 20


def test_the_shell_outlives_usr1_and_hands_it_on(tmp_path):
    """It ends with the code of the ranks, which have saved, and not by the signal."""
    rank = f"trap 'exit 75' USR1; touch {tmp_path}/$RANK; while :; do sleep 0.05; done"
    text = render("local", gpus_per_node=2, command=("bash", "-c", rank), retries=3).text
    environ = {**os.environ, "RU_PYTHON": sys.executable}
    script = subprocess.Popen(["bash", "-c", text], env=environ, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    script.send_signal(signal.SIGUSR1)
    said = script.communicate(timeout=20)[1]
    assert script.returncode == 75
    assert "SIGUSR1 asked for an end, so there is no other attempt here" in said


@pytest.mark.parametrize(
    ("fields", "remedy"), [({}, "--virtual-environment FOLDER"), ({"virtual_environment": "env"}, "--no-guard")]
)
def test_a_python_that_cannot_guard_is_one_sentence(tmp_path, fields, remedy):
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "activate").write_text("")
    (tmp_path / "python3").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    text = render("local", **fields).text
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    shown = subprocess.run(["bash", "-c", text], env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith(
        f"python3 ({tmp_path}/python3) cannot import megatron_ru, which is to guard this job:"
    )
    assert remedy in shown.stderr
    assert len(shown.stderr.splitlines()) == 1
