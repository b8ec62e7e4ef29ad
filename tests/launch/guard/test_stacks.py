import faulthandler
import tempfile
import threading

from megatron_ru.launch.guard.stacks import frames_of, waits_for_others


def dumped():
    with tempfile.TemporaryFile("w+") as stream:
        faulthandler.dump_traceback(stream, all_threads=True)
        stream.seek(0)
        return stream.read()


def test_frames_of_the_thread_that_was_asked():
    """Beside one that only waits; Python writes both."""
    ended = threading.Event()
    helper = threading.Thread(target=ended.wait)
    helper.start()
    try:
        written = dumped()
    finally:
        ended.set()
        helper.join()
    # Other tests of this process may have left threads too.
    assert written.count("most recent call first") >= 2
    assert [frame.rpartition(" in ")[2] for frame in frames_of(written)[:2]] == [
        "dumped", "test_frames_of_the_thread_that_was_asked",
    ]  # fmt: skip
    assert frames_of(written)[0].startswith(f"{__file__}:")


def test_the_last_of_several_times():
    once = (
        'Current thread 0x00007f (most recent call first):\n  File "/a.py", line 3 in f\n  File "/b.py", line 4 in g\n'
    )
    later = once.replace("/a.py", "/c.py")
    assert frames_of(once + "\n" + later) == ("/c.py:3 in f", "/b.py:4 in g")
    assert frames_of("") == ()
    assert frames_of("Segmentation fault") == ()


def test_frames_in_which_a_rank_waits_for_others():
    wrapper = "/x/torch/distributed/c10d_logger.py:83 in wrapper"
    assert waits_for_others((wrapper, "/train.py:1 in step"))
    assert waits_for_others(("/x/megatron/core/pipeline_parallel/p2p_communication.py:5 in _communicate",))
    # The queue of a GPU holds the collective.
    assert waits_for_others(("/x/torch/cuda/__init__.py:1040 in synchronize", "/train.py:1 in step"))
    assert not waits_for_others(("/train.py:9 in load", "/train.py:1 in step"))
    assert not waits_for_others(())
    # Far out it says nothing: every rank is started by something distributed.
    assert not waits_for_others((*["/train.py:9 in load"] * 6, wrapper))
