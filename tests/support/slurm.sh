#!/usr/bin/env bash
# A SLURM of one node on loopback, all of it below one folder:   slurm.sh start|stop FOLDER
#
# Needs root and Debian's slurm-wlm and munge.  Clients find it through SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
action=$1 folder=$(realpath "$2")
host=$(hostname -s)

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

start() {
  mkdir -p "$folder"/{state,spool,logs,run}
  chmod 755 "$folder" "$folder/run"
  dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
  chmod 600 "$folder/munge.key"
  munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge" --pid-file="$folder/run/munged.pid" \
    --log-file="$folder/logs/munged.log" --seed-file="$folder/state/munge.seed"
  cat > "$folder/slurm.conf" <<EOF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.pid
SlurmctldLogFile=$folder/logs/slurmctld.log
SlurmdLogFile=$folder/logs/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=2
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000
PartitionName=work Nodes=$host Default=YES OverSubscribe=FORCE:4 MaxTime=INFINITE State=UP
EOF
  slurmctld -f "$folder/slurm.conf"
  slurmd -f "$folder/slurm.conf"
}

stop() {
  for daemon in slurmd slurmctld munged; do
    if [ -f "$folder/run/$daemon.pid" ]; then kill "$(cat "$folder/run/$daemon.pid")" || true; fi
  done
}

"$action"
