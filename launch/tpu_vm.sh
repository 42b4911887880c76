#!/usr/bin/env bash
# Trains on Cloud TPU VMs, one host or all hosts of a slice, and goes on after a preemption.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

about "Trains on Cloud TPU VMs: launch/tpu_vm.sh ACTION --name NAME --zone ZONE [flags] [-- flags of egrpo_jax.train]

  train    All that is needed: creates, installs and runs; after a preemption deletes, and does so again.
  create   Creates the TPU VM, with --queued as soon as there is one.
  install  Brings the project to every host, mounts shared storage, installs.
  run      Starts the training on every host, once.
  state    Prints the state: READY, PREEMPTED, ...; with --queued ACTIVE, SUSPENDED, ...
  stop     Tells the training to save and end; the TPU VM stays, and costs.
  delete   Deletes the TPU VM.
"
actions train create install run state stop delete
option name '' "Name of the TPU VM, and of its queued resource."
option zone '' "Zone, e.g. us-east5-a."
option project '' "Google Cloud project. Left out: gcloud's own."
option accelerator '' "Type and size: v5p-8, v6e-8, v5litepod-16, v4-32."
option version '' "Runtime version. Left out: the one for the accelerator."
switch spot "Takes a Spot TPU: cheaper, and preempted at any time."
switch queued "Waits in Google's queue (queued resources) instead of failing where there is no free TPU."
option_training
option nfs '' "NFS share, HOST:/PATH, to mount at /mnt/shared on every host."
option bucket '' "Bucket to mount there instead."
option extras tpu "Extras of the project to install, as tpu,hub."
option revision HEAD "Commit to train with; changes that are not committed stay here."
option repository '' "Git address that every host clones. Left out: the commit is copied from here."
option poll 30 "Seconds between two looks at the state."
option max_restarts 100 "How often train starts again."
parse "$@"

need name zone
need_number poll max_restarts
PLACE=("--zone=${FLAGS[zone]}")
[[ -z ${FLAGS[project]} ]] || PLACE+=("--project=${FLAGS[project]}")
NAME="${FLAGS[name]}" KIND=tpu-vm READY=READY
[[ -z ${FLAGS[queued]} ]] || KIND=queued-resources READY=ACTIVE

tpus() { run gcloud compute tpus "$@" "${PLACE[@]}"; }
on_all_hosts() { tpus tpu-vm ssh "$NAME" --worker=all --quiet "--command=$1"; }

runtime_version() {
  case ${FLAGS[accelerator]} in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) die "--accelerator: found ${FLAGS[accelerator]}, expected v5p-8 or the like, or --version with it" ;;
  esac
}

need_machine() {
  need accelerator
  VERSION="${FLAGS[version]}"
  [[ -n $VERSION ]] || VERSION="$(runtime_version)"
}

create() {
  local flags=("--accelerator-type=${FLAGS[accelerator]}")
  [[ -z ${FLAGS[spot]} ]] || flags+=(--spot)
  if [[ -n ${FLAGS[queued]} ]]; then
    tpus queued-resources create "$NAME" "--node-id=$NAME" "${flags[@]}" "--runtime-version=$VERSION"
  else
    tpus tpu-vm create "$NAME" "${flags[@]}" "--version=$VERSION"
  fi
}

delete() {
  local flags=(--quiet)
  [[ -z ${FLAGS[queued]} ]] || flags+=(--force) # its TPU VM with it
  tpus "$KIND" delete "$NAME" "${flags[@]}"
}

need_install() {
  need extras revision
  [[ -z ${FLAGS[nfs]} || -z ${FLAGS[bucket]} ]] || die "found --nfs and --bucket, expected one of them"
  [[ -n ${FLAGS[repository]} ]] || git rev-parse --quiet --verify "${FLAGS[revision]}^{commit}" >/dev/null ||
    die "--revision: found no commit ${FLAGS[revision]} in $PWD"
}

