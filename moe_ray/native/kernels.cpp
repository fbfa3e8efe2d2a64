// The kernels of trunk and experts behind a C interface (see kernels.py), compiled once for each instruction set.
// Pointers are to contiguous memory that the caller keeps alive; sizes are in elements; nothing here allocates what
// outlives a call, except pools. `dtype` is that of rows and KV cache, as the wire numbers it (Kind); a matrix is a block of
// matrix.h.

#include "adapter_run.h"
#include "bare.h"
#include "gating.h"
#include "rounding.h"
#include "trunk.h"

using namespace moe_ray;

namespace {

// The threads, for as long as nobody else may use them: weights are packed while others compute.
struct Threads {
  explicit Threads(void* pool) : pool(*static_cast<Pool*>(pool)), lock(this->pool.using_) {}
  Pool& pool;
  std::lock_guard<std::mutex> lock;
};

// Calls work with a null pointer of the rows' type.
template <class Work>
void with_dtype(int32_t dtype, const Work& work) {
  switch (dtype) {
    case kBfloat16: return work(static_cast<bf16*>(nullptr));
    case kFloat16: return work(static_cast<half*>(nullptr));
    default: return work(static_cast<float*>(nullptr));
  }
}

struct ExpertAdapter {  // what one adapter adds to an expert: to gate and up, two parts of one block, and to down
  Addition w13, w2;
};

// out [rows, D] = (silu(x w1^T) * (x w3^T)) w2^T * weights, or what `gating` says, with w1 and w3 in alternate panels (w13),
// and the additions of each run's ExpertAdapter to w1, w3 and w2.
template <class T>
void ffn(Pool& threads, const T* x, const float* weights, int64_t rows, const Matrix& w13, const Matrix& w2, T* out,
         const AdapterRun* runs, int64_t num_runs, const Gating& gating) {
  const int64_t hidden = w13.k(), inner = w2.k();
  const Additions to_w13(threads, runs, num_runs, &ExpertAdapter::w13, x, hidden, rows);
  const Inputs in = inputs_for(threads, scratch.inputs, w13, x, hidden, rows);
  const auto second = [&](auto* h) {
    linear(threads, in, rows, w13, [&](int64_t i, int64_t p, const float* values) {
      if (p % 2) return;
      const Lanes gate = to_w13.to(load(values), i, p, 0), up = to_w13.to(load(values + kPanel), i, p + 1, 1);
      store(h + i * inner + p / 2 * kPanel, gated(gating, gate, up, p));
    });
    const Additions to_w2(threads, runs, num_runs, &ExpertAdapter::w2, h, inner, rows);
    const Inputs products = inputs_for(threads, scratch.inputs, w2, h, inner, rows);
    linear(threads, products, rows, w2, [&](int64_t i, int64_t p, const float* values) {
      Lanes made = to_w2.to(load(values), i, p, 0);
      if (gating.bias2) made = made + load(gating.bias2 + p * kPanel);
      store(out + i * hidden + p * kPanel, made * all(weights[i]));
    });
  };
  float* memory = room(scratch.hidden, rows * inner);
  if (w2.head->kind == kBfloat16) second(reinterpret_cast<Pairs::Input*>(memory));  // as it is multiplied
  else second(memory);
}

}  // namespace

extern "C" {

void* pool_new(int threads) { return new Pool(threads); }
void pool_free(void* pool) { delete static_cast<Pool*>(pool); }

// Bytes of the block that begins with this header.
int64_t block_bytes(const void* header) { return matrix_bytes(matrix_at(header)); }
// What a table's values are stored as more than they are.
int32_t table_middle() { return Nibbles<true>::kTableMiddle; }

// Rounds w [n, k] of a dtype to codes [n, k] with scales, and offsets unless null, [n, k / group]; levels: 16 or null.
void round_codes(void* pool, int32_t dtype, const void* w, int64_t n, int64_t k, int32_t bits, int64_t group,
                 const float* levels, uint8_t* codes, float* scales, float* offsets) {
  const Threads threads(pool);
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    round_rows(threads.pool, static_cast<const T*>(w), n, k, {bits, group, offsets != nullptr, levels}, codes,
               scales, offsets);
  });
}

// Packs matrix `which` of the block at `memory`, whose header is written.
void pack_floats(void* pool, void* memory, int64_t which, const void* w) {
  const Threads threads(pool);
  moe_ray::pack_floats(threads.pool, matrix_at(memory), which, static_cast<const uint8_t*>(w));
}
void pack_codes(void* pool, void* memory, int64_t which, const uint8_t* codes, const float* scales, const float* offsets,
                int64_t group) {
  const Threads threads(pool);
  moe_ray::pack_codes(threads.pool, matrix_at(memory), which, codes, scales, offsets, group);
}

