#!/usr/bin/env bash
# Returns when NVIDIA's driver of this machine answers and is new enough for torch; at once where there is no card.
# Some images of clouds install the driver after the first boot, while `ray up` is there already.
#
# Usage: wait-for-driver.sh [OLDEST_MAJOR [SECONDS]]     (default: 580, which CUDA 13 needs, and 900)
set -euo pipefail

oldest=${1:-580} timeout_s=${2:-900}
grep -qsx 0x10de "${MOE_RAY_PCI_DEVICES:-/sys/bus/pci/devices}"/*/vendor || exit 0

for ((end = SECONDS + timeout_s; ; )); do
  if version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1); then
    break
  fi
  if ((SECONDS >= end)); then
    printf 'error: this machine has a card of NVIDIA, but its driver does not answer after %s s: %s\n' "$timeout_s" "$version" >&2
    exit 1
  fi
  sleep 5
done

version=${version%%$'\n'*}
if [[ ! ${version%%.*} =~ ^[0-9]+$ ]] || ((${version%%.*} < oldest)); then
  printf "error: NVIDIA's driver is %s here, torch needs %s or newer\n" "$version" "$oldest" >&2
  exit 1
fi
