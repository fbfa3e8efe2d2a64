// Which experts a token goes to, and what their outputs are weighed by.
#pragma once

#include "step.h"

namespace moe_ray {

inline thread_local std::vector<float> ranks_room;

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// The `count` largest of values [n] that are not taken yet, one after the other: to(index). Equals: the lower number.
template <class To>
void take_largest(const float* values, int64_t n, int64_t count, int32_t* taken, const To& to) {
  for (int64_t j = 0; j < count; j++) {
    int64_t best = -1;
    for (int64_t e = 0; e < n; e++) {
      bool known = false;
      for (int64_t i = 0; i < j; i++) known |= taken[i] == e;
      if (!known && (best < 0 || values[e] > values[best])) best = e;
    }
    taken[j] = static_cast<int32_t>(best);
    to(best);
  }
}

// Experts outside the best groups get the rank of none. A group's score: its best rank, or the sum of its best two.
inline void keep_best_groups(const Shape& s, float* ranks) {
  const int64_t each = s.experts / s.groups;
  std::vector<float> scores(s.groups);
  std::vector<int32_t> taken(s.groups);
  std::vector<bool> outside(s.groups, true);
  for (int64_t g = 0; g < s.groups; g++) {
    float most = -std::numeric_limits<float>::infinity(), next = most;
    for (int64_t e = g * each; e < (g + 1) * each; e++) {
      next = std::max(next, std::min(most, ranks[e]));
      most = std::max(most, ranks[e]);
    }
    scores[g] = s.group_best_two ? most + next : most;
  }
  take_largest(scores.data(), s.groups, s.groups_chosen, taken.data(), [&](int64_t g) { outside[g] = false; });
  for (int64_t e = 0; e < s.experts; e++)
    if (outside[e / each]) ranks[e] = -std::numeric_limits<float>::infinity();
}

// Scores of all experts are a softmax, or sigmoids; the `k` of the largest scores, with `correction` for this alone, in
// ascending expert order; their scores, renormalised or not.
inline void choose(const Shape& s, const float* correction, const float* logits, int32_t* chosen, float* weights) {
  const int64_t experts = s.experts, k = s.top_k;
  const float* ranks = logits;
  if (s.sigmoid || s.groups > 1) {
    float* own = room(ranks_room, experts);
    for (int64_t e = 0; e < experts; e++) {
      own[e] = s.sigmoid ? sigmoid(logits[e]) : logits[e];
      if (correction) own[e] += correction[e];
    }
    if (s.groups > 1) keep_best_groups(s, own);
    ranks = own;
  }
  take_largest(ranks, experts, k, chosen, [](int64_t) {});
  std::sort(chosen, chosen + k);
  float most = logits[chosen[0]], total = 0.0f;
  for (int64_t j = 1; j < k; j++) most = std::max(most, logits[chosen[j]]);
  for (int64_t j = 0; j < k; j++) {
    const float logit = logits[chosen[j]];
    total += weights[j] = s.sigmoid ? sigmoid(logit) : std::exp(logit - most);
  }
  if (s.sigmoid) {
    total = s.renormalise ? total + 1e-20f : 1.0f;
  } else if (!s.renormalise) {
    total = 0.0f;
    for (int64_t e = 0; e < experts; e++) total += std::exp(logits[e] - most);
  }
  const float scale = (s.routed_scale != 0.0f ? s.routed_scale : 1.0f) * s.residual;
  for (int64_t j = 0; j < k; j++) weights[j] = weights[j] / total * scale;
}

}  // namespace moe_ray
