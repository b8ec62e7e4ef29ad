"""The doctor beside GPUs: what the driver says of them, and all-reduces by NCCL inside a node and between two."""

import json
import subprocess
import sys

import pytest
import torch

from megatron_ru.doctor.gpus import read_gpus
from tests.doctor.started import Ranks, clean_environment

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def found_in(folder):
    return {item["subject"]: item for item in json.loads((folder / "report.json").read_text())}


def test_driver_tells_of_each_gpu():
    gpus = read_gpus()
    assert gpus is not None
    assert len(gpus) >= torch.cuda.device_count()
    assert all(gpu.memory_mib > 1000 and gpu.driver for gpu in gpus)


@two_gpus
def test_nccl_inside_a_node(tmp_path):
    words = ["--standalone", "--nproc-per-node", "2", "--no-python", sys.executable, "-m", "megatron_ru", "doctor"]
    environ = clean_environment()
    del environ["CUDA_VISIBLE_DEVICES"]
    shown = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, "--nodes", "auto", "--json", "report.json"],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (tmp_path / "report.json").exists(), shown.stderr
    (inside,) = [item for subject, item in found_in(tmp_path).items() if subject.startswith("inside ")]
    assert inside["detail"].startswith("nccl all-reduce of 2 ranks")
    # PCIe of the third generation gives more than that.
    assert inside["values"]["bytes_per_second"] > 1e9


@two_gpus
def test_nccl_between_two_nodes(tmp_path):
    """Each rank sees its own GPU alone, so that one machine is two nodes."""
    places = {rank: {"CUDA_VISIBLE_DEVICES": str(rank)} for rank in (0, 1)}
    with Ranks(tmp_path, 2, "--timeout", "120", environ=places) as ranks:
        ended = ranks.wait(timeout=300)
    assert (tmp_path / "report.json").exists(), ended
    found = found_in(tmp_path)
    assert found["gpus"]["detail"] == f"1 x {torch.cuda.get_device_name(0)} on each node"
    (pair,) = [item for subject, item in found.items() if subject.startswith("pair ")]
    assert pair["verdict"] == "ok", pair
    assert pair["detail"].startswith("nccl all-reduce of 2 ranks")
