"""Words in the store, waits with an end, and a watchdog for calls without one."""

import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_ru.doctor.conversation import Conversation, LostMeetingError, meet
from megatron_ru.foundation.errors import UserError
from megatron_ru.foundation.ranks import RankEnvironment, free_port


def place(rank, port):
    return RankEnvironment(
        rank=rank, world_size=2, local_rank=0, local_world_size=1, master_address="127.0.0.1", master_port=port,
        source="torch variables",
    )  # fmt: skip


def test_what_one_says_the_other_hears():
    port = free_port()
    first = meet(place(0, port), 20)
    second = meet(place(1, port), 20)
    second.say("arrival/1", {"host": "узел", "local_rank": 0})
    assert first.hear("arrival/1", 5) == {"host": "узел", "local_rank": 0}
    begin = time.monotonic()
    assert first.hear("arrival/2", 0.5) is None
    assert 0.4 < time.monotonic() - begin < 5


def test_nobody_at_the_address_is_told_with_what_to_do():
    port = free_port()
    with pytest.raises(UserError, match=rf"rank 1 did not reach rank 0 at 127.0.0.1:{port} within 1 s .*firewalls"):
        meet(place(1, port), 1)


def test_port_that_is_taken_is_told():
    port = free_port()
    held = meet(place(0, port), 20)
    with pytest.raises(UserError, match=rf"rank 0 cannot listen at 127.0.0.1:{port} .*export another MASTER_PORT"):
        meet(place(0, port), 20)
    assert held.hear("nothing", 0.01) is None


def test_inside_torchrun_rank_0_does_not_listen_itself():
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    meet(place(0, port), 20, {"TORCHELASTIC_USE_AGENT_STORE": "True"}).say("word", 1)
    assert meet(place(1, port), 20, {}).hear("word", 5) == 1
    del agent


def test_store_that_is_gone_is_no_silence():
    class Gone:
        def wait(self, keys, timeout):
            raise RuntimeError("Connection reset by peer")

        set = wait

    with pytest.raises(LostMeetingError, match="reset by peer"):
        Conversation(Gone()).hear("step/1", 30)
    with pytest.raises(LostMeetingError, match="reset by peer"):
        Conversation(Gone()).say("step/1", 30)


def test_watchdog_ends_a_process_whose_call_does_not_return():
    program = (
        "import time\n"
        "from megatron_ru.doctor.conversation import Watchdog\n"
        "dog = Watchdog()\n"
        "dog.expect(0.1, 'too early')\n"
        "dog.rest()\n"
        "time.sleep(0.6)\n"
        "dog.expect(0.3, 'rank 0 fell silent')\n"
        "time.sleep(60)\n"
    )
    begin = time.monotonic()
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (1, "megatron-ru: rank 0 fell silent\n")
    assert time.monotonic() - begin < 20
