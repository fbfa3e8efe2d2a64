#!/usr/bin/env bash
# Ends the Ray nodes that start-head.sh and start-worker.sh started on this machine, and no other Ray.
#
# Usage: stop.sh [OPTION...]
#   --name NAME   only this one (default: all of them, workers first)
#   --timeout N   seconds that each may take before it is killed (default: 40)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

only='' timeout_s=40
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --name) value "$@" && only=$2 ;;
    --timeout) value "$@" && whole "$@" && timeout_s=$2 ;;
    *) die "unknown option '$1' (see --help)" ;;
  esac
  shift 2
done

shopt -s nullglob
pidfiles=()
for file in "$MOE_RAY_STATE_DIR"/*.pid; do # a head last: workers say goodbye to it
  [[ -z $only || $(basename "$file" .pid) == "$only" ]] || continue
  pid=$(<"$file")
  if [[ -r /proc/$pid/cmdline ]] && tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q -- ' --head '; then
    pidfiles+=("$file")
  else
    pidfiles=("$file" "${pidfiles[@]}")
  fi
done
if ((!${#pidfiles[@]})); then
  say "nothing to stop${only:+ of the name $only}"
fi

for file in "${pidfiles[@]}"; do
  name=$(basename "$file" .pid)
  if running "$file"; then
    pid=$(<"$file")
    kill -TERM "$pid"
    for ((waited = 0; waited < timeout_s * 5; waited++)); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.2
    done
    if kill -KILL "$pid" 2>/dev/null; then # Ray's reaper ends the rest of it
      say "$name: killed after $timeout_s s"
    else
      say "$name: stopped"
    fi
  else
    say "$name: was not running any more"
  fi
  rm -f "$file"
done
