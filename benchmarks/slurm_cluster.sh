#!/usr/bin/env bash
# slurm_test_cluster.sh -- a real, throw-away SLURM cluster on one Linux host,
# for testing sbatch scripts (no systemd, no cgroups, no database, no GPU needed).
#
#   slurm_test_cluster.sh start       [STATE_DIR]  install packages if missing, start everything
#   slurm_test_cluster.sh status      [STATE_DIR]  daemons, sinfo, squeue; exit 0 only if all are up
#   slurm_test_cluster.sh env         [STATE_DIR]  print 'export SLURM_CONF=...': eval "$(... env DIR)"
#   slurm_test_cluster.sh selftest    [STATE_DIR]  srun, torchrun all-reduce, requeue, preemption, node loss
#   slurm_test_cluster.sh crash NODE  [STATE_DIR]  kill one virtual node, as a power cut would
#   slurm_test_cluster.sh revive NODE [STATE_DIR]  bring it back
#   slurm_test_cluster.sh stop        [STATE_DIR]  cancel jobs, stop ONLY the daemons started here (by pid)
#
# STATE_DIR defaults to ${TMPDIR:-/tmp}/slurm_test_cluster.UID and holds everything: munge key and
# socket, slurm.conf, spool, logs, pids.  Nothing in /etc is edited (apt aside).  Keep its path short
# (unix sockets: 108 characters) and readable by whoever submits jobs.  Several clusters, each with its
# own STATE_DIR, can run side by side.
#
# Knobs (environment, read when `start` writes a fresh configuration):
#   NODES=4   CPUS=16   MEM=64000 (MB)   GPUS=4 (fake; 0 = none)      per virtual node, not enforced
#   ISOLATION=auto|net|uts|none    what separates the virtual nodes:
#     uts  (auto takes it when allowed) own hostname, /etc/hosts, pid + mount namespace; loopback is
#          shared and node i is 127.0.1.i, so two jobs on two nodes can still clash on one TCP port.
#     net  uts + own network namespace on a bridge (10.77.X.i): ports are per node; no way out to the
#          internet, and the host's "localhost" services are not reachable from jobs.
#     none plain `slurmd -N nX` on its own port: `hostname` is the host's on every node and nX does not
#          resolve in jobs unless /etc/hosts says so.  Needs no privileges once packages are installed.
#   TORCH_PYTHON=python3    Python with torch, for `selftest` only
set -u
T0=$(date +%s.%N)
CMD=${1:-help}; [ $# -gt 0 ] && shift
case $CMD in crash|revive) NODE_ARG=${1:?which node}; shift;; esac
STATE=${1:-${TMPDIR:-/tmp}/slurm_test_cluster.$(id -u)}
NODES=${NODES:-4} CPUS=${CPUS:-16} MEM=${MEM:-64000} GPUS=${GPUS:-4} ISOLATION=${ISOLATION:-auto}
TORCH_PYTHON=${TORCH_PYTHON:-python3}
export PATH=$PATH:/usr/sbin:/sbin              # munged, slurmctld, slurmd
unset ${!SLURM_@} ${!SBATCH_@} ${!SRUN_@}      # in case we are called from inside another job
export SLURM_CONF=$STATE/etc/slurm.conf        # how every SLURM command finds this cluster

say()     { printf '[slurm-test] %s\n' "$*" >&2; }
die()     { say "ERROR: $*"; exit 1; }
elapsed() { awk -v a="$T0" -v b="$(date +%s.%N)" 'BEGIN{printf "%.1f", b-a}'; }

