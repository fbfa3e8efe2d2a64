// One layer of a trunk up to its experts, and what comes after the last: norms, rotary embeddings, attention, the router.
// T is the dtype of rows, and of the KV cache unless that has scales; hidden states are float32.
#pragma once

#include "attention.h"
#include "low_rank.h"

namespace moe_ray {

// Sizes that a layer's kernels need. All of hidden and inner sizes: multiples of 32.
struct Shape {
  int64_t hidden, heads, kv_heads, head_dim, experts, top_k;
  float eps, scale;
  int64_t window;  // 0: none
  float residual;  // what attention and experts add is times this
  int32_t renormalise;  // whether the weights of a token's experts sum to 1 (times residual)
  int32_t whole_qk_norm;  // whether a token's queries are normalised together, and its keys, not each head
};

struct Layer {
  const float *input_norm, *post_norm;  // [D]
  const void *qkv, *out, *gate;         // matrices: [q + 2 kv, D], [D, q], [E, D]
  void *k_cache, *v_cache;              // [slots, kv_heads, head_dim], as rows or, with scales, int8_t
  float *k_scales, *v_scales;           // [slots, kv_heads] or null
  const float *q_norm, *k_norm;         // [head_dim] or, together, [q] and [kv]; null: none
  const float *qkv_bias, *out_bias;     // [q + 2 kv], [D]; null: none
};

struct LayerAdapter {  // what one adapter adds to a layer: to q, k and v, three parts of one block, and to the others
  Addition qkv, out, gate;
};

struct HeadAdapter {
  Addition head;
};

struct Step {  // T tokens
  int64_t tokens, block_size;
  const int32_t *positions, *slots, *sequence;  // [T]
  const int32_t* tables;                        // the sequences' block tables, one after the other
  const int64_t* table_start;                   // [S] where each begins
  const float* rope;                            // [positions, 2, head_dim / 2] cos, sin
  const AdapterRun* runs;                       // which LayerAdapter is added for which tokens; none: for no token
  int64_t num_runs;
};

struct Scratch {  // of the thread that calls; grows to the largest step
  InputRoom inputs;
  std::vector<float> normed, qkv, attended, hidden, logits, weights;
  std::vector<float> q;  // or narrower
  std::vector<float> q_scales;
  std::vector<int32_t> chosen;
};
inline thread_local Scratch scratch;
inline thread_local AttentionRoom attention_room;

template <class Out>
void rms_norm(const float* x, const float* weight, int64_t n, float eps, Out* out) {
  Lanes squares = all(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const Lanes v = load(x + i);
    squares = plus_product(v, v, squares);
  }
  const Lanes factor = all(1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < n; i += 16) store(out + i, load(x + i) * factor * load(weight + i));
}

// Rotates one head's halves (not interleaved pairs).
template <class Out>
void rotate(const float* x, const float* rope, int64_t head_dim, Out* out) {
  const int64_t half_dim = head_dim / 2;
  for (int64_t i = 0; i < half_dim; i += 16) {
    const Lanes a = load(x + i), b = load(x + half_dim + i);
    const Lanes cos = load(rope + i), sin = load(rope + half_dim + i);
    store(out + i, minus_product(b, sin, a * cos));
    store(out + half_dim + i, plus_product(a, sin, b * cos));
  }
}

// Adds the biases of one token's queries, keys and values [q + 2 kv], and normalises its queries and keys.
inline void bias_and_norm(const Shape& s, const Layer& layer, float* x) {
  const int64_t hd = s.head_dim, parts = s.heads + s.kv_heads;
  if (layer.qkv_bias)
    for (int64_t i = 0; i < (parts + s.kv_heads) * hd; i += 16) store(x + i, load(x + i) + load(layer.qkv_bias + i));
  if (!layer.q_norm) return;
  float* keys = x + s.heads * hd;
  if (s.whole_qk_norm) {
    rms_norm(x, layer.q_norm, s.heads * hd, s.eps, x);
    rms_norm(keys, layer.k_norm, s.kv_heads * hd, s.eps, keys);
    return;
  }
  for (int64_t h = 0; h < parts; h++)
    rms_norm(x + h * hd, h < s.heads ? layer.q_norm : layer.k_norm, hd, s.eps, x + h * hd);
}

// Softmax over all experts, the `k` largest in ascending expert order, renormalised or not. Equals: lower number.
inline void choose(const Shape& s, const float* logits, int32_t* chosen, float* weights) {
  const int64_t experts = s.experts, k = s.top_k;
  for (int64_t j = 0; j < k; j++) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; e++) {
      bool taken = false;
      for (int64_t i = 0; i < j; i++) taken |= chosen[i] == e;
      if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
    }
    chosen[j] = static_cast<int32_t>(best);
  }
  std::sort(chosen, chosen + k);
  float most = logits[chosen[0]], total = 0.0f;
  for (int64_t j = 1; j < k; j++) most = std::max(most, logits[chosen[j]]);
  for (int64_t j = 0; j < k; j++) total += weights[j] = std::exp(logits[chosen[j]] - most);
  if (!s.renormalise) {
    total = 0.0f;
    for (int64_t e = 0; e < experts; e++) total += std::exp(logits[e] - most);
  }
  for (int64_t j = 0; j < k; j++) weights[j] = weights[j] / total * s.residual;
}

