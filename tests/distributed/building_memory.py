"""Trains, and writes down how much memory each rank needed at most to build the model and to start the engine.

MEMORY=FOLDER python FILE WORDS; FOLDER/RANK.json holds bytes: the peak while the model is built, the peak until the
engine has started and what is left then, all beyond what the process had before; and what the whole model takes.
"""

import json
import os
import sys
from pathlib import Path

from megatron_ru.engines.megatron_core import main
from megatron_ru.plugin import run
from megatron_ru.seams.seam import Seam

found = {}


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def around_building(original):
    def build(model, *arguments, **keywords):
        Path("/proc/self/clear_refs").write_text("5")
        found["before"] = resident("VmRSS")
        original(model, *arguments, **keywords)
        found["building"] = resident("VmHWM") - found["before"]
        found["model"] = sum(weight.numel() * weight.element_size() for weight in model.parameters())

    return build


def around_the_engine(original):
    def get_megatron_optimizer(*arguments, **keywords):
        optimizer = original(*arguments, **keywords)
        found["engine"] = resident("VmHWM") - found["before"]
        found["left"] = resident("VmRSS") - found["before"]
        Path(os.environ["MEMORY"], f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        return optimizer

    return get_megatron_optimizer


seams = run.run_seams


def seams_with_mine(*arguments):
    places = {
        "megatron.core.models.gpt.gpt_model:GPTModel.__init__": around_building,
        "megatron.training.training:get_megatron_optimizer": around_the_engine,
    }
    return [*seams(*arguments), *(Seam(target=target, make=make, reason="a test") for target, make in places.items())]


run.run_seams = seams_with_mine
if __name__ == "__main__":
    sys.exit(main())