# ---- processes: a pid file holds "PID STARTTIME"; both must match, and a zombie counts as dead -------
proc_id() { local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1   # -> start time, fails if dead
            set -- ${s##*) }; [ "$1" != Z ] && [ "$1" != X ] && echo "${20}"; }
alive()   { local p t; read -r p t 2>/dev/null <"$STATE/run/$1.pid" || return 1
            [ "$(proc_id "$p")" = "$t" ] && PID=$p; }
spawn()   { local name=$1; shift               # start a daemon in its own session, remember its pid
            setsid "$@" </dev/null >>"$STATE/log/$name.out" 2>&1 9>&- &
            local p=$!; echo "$p $(proc_id $p)" >"$STATE/run/$name.pid"; }
halt()    { local name=$1 sig=$2 i             # halt NAME SIGNAL: signal, wait 5 s, then KILL
            alive "$name" || { rm -f "$STATE/run/$name.pid"; return 0; }
            kill "-$sig" "$PID"
            for i in $(seq 100); do alive "$name" || break; sleep 0.05; done
            alive "$name" && { say "$name (pid $PID) ignored SIG$sig, killing it"; kill -KILL "$PID"; }
            rm -f "$STATE/run/$name.pid"; }
wait_for() { local limit=$1 i; shift           # wait_for SECONDS COMMAND...: poll until it succeeds
             for i in $(seq $((limit * 10))); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done; return 1; }
node_names() { seq -f 'n%.0f' 1 "$NODES"; }
lock()    { exec 9>"$STATE/lock"; flock -w 120 9 || die "another start/stop is running on $STATE"; }
load()    { [ -r "$STATE/cluster.env" ] || die "no cluster in $STATE (run: $0 start $STATE)"; . "$STATE/cluster.env"; }

# ---- 1. packages -------------------------------------------------------------------------------------
install_packages() {
  local b missing=0 made=
  for b in munged slurmctld slurmd sbatch srun; do command -v $b >/dev/null || missing=1; done
  [ $missing = 0 ] && return 0
  [ "$(id -u)" = 0 ] || die "SLURM is not installed and only root can install it"
  # Keep the packages' own services from starting (Docker-like images already have this file).
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; made=1
  fi
  say "installing munge, slurmctld, slurmd, slurm-client ..."
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -q && apt-get install -q -y --no-install-recommends -o DPkg::Lock::Timeout=120 \
      munge slurmctld slurmd slurm-client; } >"$STATE/log/apt.log" 2>&1 9>&-
  b=$?; [ -n "$made" ] && rm -f /usr/sbin/policy-rc.d
  [ $b = 0 ] || { tail -5 "$STATE/log/apt.log" >&2; die "apt-get failed, see $STATE/log/apt.log"; }
  say "packages installed at $(elapsed) s"
}

# ---- 2. configuration --------------------------------------------------------------------------------
port_busy() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
write_config() {
  local me host base x=0 net ctl i n f
  me=$(id -un); host=$(hostname -s)
  if [ "$ISOLATION" = auto ]; then
    ISOLATION=none
    unshare --uts --mount --pid --fork --kill-child --mount-proc true 2>/dev/null && ISOLATION=uts
  fi
  for base in $(seq 16800 100 29900); do                 # a free block of 100 ports
    port_busy $base || port_busy $((base + 1)) || break
  done
  case $ISOLATION in
    net)  for x in $(seq 1 250); do [ -e /sys/class/net/slt$x ] || break; done; net=10.77.$x; ctl=$net.254;;
    uts)  net=127.0.1; ctl=127.0.0.1;;
    none) net=; ctl=127.0.0.1;;
    *)    die "ISOLATION=$ISOLATION?";;
  esac
  printf '%s=%q\n' NODES "$NODES" CPUS "$CPUS" MEM "$MEM" GPUS "$GPUS" ISOLATION "$ISOLATION" \
      BASE "$base" X "$x" NET "$net" CTL "$ctl" >"$STATE/cluster.env"

  cat >"$STATE/etc/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host($ctl)
