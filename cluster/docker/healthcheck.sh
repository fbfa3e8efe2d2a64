#!/usr/bin/env bash
# Exits 0 while this container does its work: its server answers /health, or, where it is to have none, Ray's raylet runs.
# `moe-ray serve` is to have one, in a plain container; so is whatever has MOE_RAY_HEALTH_NEEDS_HTTP set.
set -euo pipefail

port=${MOE_RAY_PORT:-8000}
if wget -q -T 5 -O /dev/null "http://127.0.0.1:$port/health"; then
  exit 0
fi
# A server that listens and says 503 is not healthy; a node of a cluster has no server.
if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
  exit 1
fi
if [[ -n ${MOE_RAY_HEALTH_NEEDS_HTTP:-} ]] || pgrep -f '[m]oe-ray serve' >/dev/null; then
  exit 1
fi
pgrep -x raylet >/dev/null
