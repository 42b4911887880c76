#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster, as a JobSet made from launch/gke.yaml.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

about "Trains on a TPU slice of a GKE cluster: launch/gke.sh create|delete --name NAME [flags] [-- flags of egrpo_jax.train]

  create   Applies launch/gke.yaml with the values of the flags.
  delete   Stops the run, which saves, and removes the JobSet.
"
actions create delete
option name '' "Name of the JobSet."
option_training
option image '' "Container image of this project, e.g. from launch/Dockerfile."
option accelerator tpu-v5p-slice "tpu-v4-podslice, tpu-v5-lite-podslice (v5e), tpu-v5p-slice or tpu-v6e-slice."
option topology '' "Chips of the slice: 2x2x2 (v4, v5p), 4x4 (v5e, v6e)."
option hosts 1 "Hosts of the slice."
option chips_per_host 4 "Chips of a host."
option claim '' "PersistentVolumeClaim that all hosts may write to; it appears as /mnt/shared."
option max_restarts 20 "How often a run that was preempted, or failed, is started again."
switch spot "Runs on Spot nodes."
option namespace default "Namespace of the cluster."
parse "$@"

# A string in double quotes, as YAML and JSON have it.
yaml_string() {
  local text="${1//\\/\\\\}"
  printf '"%s"' "${text//\"/\\\"}"
}

# Puts the value $2 where the manifest has @$1@.
fill() { MANIFEST="${MANIFEST//"@$1@"/"$2"}"; }

fill_manifest() {
  local name word list=''
  MANIFEST="$(<launch/gke.yaml)"
  for name in name image accelerator topology hosts chips_per_host claim max_restarts; do
    fill "$name" "${FLAGS[$name]}"
  done
  train_with python
  for word in "${TRAIN[@]}"; do list+=", $(yaml_string "$word")"; done
  fill command "[${list#, }]"
  fill spot "${FLAGS[spot]:+cloud.google.com/gke-spot: \"true\"}"
}

create() {
  need name image accelerator topology claim namespace
  need_training
  need_number hosts chips_per_host max_restarts
  [[ ${FLAGS[workdir]} == /mnt/shared/* ]] ||
    die "--workdir: found ${FLAGS[workdir]}, expected a folder in /mnt/shared, where --claim appears"
  fill_manifest
  if [[ -n ${FLAGS[dry_run]} ]]; then
    printf "kubectl apply --namespace=%s --filename=- <<'END'\n%s\nEND\n" "${FLAGS[namespace]}" "$MANIFEST"
  else
    kubectl apply "--namespace=${FLAGS[namespace]}" --filename=- <<<"$MANIFEST"
  fi
}

delete() {
  need name namespace
  run kubectl delete jobset "${FLAGS[name]}" "--namespace=${FLAGS[namespace]}"
}

"$ACTION"
