import os
import signal
import subprocess
import sys

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


@pytest.mark.e2e
@pytest.mark.parametrize("number,status,said", [("SIGTERM", 143, "stopped by SIGTERM"), ("SIGINT", 130, "interrupted")])
def test_a_command_that_is_stopped_leaves_nothing_and_says_one_line(tmp_path, number, status, said):
    """Also where a second SIGTERM arrives while it removes what it wrote."""
    code = f"""
import signal, sys
from pathlib import Path
from iapo.__main__ import run
from iapo.tools.folder import whole_folder

def command(arguments):
    with whole_folder(Path(arguments[0])) as partial:
        (partial / "file").write_text("x")
        try:
            signal.raise_signal(signal.{number})
        finally:
            if {number!r} == "SIGTERM":
                signal.raise_signal(signal.SIGTERM)
    return 0

run("model", command, sys.argv[1:])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (status, "", f"iapo.model: {said}\n")
    assert list(tmp_path.iterdir()) == []
