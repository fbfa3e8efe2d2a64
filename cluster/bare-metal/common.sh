# Shared by the scripts beside it, which source it; not a command.
# shellcheck shell=bash

MOE_RAY_STATE_DIR=${MOE_RAY_STATE_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/moe-ray}
STARTED='Ray runtime started'

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

say() { printf '%s\n' "$*"; }

# usage: prints the comment at the top of the calling script.
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; }

# value OPTION [VALUE]: fails where an option that takes a value has none.
value() { [[ $# -ge 2 ]] || die "$1 needs a value (see --help)"; }

# whole OPTION VALUE: fails where the value is no whole number.
whole() { [[ $2 =~ ^[0-9]+$ ]] || die "$1 takes a whole number, not '$2'"; }

command_found() { command -v "$1" >/dev/null || die "no \`$1\` on PATH: $2"; }

# use_token FILE [make]: every Ray command of this shell shows the token in FILE; `make` creates it where it is missing.
use_token() {
  local file=$1
  [[ $file == /* ]] || file=$PWD/$file # Ray's processes have directories of their own
  if [[ ! -s $file ]]; then
    [[ ${2:-} == make ]] || die "no token in $file: copy the head's there (mode 600), or name another with --token-file"
    (
      umask 077
      mkdir -p "$(dirname "$file")"
      od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$file"
    )
    say "made a token: $file (every node needs this file)"
  fi
  if [[ $(stat -L -c %a "$file") != *00 ]]; then # as `ray get-auth-token --generate` leaves it
    [[ -O $file ]] || die "$file can be read by others, and is not yours to change: chmod 600 $file"
    chmod 600 "$file"
    say "$file could be read by others: its mode is 600 now"
  fi
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$file
  unset RAY_AUTH_TOKEN # which would win over the file
}

# fetch URL [ARGUMENT OF curl...]: sets `code`, the HTTP status (000 where nobody answers), and `body`, or curl's complaint.
# shellcheck disable=SC2034 # who sources this reads them
fetch() {
  local answer
  answer=$(curl -sS --noproxy '*' -w '\n%{http_code}' "$@" 2>&1) || true # curl's own --fail-with-body is from 2021
  code=${answer##*$'\n'} body=${answer%$'\n'*}
  [[ $code =~ ^[0-9]{3}$ ]] || code=000 body=$answer
}

# running PIDFILE: true while the process named there is the `ray start` that these scripts started.
running() {
  local pid
  [[ -s $1 ]] || return 1
  pid=$(<"$1")
  [[ -r /proc/$pid/cmdline ]] && tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q ' start .*--block'
}

# start_ray NAME TIMEOUT_S ARGUMENTS...: `ray start --block ARGUMENTS` in the background; returns when Ray runs.
start_ray() {
  local name=$1 timeout_s=$2 pidfile log pid
  shift 2
  mkdir -p "$MOE_RAY_STATE_DIR"
  pidfile=$MOE_RAY_STATE_DIR/$name.pid log=$MOE_RAY_STATE_DIR/$name.log
  if running "$pidfile"; then
    die "$name runs already (process $(<"$pidfile")); end it with stop.sh --name $name"
  fi
  command_found ray "install moe_ray here, or activate its virtual environment"
  : >"$log" # here, not by the process below: until that one runs, the log of the last time would be read
  # The niceness: else every level of actors runs 15 steps lower.
  RAY_worker_niceness=${RAY_worker_niceness:-0} RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0} \
    PYTHONUNBUFFERED=1 setsid nohup ray start --block "$@" >>"$log" 2>&1 </dev/null &
  pid=$!
  printf '%s\n' "$pid" >"$pidfile"
  for ((waited = 0; waited < timeout_s * 5; waited++)); do
    if grep -q "$STARTED" "$log"; then
      say "$name runs (process $pid, log $log)"
      return
    fi
    if ! kill -0 "$pid" 2>/dev/null; then
      rm -f "$pidfile"
      tail -n 15 "$log" >&2
      die "ray start ended; its log is above and in $log"
    fi
    sleep 0.2
  done
  kill -TERM "$pid"
  tail -n 15 "$log" >&2
  die "$name does not run after $timeout_s s; its log is above and in $log"
}
