"""What makes a Grid Engine look like that of ABCI 2.0: resource types for whole nodes, groups, a list of hosts.

`-l rt_F=2` is no resource of Grid Engine: a job submission verifier (JSV) turns it into a parallel environment with
whole hosts, and refuses what ABCI refuses. `qsub -g GROUP` is ABCI's own: a wrapper turns it into a project.
"""

PROJECT = "gaa50000"

JSV = """#!/bin/bash
PATH=/bin:/usr/bin
jsv_on_start() { return; }
jsv_on_verify() {
    local type count slots
    for type in rt_F rt_AF rt_G.small; do
        if [ "$(jsv_sub_is_param l_hard $type)" != true ]; then continue; fi
        count=$(jsv_sub_get_param l_hard $type)
        case $count in '' | 0 | *[!0-9]*) jsv_reject "$type=$count is no number of nodes"; return ;; esac
        if [ "$(jsv_is_param pe_name)" = true ]; then jsv_reject "$type does not go together with -pe"; return; fi
        if [ "$(jsv_sub_is_param l_hard h_rt)" != true ]; then jsv_reject "no h_rt: add -l h_rt=HH:MM:SS"; return; fi
        if [ "$(jsv_is_param P)" != true ]; then jsv_reject "no group: add -g GROUP"; return; fi
        jsv_sub_del_param l_hard $type
        jsv_add_env SGE_RESOURCE_TYPE $type
        case $type in
            rt_F) slots=4 jsv_pe=v_node ;;
            rt_AF) slots=8 jsv_pe=a_node ;;
            *)
                if [ "$count" != 1 ]; then jsv_reject "$type=$count: one at most"; return; fi
                jsv_set_param q_hard v
                jsv_correct "one GPU"
                return
                ;;
        esac
        jsv_set_param pe_name $jsv_pe
        jsv_set_param pe_min $((count * slots))
        jsv_set_param pe_max $((count * slots))
        jsv_correct "$count whole nodes"
        return
    done
    jsv_reject "no resource type: add -l rt_F=1, rt_AF=1 or rt_G.small=1"
}
. /usr/share/gridengine/util/resources/jsv/jsv_include.sh
jsv_main
"""

# Runs in front of every job: the variables of ABCI's site, and those that root needs here. What mpirun starts on the
# other hosts of a job, by qrsh, comes as one string.
STARTER = """#!/bin/bash
if [ -r "${PE_HOSTFILE:-}" ]; then
    export SGE_JOB_HOSTLIST=$SGE_JOB_SPOOL_DIR/hostlist
    awk '{ print $1 }' "$PE_HOSTFILE" >"$SGE_JOB_HOSTLIST"
fi
export SGE_LOCALDIR=${TMPDIR:-/tmp} {exports}
export PATH={path}:/usr/local/bin:/usr/bin:/bin
if [ -e "$1" ]; then exec "$@"; else exec /bin/bash -c "$*"; fi
"""

QSUB = """#!/bin/bash
words=()
while [ $# -gt 0 ]; do
    if [ "$1" = -g ]; then words+=(-P "$2"); shift; else words+=("$1"); fi
    shift
done
exec /usr/bin/qsub "${words[@]}"
"""

BOOTSTRAP = """
admin_user none
default_domain none
ignore_fqdn true
spooling_method classic
spooling_lib libspoolc
spooling_params {folder}/default/common;{folder}/spool/qmaster
binary_path /usr/lib/gridengine
qmaster_spool_dir {folder}/spool/qmaster
security_mode none
listener_threads 2
worker_threads 2
scheduler_threads 1
"""

# Settings of the cluster that differ from Debian's, by name.
CLUSTER_SETTINGS = {
    "execd_spool_dir": "{folder}/spool/execd",
    "min_uid": "0",
    "min_gid": "0",
    "load_report_time": "00:00:02",
    "max_unheard": "00:00:20",
    "reschedule_unknown": "00:00:15",
    # qacct knows of a job at once.
    "reporting_params": "accounting=true reporting=false flush_time=00:00:01 accounting_flush_time=00:00:00 "
    "joblog=false sharelog=00:00:00",
    "mailer": "/bin/true",
    "administrator_mail": "none",
    # Nothing that would find processes outside of the job's process group: Grid Engine's own search for them
    # (ENABLE_ADDGRP_KILL) spares those of root, and not every site has it.
    "execd_params": "none",
}
SCHEDULER_SETTINGS = {
    "schedule_interval": "0:0:1",
    "flush_submit_sec": "1",
    "flush_finish_sec": "1",
    "load_formula": "slots",
    "job_load_adjustments": "NONE",
}

COMPLEXES = """
rt_F        rt_F       INT  <=  YES  NO  0  0
rt_AF       rt_AF      INT  <=  YES  NO  0  0
rt_G.small  rt_Gs      INT  <=  YES  NO  0  0
"""

PARALLEL_ENVIRONMENT = """
pe_name            {name}
slots              999
user_lists         NONE
xuser_lists        NONE
start_proc_args    NONE
stop_proc_args     NONE
allocation_rule    {slots}
control_slaves     TRUE
job_is_first_task  FALSE
urgency_slots      min
accounting_summary FALSE
qsort_args         NONE
"""

QUEUE = """
qname                 {name}
hostlist              {hosts}
seq_no                0
load_thresholds       NONE
suspend_thresholds    NONE
nsuspend              1
suspend_interval      00:05:00
priority              0
min_cpu_interval      00:05:00
processors            UNDEFINED
qtype                 BATCH INTERACTIVE
ckpt_list             NONE
pe_list               {environment}
rerun                 FALSE
slots                 {slots}
tmpdir                {tmpdir}
shell                 /bin/bash
prolog                NONE
epilog                NONE
shell_start_mode      unix_behavior
starter_method        {folder}/starter.sh
suspend_method        NONE
resume_method         NONE
terminate_method      NONE
notify                00:00:05
owner_list            NONE
user_lists            NONE
xuser_lists           NONE
subordinate_list      NONE
complex_values        NONE
projects              NONE
xprojects             NONE
calendar              NONE
initial_state         default
""" + "\n".join(
    f"{limit} INFINITY"
    for name in ("rt", "cpu", "fsize", "data", "stack", "core", "rss", "vmem")
    for limit in (f"s_{name}", f"h_{name}")
)
