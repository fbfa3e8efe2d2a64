// Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): what is cached of a token is its latent and one
// rotated key, [kv_rank + rope_dim] = head_dim numbers, which are key and value of all heads. Queries are brought to the
// latents' space before they attend, and what heads attend to out of it.
#pragma once

#include "self_attention.h"

namespace moe_ray {

// Queries and key of each token, before rotation: qk [T, heads + 1, head_dim], of normed [T, D].
inline void latent_projections(Pool& threads, const Shape& s, const Layer& layer, int64_t tokens, const float* normed,
                               float* qk) {
  const int64_t query = s.nope + s.rope_dim, width = (s.heads + 1) * s.head_dim, key_at = s.heads * s.head_dim;
  const int64_t first = s.q_rank ? s.q_rank : s.heads * query;  // where a token's own latent and key begin in what is below
  const Matrix down = matrix_at(layer.qkv), keys = matrix_at(layer.keys);
  float* nope = room(scratch.by_head, s.heads * tokens * s.nope);  // [heads, T, nope]
  float* latents = room(scratch.latents, tokens * s.q_rank);
  const auto store_query = [&](int64_t t, int64_t column, const float* values) {
    const int64_t h = column / query, at = column % query;
    float* to = at < s.nope ? nope + (h * tokens + t) * s.nope + at : qk + t * width + h * s.head_dim + s.kv_rank + at - s.nope;
    store(to, load(values));
  };
  Inputs in = inputs_for(threads, scratch.inputs, down, normed, s.hidden, tokens);
  linear(threads, in, tokens, down, [&](int64_t t, int64_t p, const float* values) {
    const int64_t column = p * kPanel;
    if (column >= first) store(qk + t * width + key_at + column - first, load(values));
    else if (s.q_rank) store(latents + t * s.q_rank + column, load(values));
    else store_query(t, column, values);
  });
  for_tokens(threads, tokens, [&](int64_t t) {
    float* key = qk + t * width + key_at;
    rms_norm(key, layer.kv_latent_norm, s.kv_rank, s.latent_eps, key);
    if (s.q_rank) rms_norm(latents + t * s.q_rank, layer.q_latent_norm, s.q_rank, s.latent_eps, latents + t * s.q_rank);
  });
  if (s.q_rank) {
    const Matrix up = matrix_at(layer.q_up);
    in = inputs_for(threads, scratch.inputs, up, latents, s.q_rank, tokens);
    linear(threads, in, tokens, up, [&](int64_t t, int64_t p, const float* values) { store_query(t, p * kPanel, values); });
  }
  in = inputs_for(threads, scratch.inputs, keys, nope, s.nope, s.heads * tokens);
  linear(threads, in, tokens, keys, [&](int64_t row, int64_t p, const float* values) {
    const int64_t h = row / tokens, t = row % tokens;
    store(qk + t * width + h * s.head_dim + p * kPanel - h * s.kv_rank, load(values));
  }, s.heads);
}

// Outputs of all heads [T, heads * value] of what they attended to [T, heads, head_dim]: sums of cached rows.
inline float* latent_outputs(Pool& threads, const Shape& s, const Layer& layer, int64_t tokens, const float* attended) {
  const Matrix values = matrix_at(layer.values);
  float* by_head = room(scratch.by_head, s.heads * tokens * s.kv_rank);  // [heads, T, kv_rank]
  float* out = room(scratch.latents, tokens * s.heads * s.value);
  for_tokens(threads, tokens, [&](int64_t t) {
    for (int64_t h = 0; h < s.heads; h++)
      std::memcpy(by_head + (h * tokens + t) * s.kv_rank, attended + (t * s.heads + h) * s.head_dim,
                  s.kv_rank * sizeof(float));
  });
  const Inputs in = inputs_for(threads, scratch.inputs, values, by_head, s.kv_rank, s.heads * tokens);
  linear(threads, in, tokens, values, [&](int64_t row, int64_t p, const float* found) {
    store(out + row % tokens * s.heads * s.value + p * kPanel, load(found));
  }, s.heads);
  return out;
}

}  // namespace moe_ray
