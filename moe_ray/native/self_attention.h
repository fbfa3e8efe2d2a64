// A layer's attention: norms and rotary embeddings of queries and keys, what is written to the cache, and which tokens attend
// together.
#pragma once

#include <numeric>

#include "attention_tile.h"
#include "step.h"

namespace moe_ray {

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

// Cuts the numbers x [n] to magnitude `most`; what is no number stays none.
inline void clip(float* x, int64_t n, float most) {
  const Lanes top = all(most), bottom = all(-most);
  for (int64_t i = 0; i < n; i += 16) store(x + i, maximum(bottom, minimum(top, load(x + i))));
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

constexpr int64_t kFewRows = 12;  // heads of tokens, from which on computing them together pays
constexpr double kShortProducts = 1 << 20;  // of numbers of queries and keys: not worth waking another thread

// Query heads of a KV head that attend together: all, or as many as a kernel is there for and divide them.
inline int64_t heads_together(const Shape& s) {
  const int64_t all_heads = s.heads / s.kv_heads;
  int64_t together = std::min<int64_t>(all_heads, 16);
  while (all_heads % together || !attend_for<float>(together)) together--;
  return together;
}

// Fills scratch.units with what is computed together: tokens of a chunk or, where `together`, of the sequences that share
// positions. Returns how many positions all tokens see, in all.
inline double plan_units(const Shape& s, int64_t window, const Step& step, bool together) {
  const int64_t tokens = step.tokens, most = std::max<int64_t>(1, kTileRows / heads_together(s));
  std::vector<int32_t>& order = scratch.order;
  std::vector<AttentionUnit>& units = scratch.units;
  order.resize(tokens);
  std::iota(order.begin(), order.end(), 0);
  if (together) {
    const auto alone = [&](int32_t t) { return step.shared[step.sequence[t]] == 0; };
    order.erase(std::remove_if(order.begin(), order.end(), alone), order.end());
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return step.leader[step.sequence[a]] < step.leader[step.sequence[b]];
    });
  }
  units.clear();
  double seen = 0;
  for (int64_t i = 0, of = -1; i < static_cast<int64_t>(order.size()); i++) {
    const int32_t sequence = step.sequence[order[i]], with = together ? step.leader[sequence] : sequence;
    if (with != of || units.back().count == most) units.push_back({i, 0});
    units.back().count++;
    of = with;
    const int64_t end = step.positions[order[i]] + 1, shared = step.shared ? step.shared[sequence] : 0;
    const int64_t from = window ? std::max<int64_t>(0, end - window) : 0, own = std::min(end, std::max(from, shared));
    seen += static_cast<double>(together ? own - from : end - own);
  }
  return seen;
}