install() {
  local prepare=(launch/prepare_host.sh "--extras=${FLAGS[extras]}") archive="${TMPDIR:-/tmp}/$NAME.tar.gz" fetch
  [[ -z ${FLAGS[nfs]} ]] || prepare+=("--nfs=${FLAGS[nfs]}")
  [[ -z ${FLAGS[bucket]} ]] || prepare+=("--bucket=${FLAGS[bucket]}")
  if [[ -n ${FLAGS[repository]} ]]; then
    fetch="{ [ -d egrpo_jax ] || git clone $(quote "${FLAGS[repository]}") egrpo_jax; } && cd egrpo_jax"
    fetch+=" && git fetch --all && git checkout $(quote "${FLAGS[revision]}")"
  else
    run git archive --format=tar.gz "--output=$archive" "${FLAGS[revision]}"
    tpus tpu-vm scp "$archive" "$NAME:egrpo_jax.tar.gz" --worker=all --quiet
    fetch="mkdir -p egrpo_jax && tar -xzf egrpo_jax.tar.gz -C egrpo_jax && cd egrpo_jax"
  fi
  on_all_hosts "$fetch && $(quote "${prepare[@]}")"
}

need_run() {
  need_training
  [[ -z ${FLAGS[nfs]}${FLAGS[bucket]} || ${FLAGS[workdir]} == /mnt/shared/* ]] ||
    die "--workdir: found ${FLAGS[workdir]}, expected a folder in /mnt/shared, where the shared storage is"
}

run_once() {
  train_with .venv/bin/python
  on_all_hosts "cd egrpo_jax && exec $(quote "${TRAIN[@]}")" # exec: `stop` then finds the program and no shell
}

# Ends what a lost connection may have left running, and waits until it has saved.
stop() {
  local program="'^[.]venv/bin/python -m egrpo_jax[.]train'"
  on_all_hosts "pkill -TERM -f $program; while pgrep -f $program >/dev/null; do sleep 1; done"
}

# The state, or NONE where nothing has that name, or UNKNOWN where gcloud cannot tell, of which it has then told why.
state() {
  local field='value(state)' answer errors
  [[ -z ${FLAGS[queued]} ]] || field='value(state.state)'
  errors="$(mktemp)"
  if answer="$(tpus "$KIND" describe "$NAME" "--format=$field" 2>"$errors")"; then
    printf '%s\n' "$answer"
  elif grep --quiet NOT_FOUND "$errors"; then
    echo NONE
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm "$errors"
}

# Waits until the TPU VM is there, creates it if there is none, and deletes one that was preempted.
await_ready() {
  local now
  while now="$(state)" && [[ $now != "$READY" ]]; do
    case $now in
      NONE) create_again ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        note "$NAME is $now: deleting what is left of it"
        delete
        ;;
      FAILED | STOPPED) die "$NAME is $now; look at it with gcloud, and delete it if it is of no use" ;;
      *)
        [[ $now != UNKNOWN || $RESTARTS -gt 0 ]] || die "gcloud cannot tell the state of $NAME"
        note "$NAME is $now; looking again in ${FLAGS[poll]} s"
        sleep "${FLAGS[poll]}"
        ;;
    esac
  done
}

# After a preemption a zone may have nothing free for hours: tries until it has. The first time a failure is the end.
create_again() {
  if ! create; then
    ((RESTARTS)) || exit 1
    note "cannot create $NAME yet; trying again in ${FLAGS[poll]} s"
    sleep "${FLAGS[poll]}"
  fi
}

# Returns if the run is to go on after exit code $1, and ends the script if not.
judge() {
  local code=$1 now
  if ((code == 0)); then
    note "the run is at its end; $NAME stays, and costs, until: $SCRIPT delete"
    exit 0
  fi
  ((code != 2)) || exit 2
  sleep "${FLAGS[poll]}" # a program ends before the state shows why
  now="$(state)"
  if [[ $code:$now == 1:$READY ]] || ((++RESTARTS > FLAGS[max_restarts])); then
    note "the run failed with exit code $code; $NAME is $now"
    exit "$code"
  fi
  note "exit code $code, $NAME is $now: restart $RESTARTS"
}

attempt() {
  install
  stop
  run_once
}

train() {
  local code
  trap 'exit 130' INT
  RESTARTS=0
  while true; do
    await_ready
    set +e # `attempt || code=$?` would let it go on after a failed installation
    (set -e && attempt)
    code=$?
    set -e
    judge "$code"
  done
}

print_train() {
  state
  note "if there is none:"
  create
  note "as soon as it is $READY:"
  attempt
  note "if it was preempted, and then again from the top:"
  delete
}

case $ACTION in
  create | train) need_machine ;;&
  install | train) need_install ;;&
  run | train) need_run ;;
esac
case $ACTION:${FLAGS[dry_run]} in
  train:1) print_train ;;
  run:*) run_once ;;
  *) "$ACTION" ;;
esac
