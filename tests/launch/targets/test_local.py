import subprocess
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

export MASTER_ADDR=127.0.0.1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2
MASTER_PORT=$(ru_free_port "$$" "$MASTER_ADDR")
export MASTER_PORT

ru_ranks=()
trap 'kill "${{ru_ranks[@]}}" 2>/dev/null || true; exit 143' TERM
trap 'kill "${{ru_ranks[@]}}" 2>/dev/null || true; exit 130' INT
for ((ru_rank = 0; ru_rank < 2; ru_rank++)); do
    (export RANK=$ru_rank LOCAL_RANK=$ru_rank; exec "${{ru_command[@]}}") &
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
"""


def test_the_whole_script():
    from megatron_ru.launch.shell_parts import FREE_PORT

    command = ("python", "train.py", "--lr", "3e-4", "--text", "a b $(c)")
    script = render("local", gpus_per_node=2, env={"A": "x 'y"}, command=command)
    assert script.text == WHOLE.format(free_port=FREE_PORT)
    assert script.submit == ("bash",)


@pytest.mark.parametrize(
    ("command", "code"),
    [('exit "$((RANK == 2 ? 7 : 0))"', 7), ("exit 0", 0), ('if [ "$RANK" = 1 ]; then exit 3; fi; exec sleep 30', 3)],
)
def test_the_code_of_the_first_rank_to_fail_and_nobody_is_left(command, code):
    text = render("local", gpus_per_node=3, command=("bash", "-c", command)).text
    started = time.monotonic()
    assert subprocess.run(["bash", "-c", text]).returncode == code
    assert time.monotonic() - started < 20
