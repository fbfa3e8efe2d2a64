// Attention over a KV cache of float16: a unit of its own, so that compilers work side by side.

#include "self_attention.h"

namespace moe_ray {

template void self_attention<half>(Pool&, const Shape&, const Layer&, const Step&, float*, float*);

}  // namespace moe_ray
