// One layer of a trunk up to its experts, and what comes after the last: norms, rotary embeddings, attention, the router.
// T is the dtype of rows, and of the KV cache unless that has scales; hidden states are float32.
#pragma once

#include "latent.h"
#include "router.h"

namespace moe_ray {

inline void store_lanes(float* out, const float* values, int64_t left) {
  std::memcpy(out, values, std::min<int64_t>(left, kPanel) * sizeof(float));
}

// Writes what layer_front of kernels.cpp says.
template <class T>
void layer_front(Pool& threads, const Shape& s, const Layer& layer, const Step& step, float* hidden, T* rows,
                 float* row_weights, int64_t* counts, int32_t* row_of) {
  const int64_t tokens = step.tokens, D = s.hidden;
  const int64_t width = (s.heads + s.kv_parts() * s.kv_heads) * s.head_dim, q_width = s.heads * s.head_dim;
  const Matrix out_matrix = matrix_at(layer.out);
  float* normed = room(scratch.normed, tokens * D);
  float* qkv = room(scratch.qkv, tokens * width);
  float* attended = room(scratch.attended, tokens * q_width);
  const auto each_token = [&](const auto& work) { for_tokens(threads, tokens, work); };
  each_token([&](int64_t t) { rms_norm(hidden + t * D, layer.input_norm, D, s.eps, normed + t * D); });
  const auto additions = [&](const Addition LayerAdapter::*of, const auto* x, int64_t ldx) {
    return Additions(threads, step.runs, step.num_runs, of, x, ldx, tokens);
  };
  if (s.kv_rank) {
    latent_projections(threads, s, layer, tokens, normed, qkv);
  } else {
    const Matrix qkv_matrix = matrix_at(layer.qkv);
    const int64_t k_panel = q_width / kPanel, v_panel = k_panel + s.kv_heads * s.head_dim / kPanel;
    const Additions to_qkv = additions(&LayerAdapter::qkv, normed, D);
    const Inputs in = inputs_for(threads, scratch.inputs, qkv_matrix, normed, D, tokens);
    linear(threads, in, tokens, qkv_matrix, [&](int64_t i, int64_t p, const float* values) {
      store(qkv + i * width + p * kPanel, to_qkv.to(load(values), i, p, (p >= k_panel) + (p >= v_panel)));
    });
  }
  if (layer.k_scales) self_attention<int8_t>(threads, s, layer, step, qkv, attended);
  else if (layer.float8) self_attention<e4m3>(threads, s, layer, step, qkv, attended);
  else self_attention<T>(threads, s, layer, step, qkv, attended);
  const float* heads = s.kv_rank ? latent_outputs(threads, s, layer, tokens, attended) : attended;
  const int64_t of_heads = out_matrix.k();
  const Additions to_out = additions(&LayerAdapter::out, heads, of_heads);
  Inputs in = inputs_for(threads, scratch.inputs, out_matrix, heads, of_heads, tokens);
  linear(threads, in, tokens, out_matrix, [&](int64_t i, int64_t p, const float* values) {
    float* at = hidden + i * D + p * kPanel;
    Lanes added = to_out.to(load(values), i, p, 0);
    if (layer.out_bias) added = added + load(layer.out_bias + p * kPanel);
    store(at, load(at) + added * all(s.residual));
  });

  // The router sees the rows that the experts see.
  T* row = reinterpret_cast<T*>(normed);
  each_token([&](int64_t t) { rms_norm(hidden + t * D, layer.post_norm, D, s.eps, row + t * D); });
  if (!layer.gate) {
    std::memcpy(rows, row, tokens * D * sizeof(T));
    return;
  }
  const Matrix gate = matrix_at(layer.gate);
  const int64_t padded = panels_of(s.experts) * kPanel;
  float* logits = room(scratch.logits, tokens * padded);
  int32_t* chosen = room(scratch.chosen, tokens * s.top_k);
  float* weights = room(scratch.weights, tokens * s.top_k);
  const Additions to_gate = additions(&LayerAdapter::gate, row, D);
  in = inputs_for(threads, scratch.inputs, gate, row, D, tokens);
  linear(threads, in, tokens, gate, [&](int64_t i, int64_t p, const float* values) {
    Lanes logit = to_gate.to(load(values), i, p, 0);
    if (layer.router_bias) logit = logit + load(layer.router_bias + p * kPanel);
    store(logits + i * padded + p * kPanel, logit);
  });
  each_token([&](int64_t t) {
    choose(s, layer.correction, logits + t * padded, chosen + t * s.top_k, weights + t * s.top_k);
  });
  std::fill(counts, counts + s.experts, 0);
  for (int64_t i = 0; i < tokens * s.top_k; i++) counts[chosen[i]]++;
  std::vector<int64_t> next(s.experts, 0);
  for (int64_t e = 1; e < s.experts; e++) next[e] = next[e - 1] + counts[e - 1];
  for (int64_t i = 0; i < tokens * s.top_k; i++) {
    const int64_t to = next[chosen[i]]++;
    std::memcpy(rows + to * D, row + i / s.top_k * D, D * sizeof(T));
    row_weights[to] = weights[i];
    row_of[i] = static_cast<int32_t>(to);
  }
}

// hidden [T, D] += each token's rows of [T * K, D], those that row_of [T, K] names, in that order.
template <class T>
void combine(float* hidden, int64_t tokens, int64_t width, int64_t top_k, const T* rows, const int32_t* row_of) {
  for (int64_t t = 0; t < tokens; t++) {
    float* h = hidden + t * width;
    for (int64_t i = 0; i < width; i += 16) {
      Lanes total = all(0.0f);
      for (int64_t j = 0; j < top_k; j++) total = total + load(rows + row_of[t * top_k + j] * width + i);
      store(h + i, load(h + i) + total);
    }
  }
}

// out [rows, n] = x [rows, k] w^T, and what is added.
template <class T>
void linear_into(Pool& threads, const T* x, int64_t rows, const Matrix& m, float* out, const Additions* added = nullptr) {
  const int64_t n = m.head->n;
  const Inputs in = inputs_for(threads, scratch.inputs, m, x, m.k(), rows);
  linear(threads, in, rows, m, [&](int64_t i, int64_t p, const float* values) {
    alignas(64) float more[kPanel];
    if (added) store(more, added->to(load(values), i, p, 0));
    store_lanes(out + i * n + p * kPanel, added ? more : values, n - p * kPanel);
  });
}

}  // namespace moe_ray
