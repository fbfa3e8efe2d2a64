// What the kernels of a layer are told of the model, the layer and the step, and the memory that they compute in.
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
  float clip_qkv;         // queries, keys and values are cut to this magnitude; 0: they are not
  // Routers other than a softmax over all experts.
  int64_t groups, groups_chosen;  // of experts: only those of the best groups are chosen from; 0 or 1: of all
  int32_t group_best_two;         // whether the two best experts of a group rank it, not the best one
  int32_t sigmoid;                // whether scores are sigmoids of logits
  float routed_scale;             // what weights are times; 0: they stay as they are
  // Latent attention (latent.h): kv_heads is 1, head_dim kv_rank + rope_dim. kv_rank 0: none.
  float latent_eps;
  int64_t kv_rank, q_rank;  // of a token's latent, and of its queries'; q_rank 0: queries have none
  int64_t nope, value;      // elements of a head's query that are not rotated, and of its output
  int64_t rope_dim;         // elements of a head that are rotated, its last ones; 0: all

  int64_t kv_parts() const { return kv_rank ? 1 : 2; }  // a latent is key and value
};

struct Layer {
  const float *input_norm, *post_norm;  // [D]
  const void *qkv, *out, *gate;         // matrices: [q + 2 kv, D], [D, q], [E, D]; no gate: the layer has no experts
  void *k_cache, *v_cache;              // [slots, kv_heads, head_dim], as rows or, with scales, int8_t, or e4m3
  float *k_scales, *v_scales;           // [slots, kv_heads] or null
  const float *q_norm, *k_norm;         // [head_dim] or, together, [q] and [kv]; null: none
  const float *qkv_bias, *out_bias;     // [q + 2 kv], [D]; null: none
  int64_t float8;                       // whether the cache holds e4m3
  const float *router_bias, *sinks;     // [E, filled up to a panel], [heads] logits that count in each softmax; null: none
  int64_t full;                         // whether tokens see all positions, whatever the model's window
  const float* correction;              // [E] what is added to scores for choosing; null: nothing
  // Of latent attention, where qkv is [q_rank or heads * (nope + rope_dim), then head_dim; D], out [D, heads * value], and
  // v_cache k_cache: [heads * (nope + rope_dim), q_rank], [heads * kv_rank, nope], [heads * value, kv_rank].
  const void *q_up, *keys, *values;
  const float *q_latent_norm, *kv_latent_norm;  // [q_rank], [kv_rank]
};

inline int64_t window_of(const Shape& s, const Layer& layer) { return layer.full ? 0 : s.window; }  // 0: none

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
  const float* rope;                            // [positions, 2, rope_dim / 2] cos, sin
  const AdapterRun* runs;                       // which LayerAdapter is added for which tokens; none: for no token
  int64_t num_runs;
  const int32_t* leader;  // [S] the first of the sequences that it shares positions with, or itself; null: no sequence does
  const int32_t* shared;  // [S] how many positions from 0 on: whole partitions, of the same blocks
};

struct AttentionUnit {  // tokens that attend together, by their numbers from `from` on in Scratch::order
  int64_t from, count;
};

struct Scratch {  // of the thread that calls; grows to the largest step
  InputRoom inputs;
  std::vector<float> normed, qkv, attended, hidden, logits, weights, latents, by_head;
  std::vector<float> q;  // or narrower
  std::vector<float> q_scales;
  std::vector<int32_t> chosen, order;
  std::vector<Running> so_far;
  std::vector<AttentionUnit> units;
};
inline thread_local Scratch scratch;
inline thread_local AttentionRoom attention_room;

}  // namespace moe_ray