// Rotates queries and keys of qkv [T, q + 2 kv] where they are, writes keys and values to the cache, which holds C, and
// attends: attended [T, q].
template <class C>
void self_attention(Pool& threads, const Shape& s, const Layer& layer, const Step& step, float* qkv, float* attended) {
  const int64_t tokens = step.tokens, hd = s.head_dim, kv_heads = s.kv_heads;
  const int64_t width = (s.heads + s.kv_parts() * kv_heads) * hd, q_width = s.heads * hd, window = window_of(s, layer);
  const int64_t turned = s.rope_dim ? s.rope_dim : hd, still = hd - turned;  // elements of a head
  auto* q = reinterpret_cast<typename Scores<C>::Query*>(room(scratch.q, tokens * q_width));
  float* q_scales = room(scratch.q_scales, tokens * s.heads);
  auto *k_cache = static_cast<C*>(layer.k_cache), *v_cache = static_cast<C*>(layer.v_cache);
  for_tokens(threads, tokens, [&](int64_t t) {
    float* x = qkv + t * width;
    const float* rope = step.rope + static_cast<int64_t>(step.positions[t]) * turned;
    bias_and_norm(s, layer, x);
    if (s.clip_qkv > 0.0f) clip(x, width, s.clip_qkv);
    for (int64_t h = 0; h < s.heads + kv_heads; h++) rotate(x + h * hd + still, rope, turned, x + h * hd + still);
    for (int64_t h = 0; h < s.heads; h++)
      q_scales[t * s.heads + h] = s.scale * keep(x + h * hd, hd, q + t * q_width + h * hd);
    const int64_t row = static_cast<int64_t>(step.slots[t]) * kv_heads;
    for (int64_t h = 0; h < kv_heads; h++) {
      const float *k = x + (s.heads + h) * hd, *v = k + kv_heads * hd;
      const float k_scale = keep(k, hd, k_cache + (row + h) * hd);
      if (PagedCache<C>::kScaled) layer.k_scales[row + h] = k_scale;
      if (s.kv_parts() == 1) continue;
      const float v_scale = keep(v, hd, v_cache + (row + h) * hd);
      if (PagedCache<C>::kScaled) layer.v_scales[row + h] = v_scale;
    }
  });
  const int64_t group = heads_together(s), groups = s.heads / group, groups_of_one = groups / kv_heads;
  const Attend<C> attend = attend_for<C>(group);
  Running* so_far = room(scratch.so_far, tokens * s.heads);
  if (layer.sinks) {  // as a partition before all others: of one weight, e^(sink - sink), whose value is 0
    for (int64_t i = 0; i < tokens * s.heads; i++) so_far[i] = {layer.sinks[i % s.heads], 1.0f};
    std::fill(attended, attended + tokens * q_width, 0.0f);
  } else {
    std::fill(so_far, so_far + tokens * s.heads, Running{});
  }
  const int32_t* order = scratch.order.data();
  // Lets a group of heads attend to positions [first, last) of what each token of a unit sees, beyond those that it shares
  // unless `together`.
  const auto compute = [&](const AttentionUnit& unit, int64_t g, bool together) {
    const int64_t h = g / groups_of_one;
    const int32_t *members = order + unit.from, sequence = step.sequence[members[0]];
    PagedCache<C> cache{k_cache + h * hd, v_cache + h * hd, nullptr, nullptr, nullptr, step.block_size, kv_heads, hd};
    cache.table = step.tables + step.table_start[sequence];
    if (PagedCache<C>::kScaled) cache.k_scales = layer.k_scales + h, cache.v_scales = layer.v_scales + h;
    const int64_t shared = step.shared ? step.shared[sequence] : 0;
    TileToken seen[kTileRows];
    int64_t first = std::numeric_limits<int64_t>::max(), last = 0;
    for (int64_t i = 0; i < unit.count; i++) {
      const int64_t t = members[i], end = step.positions[t] + 1, from = window ? std::max<int64_t>(0, end - window) : 0;
      const int64_t head = t * s.heads + g * group;
      seen[i] = {together ? from : std::max(from, shared), together ? std::min(end, shared) : end, q + head * hd,
                 q_scales + head, so_far + head, attended + head * hd};
      first = std::min(first, seen[i].first), last = std::max(last, seen[i].last);
    }
    if (unit.count * group >= kFewRows) {
      attend_tile(cache, seen, unit.count, group, first, last, attention_room);
    } else {
      for (int64_t i = 0; i < unit.count; i++)
        attend(cache, static_cast<const typename Scores<C>::Query*>(seen[i].queries), seen[i].scales, seen[i].first,
               seen[i].last, attention_room, seen[i].so_far, seen[i].out);
    }
    if (together) return;
    for (int64_t i = 0; i < unit.count; i++)
      for (int64_t j = 0; j < group * hd; j += 16)
        store(seen[i].out + j, load(seen[i].out + j) / all(seen[i].so_far[j / hd].total));
  };
  const auto run = [&](bool together) {
    const double products = plan_units(s, window, step, together) * static_cast<double>(s.heads * hd);
    const AttentionUnit* units = scratch.units.data();
    const int64_t count = static_cast<int64_t>(scratch.units.size());
    order = scratch.order.data();
    threads.run(static_cast<int>(count * groups), products < kShortProducts, [&](int chunk, int) {
      compute(units[chunk % count], chunk / count, together);
    });
  };
  if (step.shared) run(true);
  run(false);
}

// In attention_float32.cpp and those like it.
extern template Attend<float> attend_for<float>(int64_t);
extern template void self_attention<float>(Pool&, const Shape&, const Layer&, const Step&, float*, float*);
extern template void self_attention<half>(Pool&, const Shape&, const Layer&, const Step&, float*, float*);
extern template void self_attention<bf16>(Pool&, const Shape&, const Layer&, const Step&, float*, float*);
extern template void self_attention<int8_t>(Pool&, const Shape&, const Layer&, const Step&, float*, float*);
extern template void self_attention<e4m3>(Pool&, const Shape&, const Layer&, const Step&, float*, float*);

}  // namespace moe_ray
