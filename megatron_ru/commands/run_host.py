"""Run the pretrain_gpt.py of an unmodified Megatron-LM or Megatron-DeepSpeed checkout with us inside.

    megatron-ru run_host PATH/pretrain_gpt.py ARGS

ARGS are the script's own arguments, plus ours: --ru-variant, --device, --ru-metrics, --ru-init.
"""

SUMMARY = "run a Megatron-LM or Megatron-DeepSpeed checkout's script with us inside"


def run_raw(words: list[str]) -> int:
    """Runs the script; returns the exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: megatron-ru run_host [-h] PATH/pretrain_gpt.py ARGS\n\n{__doc__}")
        return 0 if words else 2
    from megatron_ru.hosts.choice import run_host
    from megatron_ru.plugin.rank_errors import exit_code_of

    return exit_code_of(lambda: run_host(words[0], words[1:]), "megatron-ru run_host")
