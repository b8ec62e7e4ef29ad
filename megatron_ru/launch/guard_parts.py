"""The pieces of bash around a launcher that is guarded: the guard, the keepers, the signals, and the way back into the
queue."""

from megatron_ru.launch.job_spec import JobSpec
from megatron_ru.launch.quoting import quoted

PROGRAM = '"$ru_python" -m megatron_ru'
# What keepers need from their guard, for launchers that pass on only what they are told to.
TRAVELS = ("RU_GUARD", "RU_GUARD_JOB", "RU_ATTEMPT")

_CHECK = r"""
# What runs guard and keepers.
ru_python={python}
if ! "$ru_python" -m megatron_ru guard --help >/dev/null 2>&1; then
    echo "$ru_python ($(command -v "$ru_python" || echo none on PATH)) cannot import megatron_ru, \
which is to guard this job: {remedy}" >&2
    exit 2
fi
"""

# Bash runs a trap only between two commands.
_WAIT = r"""
ru_guard=$!
# The guard passes signals on to the ranks; this shell outlives them, to clean up.
trap 'kill -USR1 "$ru_guard" 2>/dev/null || true' USR1
trap 'kill -USR2 "$ru_guard" 2>/dev/null || true' USR2
trap 'kill -TERM "$ru_guard" 2>/dev/null || true' TERM
trap 'kill -INT "$ru_guard" 2>/dev/null || true' INT
while kill -0 "$ru_guard" 2>/dev/null; do wait "$ru_guard" || true; done
ru_code=0
wait "$ru_guard" || ru_code=$?
"""

# In an image that may lack us.
_KEEPER_OR_NOT = (
    'if python3 -m megatron_ru keep --help >/dev/null 2>&1; then exec python3 -m megatron_ru keep -- "$@"; fi; '
    'if [ "${RANK:-0}" = 0 ]; then echo "python3 of the image cannot import megatron_ru, so hangs go unnoticed: '
    'install it there" >&2; fi; exec "$@"'
)


def check(job: JobSpec) -> str:
    """Ends the script early where no guard can be started; empty for a job without one."""
    if not job.guard:
        return ""
    # A virtual environment of the host and a container exclude each other.
    remedy = (
        "install it for that python3, submit from the folder of its clone, or say --no-guard"
        if job.container is not None
        else "name an environment that holds it with --virtual-environment FOLDER, or say --no-guard"
    )
    # `megatron-ru launch --submit` of a script that runs here says which one it is itself run by.
    python = "python3" if job.virtual_environment is not None else "${RU_PYTHON:-python3}"
    return _CHECK.replace("{remedy}", remedy).replace("{python}", python)


def keeper(job: JobSpec) -> str:
    """The words that stand before a rank's command, with a blank behind; empty for a job without a guard."""
    return f"{PROGRAM} keep -- " if job.guard else ""


def keeper_in_image(job: JobSpec) -> str:
    """The same for a keeper that is to run inside an image, and does without where the image lacks it."""
    return f"bash -c {quoted([_KEEPER_OR_NOT])} keep \\\n    " if job.guard else ""


def started(job: JobSpec, launcher: str, *, number: str, options: str = "", address: str = "$MASTER_ADDR") -> str:
    """The lines that start `launcher`, words of bash, and end the script with the job's exit code.

    `number` is what the scheduler calls the job, `options` are further words for the guard, `address` is where keepers
    reach this host.
    """
    if not job.guard:
        return f"{launcher}\n"
    words = [f'--job "{number}"', f'--address "{address}"', *_limits(job)]
    if options:
        words.append(options)
    return f"""{PROGRAM} guard {" ".join(words)} -- \\
    {launcher} <&0 &{_WAIT}"""


def ended(job: JobSpec, requeue: str = "") -> str:
    """The last lines: back into the queue by `requeue` where the job asks for it, and the exit code."""
    if not job.guard:
        return ""
    return f'{requeue if job.requeue else ""}exit "$ru_code"\n'


def requeue_slurm(job: JobSpec) -> str:
    """Back into the queue, where Slurm itself counts how often."""
    return f"""
# 75: saved at a signal, or ended by the guard, and worth another start.
if [ "$ru_code" -eq 75 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.most_requeues} ]; then
    echo "back into the queue, for time $((${{SLURM_RESTART_COUNT:-0}} + 1)) of at most {job.most_requeues}" >&2
    scontrol requeue "$SLURM_JOB_ID" || true
fi
"""


def requeue_grid_engine(job: JobSpec) -> str:
    """Back into the queue by code 99; a small file beside the output counts how often."""
    count = quoted([f"{job.output.rstrip('/')}/.{job.name}.requeues."])
    return f"""
# 75: saved at a signal, or ended by the guard, and worth another start. Grid Engine takes a job back at code 99.
ru_count={count}$JOB_ID.${{SGE_TASK_ID:-}}
if [ "$ru_code" -eq 75 ]; then
    ru_times=$(tr -dc 0-9 2>/dev/null <"$ru_count" || true)
    ru_times=${{ru_times:-0}}
    if [ "$ru_times" -lt {job.most_requeues} ]; then
        printf '%s\\n' "$((ru_times + 1))" >"$ru_count.new"
        mv "$ru_count.new" "$ru_count"
        echo "back into the queue, for time $((ru_times + 1)) of at most {job.most_requeues}" >&2
        exit 99
    fi
fi
rm -f "$ru_count"
"""


def requeue_pbs(job: JobSpec) -> str:
    """PBS takes no job back by its exit code, so the script submits itself again, and hands on how often."""
    if job.array is not None:
        return """
if [ "$ru_code" -eq 75 ]; then echo "one task of an array cannot be submitted again: submit it by hand" >&2; fi
"""
    return f"""
# 75: saved at a signal, or ended by the guard, and worth another start: this script is submitted once more.
ru_times=${{RU_REQUEUES:-0}}
ru_times=${{ru_times//[!0-9]/}}
ru_times=$((10#${{ru_times:-0}} + 1))
if [ "$ru_code" -eq 75 ] && [ "$ru_times" -le {job.most_requeues} ]; then
    echo "back into the queue, for time $ru_times of at most {job.most_requeues}" >&2
    qsub -v "RU_REQUEUES=$ru_times" "$0" || echo "$0 could not be submitted again" >&2
fi
"""


def _limits(job: JobSpec) -> list[str]:
    given = (
        ("--stall", job.stall),
        ("--start-timeout", job.start_timeout),
        ("--grace", job.grace),
        ("--retries", job.retries),
        ("--spares", job.spares or None),
    )
    return [f"{flag} {value:g}" for flag, value in given if value is not None]