inline void store_lanes(float* out, const float* values, int64_t left) {
  std::memcpy(out, values, std::min<int64_t>(left, kPanel) * sizeof(float));
}

inline bool are_few(int64_t tokens) { return tokens <= 16; }

// Calls work with the number of each token.
template <class Work>
void for_tokens(Pool& threads, int64_t tokens, const Work& work) {
  const int64_t batch = 8;  // tokens per chunk of work
  const int chunks = static_cast<int>((tokens + batch - 1) / batch);
  threads.run(chunks, are_few(tokens), [&](int chunk, int) {
    for (int64_t t = chunk * batch; t < std::min(tokens, (chunk + 1) * batch); t++) work(t);
  });
}

// Rotates queries and keys of qkv [T, q + 2 kv] where they are, writes keys and values to the cache, which holds C, and
// attends: attended [T, q].
template <class C>
void self_attention(Pool& threads, const Shape& s, const Layer& layer, const Step& step, float* qkv, float* attended) {
  const int64_t tokens = step.tokens, hd = s.head_dim, kv_heads = s.kv_heads;
  const int64_t width = (s.heads + 2 * kv_heads) * hd, q_width = s.heads * hd;
  auto* q = reinterpret_cast<typename Scores<C>::Query*>(room(scratch.q, tokens * q_width));
  float* q_scales = room(scratch.q_scales, tokens * s.heads);
  auto *k_cache = static_cast<C*>(layer.k_cache), *v_cache = static_cast<C*>(layer.v_cache);
  for_tokens(threads, tokens, [&](int64_t t) {
    float* x = qkv + t * width;
    const float* rope = step.rope + static_cast<int64_t>(step.positions[t]) * hd;
    bias_and_norm(s, layer, x);
    for (int64_t h = 0; h < s.heads + kv_heads; h++) rotate(x + h * hd, rope, hd, x + h * hd);
    for (int64_t h = 0; h < s.heads; h++)
      q_scales[t * s.heads + h] = s.scale * keep(x + h * hd, hd, q + t * q_width + h * hd);
    const int64_t row = static_cast<int64_t>(step.slots[t]) * kv_heads;
    for (int64_t h = 0; h < kv_heads; h++) {
      const float *k = x + (s.heads + h) * hd, *v = k + kv_heads * hd;
      const float k_scale = keep(k, hd, k_cache + (row + h) * hd), v_scale = keep(v, hd, v_cache + (row + h) * hd);
      if (PagedCache<C>::kScaled) layer.k_scales[row + h] = k_scale, layer.v_scales[row + h] = v_scale;
    }
  });
  const int64_t group = s.heads / kv_heads;
  const Attend<C> attend = attend_for<C>(group);
  const int64_t each = are_few(tokens) ? 1 : 4, units = tokens * kv_heads;
  threads.run(static_cast<int>((units + each - 1) / each), units <= 4, [&](int chunk, int) {
    for (int64_t u = chunk * each; u < std::min(units, (chunk + 1) * each); u++) {
      const int64_t t = u / kv_heads, h = u % kv_heads, first = t * s.heads + h * group;
      const int64_t last = step.positions[t] + 1;
      PagedCache<C> cache{k_cache + h * hd, v_cache + h * hd, nullptr, nullptr, nullptr, step.block_size, kv_heads, hd};
      cache.table = step.tables + step.table_start[step.sequence[t]];
      if (PagedCache<C>::kScaled) cache.k_scales = layer.k_scales + h, cache.v_scales = layer.v_scales + h;
      const int64_t from = s.window ? std::max<int64_t>(0, last - s.window) : 0;
      attend(cache, q + first * hd, q_scales + first, from, last, attention_room, attended + first * hd);
    }
  });
}

