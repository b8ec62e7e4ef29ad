"""Which host a script belongs to."""

import pytest

from megatron_ru.foundation.errors import UserError
from megatron_ru.hosts import choice, megatron_deepspeed, megatron_lm


def checkout(folder, **files):
    (folder / "megatron" / "core").mkdir(parents=True)
    for name, text in files.items():
        (folder / "megatron" / f"{name}.py").write_text(text)
    (folder / "pretrain_gpt.py").write_text("")
    return str(folder / "pretrain_gpt.py")


@pytest.mark.parametrize(
    ("files", "host"),
    [
        ({"arguments": "parser = deepspeed.add_config_arguments(parser)\n"}, megatron_deepspeed),
        # Megatron-LM as it was when Megatron-DeepSpeed left it, and as it is.
        ({"arguments": "parser.add_argument('--num-layers')\n"}, megatron_lm),
        ({}, megatron_lm),
    ],
    ids=["Megatron-DeepSpeed", "an old Megatron-LM", "Megatron-LM"],
)
def test_the_host_is_told_from_its_files(tmp_path, monkeypatch, files, host):
    script = checkout(tmp_path, **files)
    runs = []
    for each in (megatron_deepspeed, megatron_lm):
        monkeypatch.setattr(each, "run_host", lambda *given, each=each: runs.append((each, *given)))
    choice.run_host(script, ["--lr", "1"])
    assert runs == [(host, script, ["--lr", "1"])]


def test_no_script(tmp_path):
    with pytest.raises(UserError, match=r"is not a file, expected the pretrain_gpt\.py of a Megatron-LM checkout"):
        choice.run_host(str(tmp_path / "pretrain_gpt.py"), [])
