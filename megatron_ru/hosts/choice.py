"""Which host a script belongs to, told from the files around it."""

from pathlib import Path


def run_host(script: str, words: list[str]) -> None:
    """Runs the script of a Megatron-LM or Megatron-DeepSpeed checkout as `python SCRIPT WORDS` would, with us inside.

    Raises `UserError` when there is no such script, or when nothing around it is Megatron.
    """
    if is_megatron_deepspeed(Path(script).resolve().parent):
        from megatron_ru.hosts.megatron_deepspeed import run_host as run
    else:
        from megatron_ru.hosts.megatron_lm import run_host as run
    run(script, words)


def is_megatron_deepspeed(folder: Path) -> bool:
    """Whether the checkout is microsoft/Megatron-DeepSpeed, or a fork that kept its argument file."""
    arguments = folder / "megatron" / "arguments.py"
    # Megatron-LM of that age has the same file, and no word of DeepSpeed in it.
    return arguments.is_file() and b"deepspeed" in arguments.read_bytes()
