// Attention over a KV cache of bfloat16: a unit of its own, so that compilers work side by side.

#include "self_attention.h"

namespace moe_ray {

template void self_attention<bf16>(Pool&, const Shape&, const Layer&, const Step&, float*, float*);

}  // namespace moe_ray
