import os
import signal

import pytest

from iapo.launch.signals import recorded_signals


def test_a_signal_is_recorded_whatever_handler_is_installed():
    def somebody_elses(*_):
        raise SystemExit(15)

    mine = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with recorded_signals() as arrived:
            assert arrived() == set()
            signal.signal(signal.SIGTERM, somebody_elses)
            with pytest.raises(SystemExit):
                os.kill(os.getpid(), signal.SIGTERM)
            assert arrived() == {signal.SIGTERM}
            assert arrived() == {signal.SIGTERM}  # it stays
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_who_was_woken_by_signals_before_is_afterwards():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    with recorded_signals():
        pass
    assert signal.set_wakeup_fd(before) == writer
    os.close(reader)
    os.close(writer)
