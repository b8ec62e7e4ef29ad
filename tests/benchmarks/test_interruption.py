import os
import signal

import pytest

from megatron_ru.benchmarks.interruption import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_raises_and_later_ones_do_nothing(number):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.came
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        # `timeout` sends its signal to the process and to the group; what is being written must not be torn.
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.came
    assert interruption.number == number
    assert signal.getsignal(number) is before


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="wrong"), Interruption():
        raise ValueError("wrong")
    assert signal.getsignal(signal.SIGTERM) is before