// Rows `ids` of a block's first matrix [n, k], as float32 [count, k].
void unpack_rows(const void* memory, const int64_t* ids, int64_t count, float* out) {
  moe_ray::unpack_rows(matrix_at(memory), ids, count, out);
}

// out [rows, n] = x [rows, k] w^T, float32.
void linear_f32(void* pool, int32_t dtype, const void* x, int64_t rows, const void* memory, float* out) {
  const Threads threads(pool);
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    linear_into(threads.pool, static_cast<const T*>(x), rows, matrix_at(memory), out);
  });
}

// Multiplications with weights as those of the block at `memory` are multiplied, `times` for each of many sums, without any
// memory. Returns how many.
int64_t bare_loop(void* pool, const void* memory, int64_t times) {
  Pool& threads = *static_cast<Pool*>(pool);
  const Header& head = *matrix_at(memory).head;
  switch (head.kind) {
    case kFloat32: return bare<Floats<float>>(threads, times);
    case kFloat16: return bare<Floats<half>>(threads, times);
    case kBfloat16: return bare<Pairs>(threads, times);
    case kInt8: return head.wide_inputs ? bare<WideBytes>(threads, times) : bare<Bytes>(threads, times);
    default: return head.has_table ? bare<Nibbles<true>>(threads, times) : bare<Nibbles<false>>(threads, times);
  }
}

// gating: null where it is plain SwiGLU without biases.
void expert_ffn(void* pool, int32_t dtype, const void* x, const float* weights, int64_t rows, const void* w13,
                const void* w2, void* out, const AdapterRun* runs, int64_t num_runs, const Gating* gating) {
  const Threads threads(pool);  // several carriers may serve one expert
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    ffn(threads.pool, static_cast<const T*>(x), weights, rows, matrix_at(w13), matrix_at(w2), static_cast<T*>(out),
        runs, num_runs, gating ? *gating : Gating{});
  });
}

struct Expert {  // what `expert_forward` is given as its handle
  void* pool;
  const void *w13, *w2;
  int64_t dtype;
  const Gating* gating;
};

// `Forward` of calls.h over packed weights: what a host calls.
int32_t expert_forward(void* handle, const void* rows, const float* weights, int64_t count, int64_t row_bytes, void* out,
                       const AdapterRun* runs, int64_t num_runs, char* why) {
  const auto& e = *static_cast<const Expert*>(handle);
  if (row_bytes != matrix_at(e.w13).k() * (e.dtype == kFloat32 ? 4 : 2)) {
    std::strcpy(why, "rows of another width than the weights'");
    return 0;
  }
  try {
    expert_ffn(e.pool, static_cast<int32_t>(e.dtype), rows, weights, count, e.w13, e.w2, out, runs, num_runs,
               e.gating);
  } catch (const std::bad_alloc&) {
    std::strcpy(why, "out of memory");
    return 0;
  }
  return 1;
}

// Whether layer_front has a kernel for this shape.
int layer_supported(int64_t heads, int64_t kv_heads, int64_t head_dim) {
  return head_dim % 32 == 0 && head_dim <= kWidestHead && attend_for<float>(heads / kv_heads) != nullptr;
}

// One layer up to its experts: hidden [T, D] float32 gains its self-attention; its normalised rows are routed.
// Writes rows [T * K, D] in expert order (tokens ascending within an expert), their weights [T * K], how many rows each
// expert has [E], and where each token's k-th row went: row_of [T, K], experts ascending.
void layer_front(void* pool, int32_t dtype, const Shape* shape, const Layer* layer, const Step* step, float* hidden,
                 void* rows, float* row_weights, int64_t* counts, int32_t* row_of) {
  const Threads threads(pool);
  with_dtype(dtype, [&](auto* type) {
    moe_ray::layer_front(threads.pool, *shape, *layer, *step, hidden, static_cast<decltype(type)>(rows),
                         row_weights, counts, row_of);
  });
}

void combine(int32_t dtype, float* hidden, int64_t tokens, int64_t width, int64_t top_k, const void* rows,
             const int32_t* row_of) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    moe_ray::combine(hidden, tokens, width, top_k, static_cast<const T*>(rows), row_of);
  });
}

// Logits [count, vocab] float32 of rows `which` of hidden, with the additions of each run's HeadAdapter; runs are of the
// rows picked.
void head(void* pool, const float* hidden, int64_t width, const int64_t* which, int64_t count, const float* norm,
          float eps, const void* memory, float* out, const AdapterRun* runs, int64_t num_runs) {
  const Threads threads(pool);
  float* normed = room(scratch.normed, count * width);
  for (int64_t i = 0; i < count; i++) rms_norm(hidden + which[i] * width, norm, width, eps, normed + i * width);
  const Additions to_head(threads.pool, runs, num_runs, &HeadAdapter::head, normed, width, count);
  linear_into(threads.pool, normed, count, matrix_at(memory), out, &to_head);
}

}  // extern "C"
