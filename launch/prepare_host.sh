#!/usr/bin/env bash
# Prepares this host, a TPU VM: mounts shared storage and installs the project. Run on it by launch/tpu_vm.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

about "Prepares this host: mounts shared storage at /mnt/shared, installs the project in .venv. Does nothing twice.
"
option extras tpu "Extras of the project to install, as tpu,hub."
option nfs '' "NFS share to mount, HOST:/PATH, e.g. of Filestore."
option bucket '' "Cloud Storage bucket to mount, with hierarchical namespace."
parse "$@"

need extras
[[ -z ${FLAGS[nfs]} || -z ${FLAGS[bucket]} ]] || die "found --nfs and --bucket, expected one of them"

install_gcsfuse() {
  local release key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
  release="$(. /etc/os-release && echo "$VERSION_CODENAME")"
  run sudo curl --fail --silent --show-error --output "$key" "$site/doc/apt-key.gpg"
  run sudo sh -c "echo 'deb [signed-by=$key] $site gcsfuse-$release main' >/etc/apt/sources.list.d/gcsfuse.list"
  run sudo apt-get update
  run sudo apt-get install --yes gcsfuse
}

mount_shared() {
  ! mountpoint --quiet /mnt/shared || return 0
  run sudo mkdir -p /mnt/shared
  if [[ -n ${FLAGS[nfs]} ]]; then
    run sudo apt-get update
    run sudo apt-get install --yes nfs-common
    run sudo mount -t nfs "${FLAGS[nfs]}" /mnt/shared
    run sudo chmod 1777 /mnt/shared # a share belongs to root, and each of us may write
  else
    command -v gcsfuse >/dev/null || install_gcsfuse
    run sudo chown "$(id -un)" /mnt/shared
    # What one host writes the others must see at once, hence no cache of names.
    run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "${FLAGS[bucket]}" /mnt/shared
  fi
}

# uv brings a Python that is new enough where the image has none.
install() {
  PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || run sh -c 'curl --fail --silent --show-error --location https://astral.sh/uv/install.sh | sh'
  run uv venv --quiet --allow-existing --python '>=3.11' .venv
  run uv pip install --quiet --python .venv ".[${FLAGS[extras]}]"
}

[[ -z ${FLAGS[nfs]}${FLAGS[bucket]} ]] || mount_shared
install
