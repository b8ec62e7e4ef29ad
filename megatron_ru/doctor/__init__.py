"""What a machine and a set of machines offer to a run: measuring apart from judging.

`versions`, `gpus`, `file_system` and `all_reduce` measure; their findings and those of `verdicts` are pure functions of
what was measured. `worker` is the process that measures, so that whatever hangs can be killed. `participant` is a rank
of `megatron-ru doctor --nodes`, `coordinator` the one that tells the ranks what to do and writes the report.
"""
