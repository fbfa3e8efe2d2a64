// The bfloat16 kernels of trunk and experts for CPUs with AVX512-BF16, behind a C interface (see kernels.py).
// Pointers are to contiguous memory that the caller keeps alive; sizes are in elements; nothing here allocates what
// outlives a call, except pools.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "pool.h"
#include "simd.h"

using namespace moe_ray;

namespace {

// Dims that a layer's kernels need. All of hidden, inner sizes: multiples of 32.
struct Shape {
  int64_t hidden, heads, kv_heads, head_dim, experts, top_k;
  float eps, scale;
  int64_t window;  // 0: none
};

struct Layer {  // packed: qkv [q + 2 kv, D], out [D, q], gate [E, D]
  const bf16 *input_norm, *qkv, *out, *post_norm, *gate;
  bf16 *k_cache, *v_cache;  // [slots, kv_heads, head_dim]
};

struct Step {  // T tokens
  int64_t tokens, block_size;
  const int32_t *positions, *slots, *sequence;  // [T]
  const int32_t* tables;                        // the sequences' block tables, one after the other
  const int64_t* table_start;                   // [S] where each begins
  const float* rope;                            // [positions, 2, head_dim / 2] cos, sin
};

void rms_norm(const float* x, const bf16* weight, int64_t n, float eps, bf16* out) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < n; i += 16)
    narrow(out + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor), widen(weight + i)));
}

// Rotates one head's halves (not interleaved pairs) and narrows it.
void rotate(const float* x, const float* rope, int64_t head_dim, bf16* out) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + half + i);
    const __m512 cos = _mm512_loadu_ps(rope + i), sin = _mm512_loadu_ps(rope + half + i);
    narrow(out + i, _mm512_fnmadd_ps(b, sin, _mm512_mul_ps(a, cos)));
    narrow(out + half + i, _mm512_fmadd_ps(a, sin, _mm512_mul_ps(b, cos)));
  }
}

// Softmax over all experts, the `k` largest in ascending expert order, renormalised to sum 1. Equals: lower number.
void choose(const float* logits, int64_t experts, int64_t k, int32_t* chosen, float* weights) {
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
  for (int64_t j = 0; j < k; j++) weights[j] /= total;
}

struct Scratch {  // of the thread that calls; grows to the largest step
  std::vector<bf16> normed, q, attended, hidden;
  std::vector<float> qkv, logits;
  std::vector<int32_t> chosen;
  std::vector<float> weights;
};
thread_local Scratch scratch;
thread_local std::vector<float> scores;

template <class T>
T* room(std::vector<T>& v, int64_t n) {
  if (static_cast<int64_t>(v.size()) < n) v.resize(n);
  return v.data();
}

int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }

void store_lanes(float* out, const float* values, int64_t left) {
  const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
  _mm512_mask_storeu_ps(out, mask, _mm512_load_ps(values));
}

}  // namespace

extern "C" {

void* pool_new(int threads) { return new Pool(threads); }
void pool_free(void* pool) { delete static_cast<Pool*>(pool); }

// w [n, k] → out [ceil(n / 16), k / 2, 16, 2]; panel p of w becomes panel first + p * every (gate and up alternate).
void pack(const bf16* w, int64_t n, int64_t k, bf16* out, int64_t first, int64_t every) {
  for (int64_t p = 0; p < panels_of(n); p++) {
    bf16* panel = out + (first + p * every) * k * kPanel;
    for (int64_t r = 0; r < kPanel; r++) {
      const int64_t row = p * kPanel + r;
      for (int64_t kk = 0; kk < k; kk += 2) {
        uint32_t pair = 0;
        if (row < n) std::memcpy(&pair, w + row * k + kk, 4);
        std::memcpy(panel + kk * kPanel + r * 2, &pair, 4);
      }
    }
  }
}

// Rows `ids` of a packed matrix [n, k], as float32 [count, k].
void unpack_rows(const bf16* packed, int64_t k, const int64_t* ids, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) {
    const bf16* p = packed + ids[i] / kPanel * k * kPanel + ids[i] % kPanel * 2;
    for (int64_t kk = 0; kk < k; kk += 2) {
      for (int64_t j = 0; j < 2; j++) {
        const uint32_t wide = static_cast<uint32_t>(p[kk * kPanel + j]) << 16;
        std::memcpy(out + i * k + kk + j, &wide, 4);
      }
    }
  }
}

// out [rows, n] = x [rows, k] w^T, float32.
void linear_f32(void* pool, const bf16* x, int64_t rows, const bf16* w, int64_t n, int64_t k, float* out) {
  linear(*static_cast<Pool*>(pool), x, k, rows, w, k, panels_of(n), [&](int64_t i, int64_t p, const float* values) {
    store_lanes(out + i * n + p * kPanel, values, n - p * kPanel);
  });
}

