// What an expert computes beside its products with weights: biases, and what becomes of gate and up.
#pragma once

#include "matrix.h"

namespace moe_ray {

struct Gating {
  const float* bias13;  // [2 I]: of gate and up, 16 of the one and 16 of the other in turns, as w13 has them; null: none
  const float* bias2;   // [D]; null: none
  float limit, alpha;   // of clamped SwiGLU; limit 0: silu(gate) * up
};

// g sigmoid(alpha g) (u + 1), where g is gate, at most `limit`, and u is up between -limit and limit (gpt-oss,
// arXiv:2508.10925). What is no number stays none.
inline Lanes clamped_swiglu(Lanes gate, Lanes up, float limit, float alpha) {
  const Lanes g = minimum(all(limit), gate), u = maximum(all(-limit), minimum(all(limit), up));
  return g / (all(1.0f) + exponential(all(0.0f) - g * all(alpha))) * (u + all(1.0f));
}

// What is multiplied with down, of a panel of gate and one of up; `panel`: the number of the gate's in w13.
inline Lanes gated(const Gating& of, Lanes gate, Lanes up, int64_t panel) {
  if (of.bias13) {
    gate = gate + load(of.bias13 + panel * kPanel);
    up = up + load(of.bias13 + (panel + 1) * kPanel);
  }
  return of.limit > 0.0f ? clamped_swiglu(gate, up, of.limit, of.alpha) : silu(gate) * up;
}

}  // namespace moe_ray
