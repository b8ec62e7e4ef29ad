import os
import subprocess
import sys
import time

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.lock import sole_writer

HOLD = """
import sys, time
from megatron_ru.foundation.lock import sole_writer
with sole_writer(sys.argv[1], "the dataset"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    target = tmp_path / "new" / "ru"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"another process is writing the dataset {target}; wait for it"),
            sole_writer(target, "the dataset"),
        ):
            raise AssertionError("not reached")
    finally:
        holder.kill()
        holder.wait()
    # A kill leaves the file and no lock.
    assert os.listdir(target.parent) == [".ru.lock"]
    with sole_writer(target, "the dataset"):
        pass
    assert os.listdir(target.parent) == []


def test_it_is_given_back_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), sole_writer(tmp_path / "ru", "the dataset"):
            raise KeyError
    assert os.listdir(tmp_path) == []


def test_waiters_never_hold_a_removed_file(tmp_path):
    """Writers in turn: the file of the first is removed while others open it."""
    program = (
        "import sys, os\n"
        "from megatron_ru.foundation.errors import UserError\n"
        "from megatron_ru.foundation.lock import sole_writer\n"
        "done = 0\n"
        "while done < 200:\n"
        "    try:\n"
        "        with sole_writer(sys.argv[1], 'x'):\n"
        "            os.mkdir(sys.argv[1] + '.held')\n"
        "            os.rmdir(sys.argv[1] + '.held')\n"
        "            done += 1\n"
        "    except UserError:\n"
        "        pass\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "ru")]) for _ in range(2)]
    deadline = time.monotonic() + 60
    # mkdir fails where two are inside.
    assert [writer.wait(deadline - time.monotonic()) for writer in writers] == [0, 0]