// out [rows, D] = (silu(x w1^T) * (x w3^T)) w2^T * weights, with w1 and w3 packed in alternate panels (w13).
void expert_ffn(void* pool, const bf16* x, const float* weights, int64_t rows, const bf16* w13, const bf16* w2,
                int64_t hidden, int64_t inner, bf16* out) {
  Pool& threads = *static_cast<Pool*>(pool);
  std::lock_guard<std::mutex> lock(threads.using_);  // several carriers may serve one expert
  bf16* h = room(scratch.hidden, rows * inner);
  linear(threads, x, hidden, rows, w13, hidden, 2 * (inner / kPanel), [&](int64_t i, int64_t p, const float* values) {
    if (p % 2) return;
    const __m512 gate = _mm512_load_ps(values), up = _mm512_load_ps(values + kPanel);
    narrow(h + i * inner + p / 2 * kPanel, _mm512_mul_ps(silu512(gate), up));
  });
  linear(threads, h, inner, rows, w2, inner, hidden / kPanel, [&](int64_t i, int64_t p, const float* values) {
    narrow(out + i * hidden + p * kPanel, _mm512_mul_ps(_mm512_load_ps(values), _mm512_set1_ps(weights[i])));
  });
}

struct Expert {  // what `expert_forward` is given as its handle
  void* pool;
  const bf16 *w13, *w2;
  int64_t hidden, inner;
};

// `Forward` of calls.h over packed weights: what a host calls.
int32_t expert_forward(void* handle, const void* rows, const float* weights, int64_t count, int64_t row_bytes, void* out,
                       char* why) {
  const auto& e = *static_cast<const Expert*>(handle);
  if (row_bytes != e.hidden * static_cast<int64_t>(sizeof(bf16))) {
    std::strcpy(why, "rows of another width than the weights'");
    return 0;
  }
  try {
    expert_ffn(e.pool, static_cast<const bf16*>(rows), weights, count, e.w13, e.w2, e.hidden, e.inner,
               static_cast<bf16*>(out));
  } catch (const std::bad_alloc&) {
    std::strcpy(why, "out of memory");
    return 0;
  }
  return 1;
}

// Whether layer_front has a kernel for this shape.
int layer_supported(int64_t heads, int64_t kv_heads, int64_t head_dim) {
  return attend_for(static_cast<int>(heads / kv_heads), static_cast<int>(head_dim)) != nullptr;
}

