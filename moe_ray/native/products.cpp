// The products of linear.h with each kind of panels: a unit of its own, so that compilers work side by side.

#include "linear.h"

namespace moe_ray {

template void strip_of<Floats<float>>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);
template void strip_of<Floats<half>>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);
template void strip_of<Pairs>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);
#if !defined(MOE_RAY_BYTES_ARE_WIDE)
template void strip_of<Bytes>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);
#endif
template void strip_of<WideBytes>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);
template void strip_of<Nibbles<true>>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);
template void strip_of<Nibbles<false>>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);

}  // namespace moe_ray
