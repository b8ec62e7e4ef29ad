import io

from megatron_ru.experiments import progress as module
from megatron_ru.experiments.progress import Progress, Remaining, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_line_is_rewritten():
    stream = Terminal()
    progress = Progress("training", stream)
    progress("step 1", 0.1)
    progress("step 2", 0.2)
    progress.done("loss 5")
    assert stream.getvalue() == "\rtraining  step 1\x1b[K\rtraining  step 2\x1b[K\r✓ training: loss 5 (0 s)\x1b[K\n"


def test_a_file_gets_a_line_for_each_tenth():
    stream = io.StringIO()
    progress = Progress("training", stream)
    for step in range(1, 101):
        progress(f"step {step}", step / 100)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training ..."
    assert lines[1:4] == ["  step 1", "  step 10", "  step 20"]
    assert len(lines) == 12


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 59.4, 60, 125)] == ["0 s", "59 s", "1:00 min", "2:05 min"]


def test_the_estimate_counts_from_the_first_step_seen(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    remaining = Remaining()
    assert remaining.text(180, 300) == ""
    now[0] = 101.0
    assert remaining.text(181, 300) == ""
    now[0] = 120.0
    # 40 steps in 20 s, 80 to go.
    assert remaining.text(220, 300) == "40 s left"
