#!/usr/bin/env bash
# Starts Ray's head on this machine. Actors are placed on workers: the head offers no CPU unless told otherwise.
#
# Usage: start-head.sh [OPTION...] [-- ARGUMENT OF ray start...]
#   --ip ADDRESS        address by which the workers reach this machine (default: what Ray finds)
#   --port N            port of Ray's control store (default: 6379)
#   --dashboard-host H  where the dashboard, which `serve deploy` talks to, listens (default: 127.0.0.1)
#   --dashboard-port N  its port (default: 8265)
#   --num-cpus N        CPUs to offer for actors (default: 0)
#   --num-gpus N        GPUs to offer for actors (default: 0)
#   --labels K=V,...    labels of this node (default: moe-ray/role=head)
#   --resources JSON    custom resources
#   --token-file FILE   the cluster's token; made where it is missing (default: ~/.ray/auth_token)
#   --temp-dir DIR      where Ray keeps its session (default: /tmp/ray)
#   --name NAME         name of this node for stop.sh (default: head)
#   --timeout N         seconds to wait until it runs (default: 60)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

port=6379 token_file=$HOME/.ray/auth_token name=head timeout_s=60 labels=moe-ray/role=head cpus=0 gpus=0
dashboard_host=127.0.0.1 dashboard_port=8265
extra=()
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --) shift && extra+=("$@") && break ;;
    --ip) value "$@" && extra+=(--node-ip-address "$2") ;;
    --port) value "$@" && whole "$@" && port=$2 ;;
    --dashboard-host) value "$@" && dashboard_host=$2 ;;
    --dashboard-port) value "$@" && whole "$@" && dashboard_port=$2 ;;
    --num-cpus) value "$@" && whole "$@" && cpus=$2 ;;
    --num-gpus) value "$@" && whole "$@" && gpus=$2 ;;
    --labels) value "$@" && labels=$2 ;;
    --resources) value "$@" && extra+=(--resources "$2") ;;
    --token-file) value "$@" && token_file=$2 ;;
    --temp-dir) value "$@" && extra+=(--temp-dir "$2") ;;
    --name) value "$@" && name=$2 ;;
    --timeout) value "$@" && whole "$@" && timeout_s=$2 ;;
    *) die "unknown option '$1' (see --help)" ;;
  esac
  shift 2
done

use_token "$token_file" make
start_ray "$name" "$timeout_s" --head --port "$port" --num-cpus "$cpus" --num-gpus "$gpus" --labels "$labels" \
  --dashboard-host "$dashboard_host" --dashboard-port "$dashboard_port" "${extra[@]}"
say "  workers: start-worker.sh --address THIS_MACHINE:$port --role trunk|experts --token-file $token_file"
if [[ $RAY_AUTH_TOKEN_PATH == "$HOME/.ray/auth_token" ]]; then
  say "  shells:  export RAY_AUTH_MODE=token      (else serve status, ray logs and moe-ray status are refused)"
else
  say "  shells:  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH      (else serve status, ray logs and moe-ray status are refused)"
fi