// Writes what layer_front of kernels.cpp says.
template <class T>
void layer_front(Pool& threads, const Shape& s, const Layer& layer, const Step& step, float* hidden, T* rows,
                 float* row_weights, int64_t* counts, int32_t* row_of) {
  const int64_t tokens = step.tokens, D = s.hidden;
  const int64_t width = (s.heads + 2 * s.kv_heads) * s.head_dim, q_width = s.heads * s.head_dim;
  const Matrix qkv_matrix = matrix_at(layer.qkv), out_matrix = matrix_at(layer.out), gate = matrix_at(layer.gate);
  float* normed = room(scratch.normed, tokens * D);
  float* qkv = room(scratch.qkv, tokens * width);
  float* attended = room(scratch.attended, tokens * q_width);
  const auto each_token = [&](const auto& work) { for_tokens(threads, tokens, work); };
  each_token([&](int64_t t) { rms_norm(hidden + t * D, layer.input_norm, D, s.eps, normed + t * D); });
  const auto additions = [&](const Addition LayerAdapter::*of, const auto* x, int64_t ldx) {
    return Additions(threads, step.runs, step.num_runs, of, x, ldx, tokens);
  };
  const int64_t k_panel = q_width / kPanel, v_panel = k_panel + s.kv_heads * s.head_dim / kPanel;
  const Additions to_qkv = additions(&LayerAdapter::qkv, normed, D);
  Inputs in = inputs_for(threads, scratch.inputs, qkv_matrix, normed, D, tokens);
  linear(threads, in, tokens, qkv_matrix, [&](int64_t i, int64_t p, const float* values) {
    store(qkv + i * width + p * kPanel, to_qkv.to(load(values), i, p, (p >= k_panel) + (p >= v_panel)));
  });
  if (layer.k_scales) self_attention<int8_t>(threads, s, layer, step, qkv, attended);
  else self_attention<T>(threads, s, layer, step, qkv, attended);
  const Additions to_out = additions(&LayerAdapter::out, attended, q_width);
  in = inputs_for(threads, scratch.inputs, out_matrix, attended, q_width, tokens);
  linear(threads, in, tokens, out_matrix, [&](int64_t i, int64_t p, const float* values) {
    float* at = hidden + i * D + p * kPanel;
    Lanes added = to_out.to(load(values), i, p, 0);
    if (layer.out_bias) added = added + load(layer.out_bias + p * kPanel);
    store(at, load(at) + added * all(s.residual));
  });

  // The router sees the rows that the experts see.
  T* row = reinterpret_cast<T*>(normed);
  each_token([&](int64_t t) { rms_norm(hidden + t * D, layer.post_norm, D, s.eps, row + t * D); });
  const int64_t padded = panels_of(s.experts) * kPanel;
  float* logits = room(scratch.logits, tokens * padded);
  int32_t* chosen = room(scratch.chosen, tokens * s.top_k);
  float* weights = room(scratch.weights, tokens * s.top_k);
  const Additions to_gate = additions(&LayerAdapter::gate, row, D);
  in = inputs_for(threads, scratch.inputs, gate, row, D, tokens);
  linear(threads, in, tokens, gate, [&](int64_t i, int64_t p, const float* values) {
    store(logits + i * padded + p * kPanel, to_gate.to(load(values), i, p, 0));
  });
  each_token([&](int64_t t) {
    choose(s, logits + t * padded, chosen + t * s.top_k, weights + t * s.top_k);
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
