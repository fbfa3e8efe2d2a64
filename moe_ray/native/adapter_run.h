// Consecutive rows of a call to which one adapter is added: as the host resolves them and the kernels take them.
#pragma once

#include <cstdint>

namespace moe_ray {

struct AdapterRun {
  uint64_t id;         // 0: no adapter
  const void* adapter;  // what computes knows the adapter by; null: nothing is added
  int64_t count;       // rows
};

}  // namespace moe_ray
