import platform
import subprocess
import sys

import pytest

FAULTS_OF_BLOCKS = """
import resource, sys
from megatron_ru.data.execution import _keep_freed_memory
if sys.argv[1] == "kept":
    _keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    blocks = [b"x" * (1 << 19) for _ in range(4)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's heap")
def test_blocks_are_faulted_in_once():
    found = [
        int(subprocess.run([sys.executable, "-c", FAULTS_OF_BLOCKS, how], capture_output=True, check=True).stdout)
        for how in ("kept", "returned")
    ]
    # 4 blocks of 128 pages; without it about 100 times as many.
    assert found[0] < 1500 < 10_000 < found[1], found
