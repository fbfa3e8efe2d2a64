#!/usr/bin/env bash
# Deploys a Serve config file on a running Ray cluster and returns when all of it runs and the model answers.
#
# Usage: deploy.sh [OPTION...] CONFIG
#   CONFIG              a Serve config file such as ../serve/demo.yaml; ${NAME} and ${NAME:-default} in it are replaced
#                       from the environment
#   --dashboard URL     Ray's dashboard (default: http://127.0.0.1:8265)
#   --url URL           where the gateway is reached (default: from http_options of CONFIG)
#   --token-file FILE   the cluster's token (default: ~/.ray/auth_token)
#   --timeout N         seconds to wait until it answers (default: 1800; a large model takes long to read)
#   --render            print what would be deployed, and end
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

config='' dashboard=http://127.0.0.1:8265 url='' token_file=$HOME/.ray/auth_token timeout_s=1800 render=''
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --render) render=yes && shift && continue ;;
    --dashboard) value "$@" && dashboard=$2 ;;
    --url) value "$@" && url=${2%/} ;;
    --token-file) value "$@" && token_file=$2 ;;
    --timeout) value "$@" && whole "$@" && timeout_s=$2 ;;
    -*) die "unknown option '$1' (see --help)" ;;
    *)
      [[ -z $config ]] || die "two config files: $config and $1"
      config=$1 && shift && continue
      ;;
  esac
  shift 2
done
[[ -n $config ]] || die "which config file? (see --help)"
[[ -r $config ]] || die "$config: no such file"
command_found python3 "install moe_ray here, or activate its virtual environment"
command_found curl "it asks the server whether it is ready"

rendered=$(mktemp --suffix=.yaml)
trap 'rm -f "$rendered"' EXIT
python3 "$here/../serve/render.py" "$config" >"$rendered"
if [[ -n $render ]]; then
  cat "$rendered"
  exit
fi
if [[ -z $url ]]; then
  url=$(python3 "$here/../serve/render.py" --url "$rendered")
fi

use_token "$token_file"
command_found serve "install moe_ray here, or activate its virtual environment"

# serve_status ARGUMENT OF deployed.py...
serve_status() { { serve status --address "$dashboard" 2>/dev/null || true; } | python3 "$here/../serve/deployed.py" "$@"; }

deployed_before=$(serve_status --times)
serve deploy --address "$dashboard" "$rendered"

# Serve's word first: until the new application is there, /health is answered by the old one.
before=''
for ((end = SECONDS + timeout_s; ; )); do
  progress=$(serve_status "$rendered" "$deployed_before")
  case $progress in
    failed*) die "the application could not be deployed. Serve says:"$'\n'"${progress#*$'\n'}" ;;
    running*)
      fetch "$url/health" --max-time 5
      [[ $code != 200 ]] || break
      missing="$url/health says $code: $body"
      ;;
    *) missing=${progress#*$'\n'} ;;
  esac
  ((SECONDS < end)) || die "not ready after $timeout_s s: $missing"
  [[ $missing == "$before" ]] || say "waiting: $missing"
  before=$missing
  sleep 1
done

# The key only where one is asked for, and not as an argument, which every user of this machine could read.
key='' shown=''
fetch "$url/v1/models" --max-time 10
if [[ $code == 401 ]]; then
  key=${OPENAI_API_KEY:-}
  # shellcheck disable=SC2016 # for the reader's shell to expand
  shown=' -H @<(printf "Authorization: Bearer %s" "$OPENAI_API_KEY")'
  [[ -z $key ]] || fetch "$url/v1/models" --max-time 10 -H @<(printf 'Authorization: Bearer %s' "$key")
fi
model=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])' <<<"$body" 2>/dev/null) || model=MODEL
body=$(printf '{"model": "%s", "messages": [{"role": "user", "content": "What is the capital of France?"}]}' "$model")
say "ready: $url/v1"
[[ -z $shown || -n $key ]] || say "it asks for a key: put one into OPENAI_API_KEY"
say ""
say "  curl $url/v1/chat/completions -H 'Content-Type: application/json'$shown -d '$body'"
