"""Where KV blocks go that the cache has no room for: host memory, and a directory of a disk."""
