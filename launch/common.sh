# What the scripts of this folder share: flags, --help, --dry_run, one line for a mistake. Sourced, not run.
#
# A script says what it does (`about`), its flags (`option`, `switch`) and, if it has several jobs, their names
# (`actions`); then `parse "$@"` fills FLAGS, ACTION and TRAIN_FLAGS, and every outside command goes through `run`.
# shellcheck shell=bash

set -euo pipefail
SCRIPT="launch/$(basename "$0")"
declare -A FLAGS=([dry_run]='') SWITCHES=([dry_run]=1)
HELP='' ACTION='' ACTIONS=''
TRAIN_FLAGS=()

# Ends the script with one line and 2, the exit code of a user's mistake. egrpo_jax.train has the same.
die() {
  printf '%s: %s\n' "$SCRIPT" "$*" >&2
  exit 2
}

# A line for the reader between the commands, also in a dry run.
note() {
  if [[ -n ${FLAGS[dry_run]} ]]; then printf '# %s\n' "$*"; else printf '%s: %s\n' "$SCRIPT" "$*" >&2; fi
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "found bash $BASH_VERSION, expected 4.4 or newer"

about() { HELP="$1"; }

# actions NAME...: the jobs of the script, one of which is its first argument.
actions() { ACTIONS="$*"; }

# option NAME DEFAULT HELP
option() {
  FLAGS[$1]="$2"
  HELP+=$'\n'"$(printf '  --%-16s %s%s' "$1" "$3" "${2:+ By default $2.}")"
}

# switch NAME HELP
switch() {
  FLAGS[$1]='' SWITCHES[$1]=1
  HELP+=$'\n'"$(printf '  --%-16s %s' "$1" "$2")"
}

# What nearly every script trains with.
option_training() {
  option config '' "Config file, as egrpo_jax.train takes it: configs/emoji.py."
  option workdir '' "Folder of the run. Every host must see it under this name."
}

parse() {
  switch dry_run "Prints the commands, ready to be pasted, and runs nothing."
  switch help "Prints this."
  while (($#)); do
    case $1 in
      --) TRAIN_FLAGS=("${@:2}") && break ;;
      --help | -h) print_help && exit 0 ;;
      --*) take_flag "$@" && shift "$TAKEN" ;;
      *) take_action "$1" && shift ;;
    esac
  done
  [[ -z $ACTIONS || -n $ACTION ]] || die "found no action, expected one of: $ACTIONS"
}

print_help() {
  printf '%s\n  %-18s %s\n' "$HELP" '-- ...' 'Everything after it goes to egrpo_jax.train.'
}

# Reads the first of the arguments, with its value, into FLAGS; TAKEN is how many arguments that were.
take_flag() {
  local name="${1#--}"
  name="${name%%=*}" TAKEN=1
  [[ -n $name && -n ${FLAGS[$name]+known} ]] || die "unknown flag --$name; --help lists the flags"
  if [[ -n ${SWITCHES[$name]:-} ]]; then
    [[ $1 != *=* ]] || die "--$name takes no value, found ${1#*=}"
    FLAGS[$name]=1
  elif [[ $1 == *=* ]]; then
    FLAGS[$name]="${1#*=}"
  else
    [[ -n ${2:-} && $2 != --* ]] || die "--$name: found no value"
    FLAGS[$name]="$2" TAKEN=2
  fi
}

take_action() {
  [[ -n $ACTIONS ]] || die "unexpected argument $1; every option is a --flag"
  [[ -z $ACTION && " $ACTIONS " == *" $1 "* ]] || die "unexpected argument $1; expected one of: $ACTIONS"
  ACTION="$1"
}

# need NAME...: those flags must have a value.
need() {
  local name
  for name in "$@"; do
    [[ -n ${FLAGS[$name]} ]] || die "--$name is missing; --help tells what it is"
  done
}

# need_number NAME...: those flags must be whole numbers of at least 1.
need_number() {
  local name
  for name in "$@"; do
    [[ ${FLAGS[$name]} =~ ^[1-9][0-9]*$ ]] || die "--$name: found '${FLAGS[$name]}', expected a whole number from 1"
  done
}

need_training() {
  need config workdir
  [[ -f ${FLAGS[config]%%:*} ]] || die "--config: found no file ${FLAGS[config]%%:*} in $PWD"
  [[ ${FLAGS[workdir]} != *://* ]] ||
    die "--workdir: found ${FLAGS[workdir]}, expected a folder: mount the bucket and name a folder on the mount"
}

# The command line of the training, in TRAIN, for a python.
train_with() {
  # shellcheck disable=SC2034  # read by the scripts
  TRAIN=("$1" -m egrpo_jax.train "--config=${FLAGS[config]}" "--workdir=${FLAGS[workdir]}"
    ${TRAIN_FLAGS[@]+"${TRAIN_FLAGS[@]}"})
}

# The arguments as one line that a shell reads as the same arguments.
quote() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="${word@Q}"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ -n ${FLAGS[dry_run]} ]]; then quote "$@"; else "$@"; fi
}

# The same for a script's last command, in its place: signals reach it, and its exit code is the script's.
run_last() {
  if [[ -n ${FLAGS[dry_run]} ]]; then quote "$@"; else exec "$@"; fi
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." # relative paths are those of the project, from wherever a script is called
