"""show_rank.py RECORD [sleep SECONDS | exit CODE]: appends one JSON line that tells what this rank sees."""

import json
import os
import sys
import time

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RU_ARRAY_INDEX",
         "CUDA_VISIBLE_DEVICES", "SLURM_RESTART_COUNT", "GREETING")  # fmt: skip
seen = {name: os.environ.get(name) for name in NAMES}
line = json.dumps({**seen, "host": os.uname().nodename.split(".")[0], "pid": os.getpid(), "words": sys.argv[2:]})
descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
os.write(descriptor, (line + "\n").encode())
match sys.argv[2:]:
    case ["sleep", seconds]:
        time.sleep(float(seconds))
    case ["exit", code]:
        sys.exit(int(code))
