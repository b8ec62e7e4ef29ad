"""Rendered scripts, cut into the parts that tests look at."""

import re

from megatron_ru.launch.job_spec import JobSpec
from megatron_ru.launch.target import TARGETS


def render(target, **fields):
    return TARGETS[target].render(JobSpec(**{"target": target, "command": ("python", "train.py"), **fields}))


def header(script):
    """The scheduler's lines, without their mark."""
    return re.findall(r"^(?:#\$|#PBS|#SBATCH) (.*)$", script.text, flags=re.M)


def requeue_lines(text, before):
    """What comes behind the guard, with `before` in front of it."""
    return before + text[text.index('wait "$ru_guard" || ru_code=$?\n') :].partition("\n")[2]


def start(script):
    """From the last comment on: what is started."""
    return script.text[script.text.rindex("\n# ") + 1 :]
