"""Tests that need a CUDA device; without one they are skipped, and the end of the run says how many."""

import pytest

_NO_GPU = "no CUDA device"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=_NO_GPU))


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if _NO_GPU in str(report.longrepr)]
    if skipped:
        terminalreporter.write_sep("!", f"{len(skipped)} GPU tests were NOT run: {_NO_GPU}", red=True, bold=True)