// One layer up to its experts: hidden [T, D] float32 gains its self-attention; its normalised rows are routed.
// Writes rows [T * K, D] in expert order (tokens ascending within an expert), their weights [T * K], how many rows each
// expert has [E], and where each token's k-th row went: row_of [T, K], experts ascending.
void layer_front(void* pool, const Shape* shape, const Layer* layer, const Step* step, float* hidden, bf16* rows,
                 float* row_weights, int64_t* counts, int32_t* row_of) {
  Pool& threads = *static_cast<Pool*>(pool);
  const Shape& s = *shape;
  const int64_t T = step->tokens, D = s.hidden, hd = s.head_dim;
  const int64_t width = (s.heads + 2 * s.kv_heads) * hd, q_width = s.heads * hd;
  bf16* normed = room(scratch.normed, T * D);
  float* qkv = room(scratch.qkv, T * width);
  bf16* q = room(scratch.q, T * q_width);
  bf16* attended = room(scratch.attended, T * q_width);

  const int64_t batch = 8;  // tokens per chunk of work
  const int chunks = static_cast<int>((T + batch - 1) / batch);
  const bool few = T <= 16;
  threads.run(chunks, few, [&](int chunk, int) {
    for (int64_t t = chunk * batch; t < std::min(T, (chunk + 1) * batch); t++)
      rms_norm(hidden + t * D, layer->input_norm, D, s.eps, normed + t * D);
  });
  linear(threads, normed, D, T, layer->qkv, D, panels_of(width), [&](int64_t i, int64_t p, const float* values) {
    store_lanes(qkv + i * width + p * kPanel, values, width - p * kPanel);
  });
  threads.run(chunks, few, [&](int chunk, int) {
    for (int64_t t = chunk * batch; t < std::min(T, (chunk + 1) * batch); t++) {
      const float* x = qkv + t * width;
      const float* rope = step->rope + static_cast<int64_t>(step->positions[t]) * hd;
      const int64_t slot = static_cast<int64_t>(step->slots[t]) * s.kv_heads * hd;
      for (int64_t h = 0; h < s.heads; h++) rotate(x + h * hd, rope, hd, q + t * q_width + h * hd);
      for (int64_t h = 0; h < s.kv_heads; h++) rotate(x + (s.heads + h) * hd, rope, hd, layer->k_cache + slot + h * hd);
      const float* v = x + (s.heads + s.kv_heads) * hd;
      for (int64_t i = 0; i < s.kv_heads * hd; i += 16) narrow(layer->v_cache + slot + i, _mm512_loadu_ps(v + i));
    }
  });
  const int group = static_cast<int>(s.heads / s.kv_heads);
  const Attend attend = attend_for(group, static_cast<int>(hd));
  const int64_t each = few ? 1 : 4;
  const int64_t units = T * s.kv_heads;
  threads.run(static_cast<int>((units + each - 1) / each), units <= 4, [&](int chunk, int) {
    for (int64_t u = chunk * each; u < std::min(units, (chunk + 1) * each); u++) {
      const int64_t t = u / s.kv_heads, h = u % s.kv_heads;
      const int64_t last = step->positions[t] + 1;
      const PagedCache cache{layer->k_cache + h * hd, layer->v_cache + h * hd,
                             step->tables + step->table_start[step->sequence[t]], step->block_size, s.kv_heads * hd};
      const int64_t at = t * q_width + h * group * hd;
      attend(cache, q + at, s.window ? std::max<int64_t>(0, last - s.window) : 0, last, s.scale, scores, attended + at);
    }
  });
  linear(threads, attended, q_width, T, layer->out, q_width, panels_of(D), [&](int64_t i, int64_t p, const float* values) {
    float* at = hidden + i * D + p * kPanel;
    _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), _mm512_load_ps(values)));
  });

  float* logits = room(scratch.logits, T * panels_of(s.experts) * kPanel);
  int32_t* chosen = room(scratch.chosen, T * s.top_k);
  float* weights = room(scratch.weights, T * s.top_k);
  const int64_t padded = panels_of(s.experts) * kPanel;
  threads.run(chunks, few, [&](int chunk, int) {
    const int64_t from = chunk * batch, to = std::min(T, from + batch);
    for (int64_t t = from; t < to; t++) rms_norm(hidden + t * D, layer->post_norm, D, s.eps, normed + t * D);
    for (int64_t p = 0; p < panels_of(s.experts); p++) {
      Tile out;
      tile_of<1>(static_cast<int>(to - from), normed + from * D, D, layer->gate + p * D * kPanel, D, out);
      for (int64_t t = from; t < to; t++)
        std::memcpy(logits + t * padded + p * kPanel, out.value[t - from], kPanel * sizeof(float));
    }
    for (int64_t t = from; t < to; t++)
      choose(logits + t * padded, s.experts, s.top_k, chosen + t * s.top_k, weights + t * s.top_k);
  });
  std::fill(counts, counts + s.experts, 0);
  for (int64_t i = 0; i < T * s.top_k; i++) counts[chosen[i]]++;
  std::vector<int64_t> next(s.experts, 0);
  for (int64_t e = 1; e < s.experts; e++) next[e] = next[e - 1] + counts[e - 1];
  for (int64_t i = 0; i < T * s.top_k; i++) {
    const int64_t row = next[chosen[i]]++;
    std::memcpy(rows + row * D, normed + i / s.top_k * D, D * sizeof(bf16));
    row_weights[row] = weights[i];
    row_of[i] = static_cast<int32_t>(row);
  }
}

// hidden [T, D] += each token's rows of [T * K, D], those that row_of [T, K] names, in that order.
void combine(float* hidden, int64_t tokens, int64_t width, int64_t top_k, const bf16* rows, const int32_t* row_of) {
  for (int64_t t = 0; t < tokens; t++) {
    float* h = hidden + t * width;
    for (int64_t i = 0; i < width; i += 16) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t j = 0; j < top_k; j++) sum = _mm512_add_ps(sum, widen(rows + row_of[t * top_k + j] * width + i));
      _mm512_storeu_ps(h + i, _mm512_add_ps(_mm512_loadu_ps(h + i), sum));
    }
  }
}

// Logits [count, vocab] float32 of rows `which` of hidden.
void head(void* pool, const float* hidden, int64_t width, const int64_t* which, int64_t count, const bf16* norm,
          float eps, const bf16* packed, int64_t vocab, float* out) {
  bf16* normed = room(scratch.normed, count * width);
  for (int64_t i = 0; i < count; i++) rms_norm(hidden + which[i] * width, norm, width, eps, normed + i * width);
  linear_f32(pool, normed, count, packed, vocab, width, out);
}

}  // extern "C"
