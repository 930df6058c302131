import os
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from iapo.launch.shared_memory import removes_own_segments
from tests.runs import left_behind, segments

# Makes a segment, says its name, and is killed before it can remove it; no resource tracker cleans up after it.
LEAK = """
import sys, time
from multiprocessing import resource_tracker, shared_memory
segment = shared_memory.SharedMemory(create=True, size=64)
resource_tracker.unregister(segment._name, "shared_memory")
print(segment.name, flush=True)
time.sleep(60)
"""


def leak(environment):
    process = subprocess.Popen([sys.executable, "-c", LEAK], stdout=subprocess.PIPE, text=True, env=environment)
    return process, Path("/dev/shm") / process.stdout.readline().strip()


def test_removes_what_its_own_processes_left_and_nothing_else():
    other, others = leak(dict(os.environ))
    with removes_own_segments(interval_s=0.1):
        child, own = leak(dict(os.environ))
        unmapped = SharedMemory(create=True, size=64)  # of this process, which no run id marks
        time.sleep(0.6)
        for process in (child, other):
            process.kill()
            process.wait()
        assert own.exists() and others.exists()
    assert not own.exists()
    assert others.exists()
    others.unlink()
    unmapped.close()
    unmapped.unlink()


def test_waits_for_what_is_still_mapped_and_leaves_it_in_the_end():
    with removes_own_segments(interval_s=0.1, patience_s=0.5):
        child, own = leak(dict(os.environ))
        time.sleep(0.4)
    assert own.exists()
    child.kill()
    child.wait()
    own.unlink()


def test_what_a_dead_process_leaves_is_left_behind_and_what_a_living_one_maps_is_not():
    before = segments()
    process, segment = leak(dict(os.environ))
    assert segment in segments() - before - left_behind(before, patience_s=0)
    process.kill()
    process.wait()
    assert segment in left_behind(before, patience_s=0)
    segment.unlink()
    assert segment not in left_behind(before, patience_s=0)