SlurmctldPort=$base
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s).
AuthInfo=socket=$STATE/run/munge.sock,cred_expire=5
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/spool/%n
SlurmctldPidFile=$STATE/run/slurmctld.own.pid
SlurmdPidFile=$STATE/run/slurmd-%n.own.pid
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/slurmd-%n.log
MailProg=/bin/true
# No cgroups.  linuxproc follows the process tree; pgid sees only the task's process group, and each of
# torchrun's workers has a session and a process group of its own.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
# Nodes as described below, whatever this host really has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
# Quick reactions, for tests.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdTimeout=10
KillWait=3
MinJobAge=3600
ReturnToService=2
# Preemption: a job in a partition of higher PriorityTier requeues jobs in 'low'; their --signal is sent
# at once and GraceTime (seconds) is what they then have left.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
JobCompType=jobcomp/filetxt
JobCompLoc=$STATE/log/jobcomp.txt
CONF
  [ "$GPUS" -gt 0 ] && echo "GresTypes=gpu" >>"$STATE/etc/slurm.conf"
  : >"$STATE/etc/hosts"
  for i in $(seq 1 "$NODES"); do
    n=n$i; mkdir -p "$STATE/spool/$n"
    printf 'NodeName=%s NodeHostname=%s NodeAddr=%s Port=%s CPUs=%s Boards=1 SocketsPerBoard=1 CoresPerSocket=%s ThreadsPerCore=1 RealMemory=%s%s State=UNKNOWN\n' \
      $n "$([ "$ISOLATION" = none ] && echo "$host" || echo $n)" "${net:-127.0.0}.${net:+$i}$([ -z "$net" ] && echo 1)" \
      $((base + i)) "$CPUS" "$CPUS" "$MEM" "$([ "$GPUS" -gt 0 ] && echo " Gres=gpu:$GPUS")" >>"$STATE/etc/slurm.conf"
    [ -n "$net" ] && echo "$net.$i $n" >>"$STATE/etc/hosts"
  done
  cat >>"$STATE/etc/slurm.conf" <<CONF
PartitionName=main Nodes=ALL Default=YES PriorityTier=10  PreemptMode=OFF     MaxTime=INFINITE State=UP
PartitionName=low  Nodes=ALL             PriorityTier=1   PreemptMode=REQUEUE GraceTime=10 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL             PriorityTier=100 PreemptMode=OFF     MaxTime=INFINITE State=UP
PartitionName=short Nodes=ALL            PriorityTier=10  PreemptMode=OFF     MaxTime=10 State=UP
CONF
  # slurmd loads a cgroup plugin even when nothing uses it.  Naming v1 keeps it from looking at (and failing
  # on) whatever is, or is not, mounted on /sys/fs/cgroup.
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$STATE/etc/cgroup.conf"
  # Fake GPUs (jobs get CUDA_VISIBLE_DEVICES).  Each File must be a character device, or slurmd counts 0 GPUs
  # and the node is drained: copies of /dev/null, or without the right to make them whatever /dev has.
  if [ "$GPUS" -gt 0 ]; then
    echo "AutoDetect=off" >"$STATE/etc/gres.conf"
    for i in $(seq 0 $((GPUS - 1))); do
      f=$STATE/dev/gpu$i; mknod "$f" c 1 3 2>/dev/null || f=$(find /dev -maxdepth 1 -type c | sort | sed -n "$((i + 1))p")
      [ -c "$f" ] || die "GPUS=$GPUS: no more device nodes to stand for GPUs; use a smaller GPUS"
      echo "Name=gpu File=$f" >>"$STATE/etc/gres.conf"
    done
  fi
  echo "$ctl $host" >>"$STATE/etc/hosts"; cat /etc/hosts >>"$STATE/etc/hosts"

  # First process of a virtual node (uts and net): set up the namespaces, run slurmd, reap orphans.
  cat >"$STATE/etc/node_init.sh" <<INIT
n=\$1 i=\${1#n}
echo "\$n" >/proc/sys/kernel/hostname
mount --bind "$STATE/etc/hosts" /etc/hosts
mount --bind "$STATE/etc" /etc/slurm      # jobs find slurm.conf even under sbatch --export=NONE
if [ "$ISOLATION" = net ]; then
  mount -t sysfs sysfs /sys; ip link set lo up
  : >"$STATE/etc/resolv.conf"; mount --bind "$STATE/etc/resolv.conf" /etc/resolv.conf   # no DNS: fail at once
  until ip link show "slv${x}n\$i" >/dev/null 2>&1; do sleep 0.02; done
  ip link set "slv${x}n\$i" name eth0; ip addr add "$net.\$i/24" dev eth0; ip link set eth0 up
fi
slurmd -D -f "$STATE/etc/slurm.conf" -N "\$n"
exit \$?
INIT
}

