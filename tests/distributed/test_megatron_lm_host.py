"""An unmodified Megatron-LM checkout trains with us inside and gives the losses of our own entry.

Set MEGATRON_LM_CHECKOUTS to a folder of git checkouts, or to checkouts separated by colons.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import torchrun

LAYOUT = ("--ru-variant", "llama2_tiny", "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")


def checkouts():
    """The folders that hold a pretrain_gpt.py."""
    named = [Path(word) for word in os.environ.get("MEGATRON_LM_CHECKOUTS", "").split(":") if word]
    folders = [
        folder for name in named for folder in ((name,) if (name / "pretrain_gpt.py").exists() else name.iterdir())
    ]
    return sorted(folder for folder in folders if (folder / "pretrain_gpt.py").exists())


pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not checkouts(), reason="MEGATRON_LM_CHECKOUTS names no Megatron-LM checkout"),
]


@pytest.fixture(scope="module")
def own(trainer):
    run = trainer.run(4, *LAYOUT, name="own_entry")
    run.assert_trained(range(1, 21))
    return run


def changed_files(checkout):
    done = subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("checkout", checkouts(), ids=lambda folder: folder.name)
def test_run_host_gives_our_losses_and_leaves_the_checkout_alone(trainer, own, checkout):
    before = changed_files(checkout)
    command = [*torchrun(4), "-m", "megatron_ru", "run_host", str(checkout / "pretrain_gpt.py")]
    run = trainer.run(4, *LAYOUT, name=f"host_{checkout.name}", command=command)
    run.assert_trained(range(1, 21))
    assert run.losses == own.losses
    assert changed_files(checkout) == before


@pytest.mark.parametrize("checkout", checkouts(), ids=lambda folder: folder.name)
def test_entry_point_of_torch_gives_our_losses(trainer, own, checkout):
    command = [*torchrun(4), str(checkout / "pretrain_gpt.py")]
    run = trainer.run(4, *LAYOUT, name=f"entry_{checkout.name}", command=command, environment={"MEGATRON_RU": "1"})
    run.assert_trained(range(1, 21))
    assert run.losses == own.losses


@pytest.mark.parametrize("checkout", checkouts(), ids=lambda folder: folder.name)
def test_virtual_pipeline_on_the_cpu_is_refused_where_it_is_not_repeatable(trainer, checkout):
    version = (checkout / "megatron" / "core" / "package_info.py").read_text()
    if "MINOR = 16" not in version:
        pytest.skip("virtual pipeline stages are repeatable on the CPU since core 0.17")
    run = trainer.run(
        1, *LAYOUT[:2], "--num-virtual-stages-per-pipeline-rank", "2", name="refused_virtual", steps=1,
        command=[sys.executable, "-m", "megatron_ru", "run_host", str(checkout / "pretrain_gpt.py")],
    )  # fmt: skip
    assert run.returncode == 2
    assert "virtual pipeline stages on the CPU" in run.output
