#!/usr/bin/env bash
# Runs a command of the image: "$@". First it puts the prebuilt native libraries where moe_ray looks for them, in the cache,
# which may be an empty volume, and Triton's kernels into its cache. KubeRay does not run an image's entrypoint: there, `moe-ray-entrypoint true` before
# `ray start` does that much.
set -euo pipefail

prebuilt=${MOE_RAY_PREBUILT:-/opt/moe-ray/native}
cache=${MOE_RAY_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/moe-ray}/native
if mkdir -p "$cache" 2>/dev/null && [[ -w $cache ]]; then
  for library in "$prebuilt"/*.so; do
    name=$(basename "$library")
    if [[ -e $library && ! -e $cache/$name ]]; then
      cp "$library" "$cache/.$name.$$"
      mv "$cache/.$name.$$" "$cache/$name" # at once: others may share the volume
    fi
  done
fi
# What is there stays: a kernel that was compiled is as good. Copies name the files of the image, and need them to be there.
kernels=${MOE_RAY_PREBUILT_TRITON:-/opt/moe-ray/triton}
if [[ -d $kernels && -n ${TRITON_CACHE_DIR:-} ]] && mkdir -p "$TRITON_CACHE_DIR" 2>/dev/null; then
  cp -rn "$kernels/." "$TRITON_CACHE_DIR/" 2>/dev/null || true
fi
exec "$@"