# ---- 3. daemons --------------------------------------------------------------------------------------
start_munge() {
  alive munged && return 0
  rm -f "$STATE"/run/munge.sock*
  [ -s "$STATE/munge/key" ] || ( umask 077; head -c 128 /dev/urandom >"$STATE/munge/key" )
  spawn munged munged --foreground --force --key-file="$STATE/munge/key" --socket="$STATE/run/munge.sock" \
    --pid-file="$STATE/munge/pid" --log-file="$STATE/munge/log" --seed-file="$STATE/munge/seed"
  wait_for 10 test -S "$STATE/run/munge.sock" || die "munged did not start: $(tail -3 "$STATE/log/munged.out")"
}
start_ctld() { alive slurmctld || spawn slurmctld slurmctld -D -f "$SLURM_CONF"; }
start_node() {
  local n=$1 v; alive "$n" && return 0
  case $ISOLATION in
    none) SLURM_TEST_CLUSTER=$STATE spawn "$n" slurmd -D -f "$SLURM_CONF" -N "$n";;
    uts)  spawn "$n" unshare --uts --mount --pid --fork --kill-child --mount-proc bash "$STATE/etc/node_init.sh" "$n";;
    net)  if [ ! -e "/sys/class/net/slt$X" ]; then
            { ip link add "slt$X" type bridge && ip addr add "$CTL/24" dev "slt$X" && ip link set "slt$X" up; } || die "no bridge"
          fi
          v=slv${X}n${n#n}
          spawn "$n" unshare --net --uts --mount --pid --fork --kill-child --mount-proc bash "$STATE/etc/node_init.sh" "$n"
          alive "$n" || die "$n died"
          wait_for 5 bash -c "[ \"\$(readlink /proc/$PID/ns/net)\" != \"\$(readlink /proc/self/ns/net)\" ]" || die "no netns for $n"
          ip link add "${v}h" type veth peer name "$v" && ip link set "${v}h" master "slt$X" up && ip link set "$v" netns "$PID" || die "no veth";;
  esac
}
all_idle()   { [ "$(sinfo -h -N -p main -o '%N %t' | grep -cE ' (idle|mix|alloc)$')" = "$NODES" ]; }
all_alive()  { local n; for n in munged slurmctld $(node_names); do alive "$n" || return 1; done; }
any_alive()  { local f; for f in "$STATE"/run/*.pid; do f=${f##*/}; [ "${f%.own.pid}" = "$f" ] && alive "${f%.pid}" && return 0; done; return 1; }
# slurmstepds that outlived their slurmd (ISOLATION=none only): ours carry a marker in their environment
stray_stepds() { local d; for d in /proc/[0-9]*; do
    [ "$(cat "$d/comm" 2>/dev/null)" = slurmstepd ] && { tr '\0' '\n' <"$d/environ"; } 2>/dev/null |
      grep -qxF "SLURM_TEST_CLUSTER=$STATE" && echo "${d#/proc/}"; done; }

