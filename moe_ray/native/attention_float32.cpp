// Attention over a KV cache of float32: a unit of its own, so that compilers work side by side.

#include "self_attention.h"

namespace moe_ray {

template Attend<float> attend_for<float>(int64_t);
template void self_attention<float>(Pool&, const Shape&, const Layer&, const Step&, float*, float*);

}  // namespace moe_ray
