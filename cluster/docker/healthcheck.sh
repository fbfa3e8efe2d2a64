#!/usr/bin/env bash
# Exits 0 while this container does its work: its server answers /health, or, where none listens, Ray's raylet runs.
set -euo pipefail

port=${MOE_RAY_PORT:-8000}
if wget -q -T 5 -O /dev/null "http://127.0.0.1:$port/health"; then
  exit 0
fi
# A server that listens and says 503 is not healthy; a node of a cluster has no server.
if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
  exit 1
fi
[[ -z ${MOE_RAY_HEALTH_NEEDS_HTTP:-} ]] && pgrep -x raylet >/dev/null