do_start() {
  [ ${#STATE} -le 60 ] || die "STATE_DIR is too long for unix sockets: $STATE"
  case $STATE in /*) ;; *) die "STATE_DIR must be an absolute path";; esac
  mkdir -p "$STATE"/{etc,run,log,munge,ctld,spool,dev} && chmod 755 "$STATE" && chmod 700 "$STATE/munge" || die "cannot use $STATE"
  lock
  install_packages
  if any_alive; then
    load; all_alive && all_idle && { say "already running ($NODES nodes, ISOLATION=$ISOLATION)"; return 0; }
    say "partly running: starting what is missing"
  else
    rm -rf "$STATE"/{ctld,spool,run,log,dev}/* 2>/dev/null     # always a fresh cluster: job ids restart at 1
    write_config; load
  fi
  local n t; t=$(elapsed)
  start_munge; start_ctld
  for n in $(node_names); do start_node "$n"; done
  wait_for 30 all_idle || { tail -n 5 "$STATE"/log/*.out >&2; sinfo -N -l >&2; die "nodes are not idle after 30 s"; }
  say "$NODES nodes idle, ISOLATION=$ISOLATION; daemons took $(awk -v a=$t -v b="$(elapsed)" 'BEGIN{printf "%.1f", b-a}') s, total start-up $(elapsed) s"
  say "next: export SLURM_CONF=$SLURM_CONF"
}

do_stop() {
  [ -d "$STATE/run" ] || { say "nothing in $STATE"; return 0; }
  lock; [ -r "$STATE/cluster.env" ] && . "$STATE/cluster.env"
  local n jobs f
  if alive slurmctld && alive munged; then
    jobs=$(timeout 5 squeue -h -o %A 2>/dev/null | sort -un)
    [ -n "$jobs" ] && { say "cancelling jobs:" $jobs; timeout 5 scancel -Q $jobs
                        wait_for 10 bash -c '[ -z "$(timeout 5 squeue -h)" ]' || say "some jobs did not end in 10 s"; }
  fi
  for f in "$STATE"/run/n[0-9]*.pid; do                    # nodes first: KILL takes the whole pid namespace
    [ -e "$f" ] || continue; n=${f##*/}; n=${n%.pid}
    [ "$ISOLATION" = none ] && halt "$n" TERM || halt "$n" KILL
  done
  [ "$ISOLATION" = none ] && for n in $(stray_stepds); do say "killing left-over slurmstepd $n"; kill -KILL "$n"; done
  halt slurmctld TERM; halt munged TERM
  [ "$ISOLATION" = net ] && ip link del "slt$X" 2>/dev/null
  say "stopped in $(elapsed) s (logs stay in $STATE/log)"
}

do_status() {
  load; local n rc=0
  for n in munged slurmctld $(node_names); do
    if alive "$n"; then echo "$n: up, pid $PID"; else echo "$n: DOWN"; rc=1; fi
  done
  alive slurmctld && { timeout 10 sinfo -N -o '%8N %6t %4c %8m %10G %E' -p main; timeout 10 squeue; }
  return $rc
}

# ---- 4+5. self test ----------------------------------------------------------------------------------
job()       { scontrol show job "$1" | tr ' ' '\n' | sed -n "s/^$2=//p" | head -1; }    # job ID Field
job_is()    { [ "$(job "$1" JobState)" = "$2" ]; }
log_has()   { grep -q "$2" "$1" 2>/dev/null; }
check()     { local what=$1; shift; if "$@"; then say "ok   $what ($(elapsed) s)"; else say "FAIL $what"; FAILED=1; fi; }
do_selftest() {
  load; FAILED=0; local d=$STATE/selftest j k out
  rm -rf "$d"; mkdir -p "$d"; cd "$d" || die "$d"
  all_idle || die "not all nodes are up: see $0 status $STATE"
  sinfo
  out=$(srun -N2 hostname | sort | tr '\n' ' '); check "srun -N2 hostname -> $out" test "$(echo $out | wc -w)" = 2
  if [ "$GPUS" -gt 1 ]; then
    out=$(srun -N1 --gpus-per-node=2 bash -c 'echo $CUDA_VISIBLE_DEVICES'); check "2 fake GPUs -> CUDA_VISIBLE_DEVICES=$out" test "$out" = 0,1
  fi

  cat >allreduce.py <<'PY'
import os, socket, torch, torch.distributed as dist
dist.init_process_group("gloo")
t = torch.tensor([dist.get_rank() + 1.0]); dist.all_reduce(t)
print(f"rank {dist.get_rank()}/{dist.get_world_size()} on {socket.gethostname()} ({os.environ['SLURMD_NODENAME']}): sum {t.item()}", flush=True)
dist.destroy_process_group()
PY
  # The usual multi-node script: srun starts one torchrun per node, the first node hosts the rendezvous.
  # In ISOLATION=none node names do not resolve, hence the fall-back to the node's address.
  cat >torchrun.sbatch <<SB
#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=4 --time=5 --output=torchrun.out
head=\$(scontrol show hostnames "\$SLURM_JOB_NODELIST" | head -n 1)
getent hosts "\$head" >/dev/null || head=127.0.0.1
export OMP_NUM_THREADS=1
srun $TORCH_PYTHON -m torch.distributed.run --nnodes="\$SLURM_NNODES" --nproc-per-node=1 \\
  --rdzv-id="\$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="\$head:$((BASE + 90))" allreduce.py
SB
  if "$TORCH_PYTHON" -c 'import torch' 2>/dev/null; then
    j=$(sbatch --parsable torchrun.sbatch); wait_for 120 job_is "$j" COMPLETED; cat torchrun.out >&2
    check "torchrun on 2 nodes, gloo all-reduce" test "$(grep -c 'sum 3.0' torchrun.out)" = 2
  else say "skip torchrun: no torch in $TORCH_PYTHON"; fi

  # Requeue by the job itself: bash runs a trap only between commands, so the work is in the
  # background and the script sits in `wait`.
  cat >requeue.sbatch <<'SB'
#!/bin/bash
#SBATCH --requeue --signal=B:USR1@60 --time=10 --output=requeue.out --open-mode=append
echo "run ${SLURM_RESTART_COUNT:-0} on $SLURMD_NODENAME"
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && { echo resumed; exit 0; }
trap 'echo "got USR1, requeueing"; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
srun sleep 300 & wait
SB
  j=$(sbatch --parsable requeue.sbatch); wait_for 20 job_is "$j" RUNNING; wait_for 10 log_has requeue.out 'run 0'; sleep 0.5
  scancel --batch --signal=USR1 "$j"                       # what --signal=B:USR1@60 does 60 s before the limit
  wait_for 40 job_is "$j" COMPLETED
  check "USR1 -> trap -> scontrol requeue -> second run" log_has requeue.out resumed

  # Preemption: 'low' fills all nodes, 'high' takes one; USR1 comes at once, the requeue after GraceTime.
  cat >victim.sbatch <<'SB'
#!/bin/bash
#SBATCH --partition=low --exclusive --requeue --signal=B:USR1@60 --time=10 --output=victim.out --open-mode=append
echo "$(date +%T) run ${SLURM_RESTART_COUNT:-0}"
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && { echo resumed; exit 0; }
trap 'echo "$(date +%T) got USR1: checkpoint now"' USR1
trap 'echo "$(date +%T) got TERM"' TERM
sleep 300 & while kill -0 $! 2>/dev/null; do wait $!; done # wait again after each signal: do not exit 0
SB
  j=$(sbatch --parsable --nodes="$NODES" victim.sbatch); wait_for 20 log_has victim.out 'run 0'
  k=$(sbatch --parsable --partition=high --exclusive --output=high.out --wrap 'sleep 1')
  wait_for 60 job_is "$k" COMPLETED; wait_for 60 job_is "$j" COMPLETED; cat victim.out >&2
  check "preempted job: user signal" log_has victim.out 'got USR1'
  check "preempted job: requeued and run again" log_has victim.out resumed

  # A node dies under a job: NODE_FAIL after SlurmdTimeout, then requeue on other nodes.
  cat >nodefail.sbatch <<'SB'
#!/bin/bash
#SBATCH --requeue --time=10 --output=nodefail.out --open-mode=append
echo "run ${SLURM_RESTART_COUNT:-0} on $SLURMD_NODENAME"
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && exit 0
sleep 300
SB
  if [ "$ISOLATION" != none ]; then
    j=$(sbatch --parsable nodefail.sbatch); wait_for 20 log_has nodefail.out 'run 0'; k=$(job "$j" BatchHost)
    "$0" crash "$k" "$STATE"; wait_for 90 log_has nodefail.out 'run 1'; cat nodefail.out >&2
    check "node $k lost: job requeued elsewhere" log_has nodefail.out 'run 1'
    "$0" revive "$k" "$STATE"; check "all nodes back" wait_for 30 all_idle
  fi
  [ $FAILED = 0 ] && say "selftest passed in $(elapsed) s" || { say "selftest FAILED"; return 1; }
}

case $CMD in
  start)    do_start;;
  stop)     do_stop;;
  status)   do_status;;
  env)      load; echo "export SLURM_CONF=$SLURM_CONF";;
  selftest) do_selftest;;
  crash)    load; lock; halt "$NODE_ARG" KILL; say "$NODE_ARG is dead";;
  revive)   load; lock; start_node "$NODE_ARG"; wait_for 30 all_idle; say "$NODE_ARG started";;
  *)        sed -n '2,30s/^# \{0,1\}//p' "$0"; exit 2;;
esac
