// `host.h` behind a C interface (see host.py). Needs no instruction set of its own: what computes comes as a function.

#include "host.h"

using namespace moe_ray;

extern "C" {

void* host_new(int64_t hidden, uint64_t dtype, int64_t most, uint64_t most_queued, int spread) {
  return new Host(hidden, dtype, most, most_queued, spread != 0);
}
void host_free(void* host) { delete static_cast<Host*>(host); }

void host_add(void* host, uint64_t layer, uint64_t expert, Forward forward, void* handle) {
  static_cast<Host*>(host)->add(layer, expert, forward, handle);
}

int host_add_adapter(void* host, uint64_t layer, uint64_t expert, uint64_t adapter_id, const void* handle) {
  return static_cast<Host*>(host)->add_adapter(layer, expert, adapter_id, handle);
}
void host_remove_adapter(void* host, uint64_t layer, uint64_t expert, uint64_t adapter_id) {
  static_cast<Host*>(host)->remove_adapter(layer, expert, adapter_id);
}

// A `Forward` that returns every row as it came: the carrier without the expert.
int32_t echo(void*, const void* rows, const float*, int64_t count, int64_t row_bytes, void* out, const AdapterRun*,
             int64_t, char*) {
  std::memcpy(out, rows, count * row_bytes);
  return 1;
}

void host_stats(void* host, HostStats* out) { *out = static_cast<Host*>(host)->stats(); }
uint64_t host_key_stats(void* host, KeyStats* out, uint64_t most) {
  return static_cast<Host*>(host)->key_stats(out, most);
}

// Answers calls on a connection until it ends, or something comes that is no call.
void host_serve(void* host, int fd) {
  try {
    static_cast<Host*>(host)->serve(fd);
  } catch (const std::exception&) {
  }
}

// Before the interpreter ends: no host of this process computes from now on; waits for those that do.
void hosts_end(int timeout_ms) { CallQueue::end_all(timeout_ms); }

}  // extern "C"
