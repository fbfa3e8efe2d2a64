#!/usr/bin/env bash
# Starts a Ray worker on this machine, or over ssh on several, and joins it to the head.
#
# Usage: start-worker.sh --address HEAD:PORT [OPTION...] [-- ARGUMENT OF ray start...]
#   --address H:P       the head
#   --ip ADDRESS        address by which the others reach this machine (default: what Ray finds)
#   --role ROLE         label moe-ray/role, which the Serve config files of ../serve select: trunk or experts
#   --labels K=V,...    further labels
#   --num-cpus N        CPUs to offer for actors (default: all)
#   --num-gpus N        GPUs to offer for actors (default: all)
#   --resources JSON    custom resources
#   --token-file FILE   the cluster's token, the same as the head's (default: ~/.ray/auth_token)
#   --temp-dir DIR      where Ray keeps its session
#   --name NAME         name of this node for stop.sh (default: worker)
#   --timeout N         seconds to wait until it runs (default: 60)
#   --hosts A,B,...     do it on these hosts instead, one after the other, over ssh: copies the token and these scripts
#   --remote-bin DIR    with --hosts: directory there that has `ray` (default: on their PATH)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

address='' role='' labels='' token_file=$HOME/.ray/auth_token name=worker timeout_s=60 hosts='' remote_bin=''
extra=() passed=()
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --) passed+=("$@") && shift && extra+=("$@") && break ;;
    --hosts) value "$@" && hosts=$2 && shift 2 && continue ;;
    --remote-bin) value "$@" && remote_bin=$2 && shift 2 && continue ;;
    --token-file) value "$@" && token_file=$2 && shift 2 && continue ;;
    --address) value "$@" && address=$2 ;;
    --ip) value "$@" && extra+=(--node-ip-address "$2") ;;
    --role) value "$@" && role=$2 ;;
    --labels) value "$@" && labels=$2 ;;
    --num-cpus) value "$@" && whole "$@" && extra+=(--num-cpus "$2") ;;
    --num-gpus) value "$@" && whole "$@" && extra+=(--num-gpus "$2") ;;
    --resources) value "$@" && extra+=(--resources "$2") ;;
    --temp-dir) value "$@" && extra+=(--temp-dir "$2") ;;
    --name) value "$@" && name=$2 ;;
    --timeout) value "$@" && whole "$@" && timeout_s=$2 ;;
    *) die "unknown option '$1' (see --help)" ;;
  esac
  passed+=("$1" "$2")
  shift 2
done

[[ $address == ?*:+([0-9]) ]] || die "--address HEAD:PORT is needed, such as 10.0.0.1:6379"
case $role in '' | trunk | experts) ;; *) die "--role '$role': must be trunk or experts" ;; esac

if [[ -n $hosts ]]; then
  use_token "$token_file"
  where=.moe-ray # in the home directory there
  # shellcheck disable=SC2029 # all of it is meant to be expanded here
  for host in ${hosts//,/ }; do
    say "$host:"
    ssh "$host" "umask 077 && mkdir -p $where"
    scp -q "$here/common.sh" "$here/start-worker.sh" "$here/stop.sh" "$host:$where/"
    ssh "$host" "umask 077 && cat > $where/auth_token" <"$token_file"
    # Quoted for the shell there, which takes the words of a command apart again.
    ssh "$host" "${remote_bin:+PATH=$remote_bin:\$PATH }bash $where/start-worker.sh --token-file $where/auth_token" \
      "$(printf '%q ' "${passed[@]}")"
  done
  exit
fi

use_token "$token_file"
[[ -z $role ]] || labels=moe-ray/role=$role${labels:+,$labels}
[[ -z $labels ]] || extra+=(--labels "$labels")
start_ray "$name" "$timeout_s" --address "$address" "${extra[@]}"
