// Runs every kernel on numbers that are the same on every machine, and writes what comes out: test_arm64.py compares the
// outputs of two builds. Checks by itself that a row's result depends neither on the rows beside it nor on threads.

#include <cstdio>

#include "kernels.cpp"

namespace {

uint64_t state = 1;
float uniform() {  // in [-1, 1)
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<float>(static_cast<int64_t>(state >> 40)) / (1 << 23) - 1.0f;
}

std::vector<float> random_floats(int64_t n, float scale) {
  std::vector<float> out(n);
  for (float& x : out) x = uniform() * scale;
  return out;
}

template <class T>
std::vector<T> as(const std::vector<float>& values) {  // sizes: multiples of 16
  std::vector<T> out(values.size());
  for (size_t i = 0; i < values.size(); i += 16) store(out.data() + i, load(values.data() + i));
  return out;
}

struct Block {
  std::vector<uint8_t> memory;
  void* at() { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64); }
};

Block blank(Header head) {
  Block block;
  block.memory.resize(block_bytes(&head) + 64);
  std::memcpy(block.at(), &head, sizeof head);
  return block;
}

Header header(int32_t kind, int32_t group, int64_t n, int64_t k, int64_t count) {
  Header head{};
  head.kind = kind, head.group = group, head.n = n, head.k = k, head.count = count, head.multiplier = 1.0f;
  return head;
}

void add_floats(void* pool, Block& block, int64_t which, int32_t kind, const std::vector<float>& w) {
  if (kind == kFloat32) pack_floats(pool, block.at(), which, w.data());
  else if (kind == kBfloat16) pack_floats(pool, block.at(), which, as<bf16>(w).data());
  else pack_floats(pool, block.at(), which, as<half>(w).data());
}

// Random weights of any kind, rounded where they are codes.
Block weights(void* pool, int32_t kind, int32_t group, bool offsets, bool table, bool order, int64_t n, int64_t k,
              int64_t count, bool wide = false) {
  Header head = header(kind, group, n, k, count);
  head.has_offsets = offsets, head.has_table = table, head.has_order = order, head.wide_inputs = wide;
  float levels[16];
  for (int i = 0; i < 16; i++) {
    levels[i] = static_cast<float>(i * i - 100) / 125;
    head.table[i] = static_cast<int8_t>(static_cast<uint8_t>(i * i - 100 + table_middle()));
  }
  Block block = blank(head);
  const Matrix m = matrix_at(block.at());
  for (int64_t j = 0; order && j < k; j++) m.order[j] = static_cast<int32_t>((j * 37 + 11) % k);
  for (int64_t which = 0; which < count; which++) {
    const std::vector<float> w = random_floats(n * k, 0.1f);
    if (!group) {
      add_floats(pool, block, which, kind, w);
      continue;
    }
    std::vector<uint8_t> codes(n * k);
    std::vector<float> scales(n * k / group), shifts(n * k / group);
    round_codes(pool, kFloat32, w.data(), n, k, kind == kInt4 ? 4 : 8, group, table ? levels : nullptr, codes.data(),
                scales.data(), offsets ? shifts.data() : nullptr);
    pack_codes(pool, block.at(), which, codes.data(), scales.data(), offsets ? shifts.data() : nullptr, group);
  }
  return block;
}

FILE* out;
void write(const std::vector<float>& values) { std::fwrite(values.data(), 4, values.size(), out); }

bool same = true;
void check(const float* a, const float* b, int64_t n, const char* what) {
  if (std::memcmp(a, b, n * 4) == 0) return;
  std::printf("%s depends on company or threads\n", what);
  same = false;
}

void linears(void* one, void* three) {
  struct Kinds {
    int32_t kind, group;
    bool offsets, table, order, wide = false;
  };
  const Kinds kinds[] = {{kFloat32, 0, false, false, false}, {kBfloat16, 0, false, false, false},
                         {kFloat16, 0, false, false, false}, {kInt8, 128, false, false, false},
                         {kInt8, 32, true, false, false},    {kInt4, 32, false, false, false},
                         {kInt4, 64, true, false, true},     {kInt4, 64, false, true, false},
                         {kInt8, 128, false, false, false, true}, {kInt8, 32, true, false, true, true}};
  const int64_t n = 72, k = 256, rows = 13;
  for (const Kinds& how : kinds) {
    Block block = weights(one, how.kind, how.group, how.offsets, how.table, how.order, n, k, 1, how.wide);
    const std::vector<bf16> x = as<bf16>(random_floats(rows * k, 2.0f));
    std::vector<float> all_rows(rows * n), again(rows * n), few(rows * n), back(n * k);
    linear_f32(one, kBfloat16, x.data(), rows, block.at(), all_rows.data());
    linear_f32(three, kBfloat16, x.data(), rows, block.at(), again.data());
    check(all_rows.data(), again.data(), rows * n, "linear");
    for (int64_t count = 1; count < rows; count++) {
      linear_f32(one, kBfloat16, x.data(), count, block.at(), few.data());
      check(all_rows.data(), few.data(), count * n, "linear");
    }
    write(all_rows);
    std::vector<int64_t> ids(n);
    for (int64_t i = 0; i < n; i++) ids[i] = i;
    unpack_rows(block.at(), ids.data(), n, back.data());
    write(back);
  }
}

void experts(void* one, void* three) {
  const int64_t hidden = 64, inner = 96, rows = 7;
  for (int32_t kind : {kFloat32, kBfloat16, kInt8, kInt4}) {
    const int32_t group = kind >= kInt8 ? 32 : 0;
    Block w13 = weights(one, kind, group, false, false, false, inner, hidden, 2);
    Block w2 = weights(one, kind, group, false, false, false, hidden, inner, 1);
    const std::vector<float> x = random_floats(rows * hidden, 2.0f), by = random_floats(rows, 1.0f);
    std::vector<float> got(rows * hidden), again(rows * hidden);
    // What gpt-oss's experts have beside those of other families.
    const std::vector<float> bias13 = random_floats(2 * inner, 0.5f), bias2 = random_floats(hidden, 0.5f);
    const Gating clamped{bias13.data(), bias2.data(), 0.75f, 1.702f};
    const Gating* by_kind = kind == kFloat32 || kind == kInt8 ? &clamped : nullptr;
    expert_ffn(one, kFloat32, x.data(), by.data(), rows, w13.at(), w2.at(), got.data(), nullptr, 0, by_kind);
    expert_ffn(three, kFloat32, x.data(), by.data(), rows, w13.at(), w2.at(), again.data(), nullptr, 0, by_kind);
    check(got.data(), again.data(), rows * hidden, "an expert");
    write(got);
  }
}

// An expert whose rows have an adapter, none, and another one that adds to `down` alone.
void adapted_experts(void* one, void* three) {
  const int64_t hidden = 64, inner = 96, rank = 16, rows = 19;
  for (int32_t kind : {kFloat32, kBfloat16, kFloat16}) {
    const auto floats = [&](int64_t n, int64_t k, int64_t count) {
      return weights(one, kind, 0, false, false, false, n, k, count);
    };
    Block w13 = weights(one, kInt8, 32, false, false, false, inner, hidden, 2), w2 = floats(hidden, inner, 1);
    Block a13 = floats(2 * rank, hidden, 1), b13 = floats(inner, rank, 2);
    Block a2 = floats(rank, inner, 1), b2 = floats(hidden, rank, 1);
    const Addition nothing{nullptr, nullptr, {-1, -1, -1}}, down{a2.at(), b2.at(), {0, -1, -1}};
    const ExpertAdapter first{{a13.at(), b13.at(), {0, rank, -1}}, down}, second{nothing, down};
    const std::vector<AdapterRun> runs = {{1, &first, 14}, {0, nullptr, 2}, {2, &second, 3}};
    const std::vector<float> x = random_floats(rows * hidden, 2.0f), by = random_floats(rows, 1.0f);
    std::vector<float> got(rows * hidden), again(rows * hidden), alone(rows * hidden);
    const auto ffn = [&](void* pool, int64_t from, int64_t count, std::vector<float>& to, const AdapterRun* of,
                         int64_t num_runs) {
      expert_ffn(pool, kFloat32, x.data() + from * hidden, by.data() + from, count, w13.at(), w2.at(),
                 to.data() + from * hidden, of, num_runs, nullptr);
    };
    ffn(one, 0, rows, got, runs.data(), 3);
    ffn(three, 0, rows, again, runs.data(), 3);
    check(got.data(), again.data(), rows * hidden, "an adapted expert");
    for (int64_t i = 0; i < rows; i++) {
      const AdapterRun run{1, i < 14 ? &first : i < 16 ? nullptr : &second, 1};
      ffn(one, i, 1, alone, &run, run.adapter != nullptr);
    }
    check(got.data(), alone.data(), rows * hidden, "an adapted expert");
    write(got);
  }
}

enum class Held { kAsRows, kInt8, kFloat8 };

// `held`: what the cache holds.
template <class T>
void fronts(void* pool, int32_t dtype, Held held) {
  const bool scaled = held == Held::kInt8;
  const int64_t D = 96, hd = 64, tokens = 9, block_size = 4, slots = 16, experts = 5;
  for (int64_t group : {1, 3, 7}) {
    const int64_t kv = 2, heads = kv * group, width = (heads + 2 * kv) * hd;
    Block qkv = weights(pool, dtype, 0, false, false, false, width, D, 1);
    Block back = weights(pool, dtype, 0, false, false, false, D, heads * hd, 1);
    Block gate = weights(pool, dtype, 0, false, false, false, experts, D, 1);
    std::vector<float> norm(D, 1.0f), hidden = random_floats(tokens * D, 1.0f);
    std::vector<T> k_cache(slots * kv * hd), v_cache(slots * kv * hd), rows(tokens * 2 * D);
    const std::vector<float> rope = random_floats(tokens * hd, 1.0f);
    std::vector<int32_t> positions(tokens), where(tokens), sequence(tokens), tables = {2, 0, 1}, row_of(tokens * 2);
    for (int32_t t = 0; t < tokens; t++) positions[t] = t, where[t] = tables[t / block_size] * block_size + t % block_size;
    const int64_t start = 0;
    std::vector<int64_t> counts(experts);
    std::vector<float> by(tokens * 2), logits(tokens * D);
    const Shape shape{D, heads, kv, hd, experts, 2, 1e-5f, 0.125f, group == 3 ? 4 : 0,
                      group == 7 ? 0.5f : 1.0f, group != 7, group == 7, group == 1 ? 0.5f : 0.0f,
                      group == 3 ? 5 : 1, group == 3 ? 3 : 1, false, group == 7, group == 1 ? 0.0f : 1.5f,
                      0.0f, 0, 0, 0, 0, 0};
    // What families other than Mixtral have beside it.
    const bool normed = group > 1, biased = group == 3;
    const std::vector<float> q_norm(heads * hd, 1.25f), k_norm(kv * hd, 0.75f), bias = random_floats(width, 0.5f);
    const std::vector<float> sinks = random_floats(heads, 1.0f);
    std::vector<float> k_scales(slots * kv), v_scales(slots * kv);
    const Layer layer{norm.data(),
                      norm.data(),
                      qkv.at(),
                      back.at(),
                      gate.at(),
                      k_cache.data(),
                      v_cache.data(),
                      scaled ? k_scales.data() : nullptr,
                      scaled ? v_scales.data() : nullptr,
                      normed ? q_norm.data() : nullptr,
                      normed ? k_norm.data() : nullptr,
                      biased ? bias.data() : nullptr,
                      biased ? bias.data() : nullptr,
                      held == Held::kFloat8,
                      group == 7 ? norm.data() : nullptr,
                      group > 1 ? sinks.data() : nullptr,
                      group == 3 && scaled,
                      group == 7 ? bias.data() : nullptr,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};
    const Step step{tokens,        block_size, positions.data(), where.data(), sequence.data(),
                    tables.data(), &start,     rope.data(),      nullptr,      0,
                    nullptr,       nullptr};
    layer_front(pool, dtype, &shape, &layer, &step, hidden.data(), rows.data(), by.data(), counts.data(), row_of.data());
    combine(dtype, hidden.data(), tokens, D, 2, rows.data(), row_of.data());
    write(hidden);
  }
}

// Latent attention, whose heads are more than a kernel is there for, with latents of queries and without; routing by groups
// of sigmoids; and a layer without experts, whose rows are written as they are normalised.
template <class T>
void latents(void* one, void* three, int32_t dtype, Held held) {
  const int64_t D = 96, heads = 18, kv_rank = 64, rope_dim = 32, nope = 32, value = 32, hd = kv_rank + rope_dim;
  const int64_t tokens = 9, block_size = 4, slots = 16, experts = 8, top_k = 3;
  for (int64_t q_rank : {0, 64}) {
    const auto floats = [&](int64_t n, int64_t k) { return weights(one, dtype, 0, false, false, false, n, k, 1); };
    Block down = floats((q_rank ? q_rank : heads * (nope + rope_dim)) + hd, D), up = floats(heads * (nope + rope_dim), 64);
    Block keys = floats(heads * kv_rank, nope), values = floats(heads * value, kv_rank);
    Block back = floats(D, heads * value), gate = floats(experts, D);
    const std::vector<float> norm(D, 1.0f), q_norm(64, 1.25f), kv_norm(kv_rank, 0.75f), start = random_floats(tokens * D, 1.0f);
    const std::vector<float> correction = random_floats(16, 0.2f), rope = random_floats(tokens * rope_dim, 1.0f);
    const std::vector<int32_t> sequence(tokens), tables = {2, 0, 1};
    std::vector<int32_t> positions(tokens), where(tokens), row_of(tokens * top_k);
    for (int32_t t = 0; t < tokens; t++) positions[t] = t, where[t] = tables[t / block_size] * block_size + t % block_size;
    const int64_t table_start = 0;
    std::vector<int64_t> counts(experts);
    std::vector<float> by(tokens * top_k), scales(slots), last;
    std::vector<T> cache(slots * hd), rows(tokens * top_k * D);
    const Shape shape{D,    heads, 1,    hd,    experts, top_k,   1e-5f, 0.125f, 0,    1.0f,  true,
                      false, 0.0f, 4,    2,    true,  true,    2.5f,    1e-6f, kv_rank, q_rank, nope, value, rope_dim};
    // In one step; on three threads; token by token; and in a layer without experts.
    for (int way = 0; way < 4; way++) {
      std::vector<float> hidden = start;
      float* scaled = held == Held::kInt8 ? scales.data() : nullptr;
      const Layer layer{norm.data(),   norm.data(),  down.at(), back.at(),
                        way == 3 ? nullptr : gate.at(),
                        cache.data(),  cache.data(), scaled,    scaled,
                        nullptr,       nullptr,      nullptr,   nullptr,
                        held == Held::kFloat8,       nullptr,     nullptr,
                        0,             correction.data(),
                        up.at(),       keys.at(),    values.at(), q_norm.data(), kv_norm.data()};
      const int64_t each = way == 2 ? 1 : tokens;
      for (int64_t t = 0; t < tokens; t += each) {
        const Step step{each,          block_size, positions.data() + t, where.data() + t, sequence.data(),
                        tables.data(), &table_start, rope.data(),        nullptr,          0,
                        nullptr,       nullptr};
        layer_front(way == 1 ? three : one, dtype, &shape, &layer, &step, hidden.data() + t * D, rows.data(), by.data(),
                    counts.data(), row_of.data());
        if (way < 3) combine(dtype, hidden.data() + t * D, each, D, top_k, rows.data(), row_of.data());
      }
      if (way == 1 || way == 2) check(hidden.data(), last.data(), tokens * D, "latent attention");
      last = hidden;
      write(hidden);
    }
  }
}

// Every code to its float and back, and floats around every step between two of them, exactly and to the bit.
void codes_of_e4m3() {
  alignas(64) e4m3 codes[256], back[16];
  std::vector<float> values(256), near(256 * 16);
  for (int i = 0; i < 256; i++) codes[i].bits = static_cast<uint8_t>(i);
  for (int i = 0; i < 256; i += 16) store(values.data() + i, load(codes + i));
  for (int i = 0; i < 256; i += 16) {
    store(back, load(values.data() + i));
    for (int j = 0; j < 16; j++) {
      const bool nan = ((i + j) & 0x7f) == 0x7f;
      if (nan ? back[j].bits != 0x7f || values[i + j] == values[i + j] : back[j].bits != i + j) same = false;
    }
  }
  for (int i = 0; i < 256; i++)
    if ((i & 0x7f) == 0x7f) values[i] = 0.0f;
  write(values);
  for (int i = 0; i < 256; i++) {
    const float middle = (values[i] + values[i ^ 1]) / 2;
    for (int j = 0; j < 16; j++) near[i * 16 + j] = middle * (1.0f + (j - 8) * 0x1p-23f);
  }
  for (size_t i = 0; i < near.size(); i += 16) {
    store(back, load(near.data() + i));
    for (int j = 0; j < 16; j++) near[i + j] = back[j].bits;
  }
  write(near);
}

}  // namespace

int main(int, char** argv) {
  out = std::fopen(argv[1], "wb");
  void *one = pool_new(1), *three = pool_new(3);
  linears(one, three);
  experts(one, three);
  adapted_experts(one, three);
  fronts<float>(one, kFloat32, Held::kAsRows);
  fronts<bf16>(three, kBfloat16, Held::kAsRows);
  fronts<half>(one, kFloat16, Held::kAsRows);
  fronts<float>(one, kFloat32, Held::kInt8);
  fronts<bf16>(three, kBfloat16, Held::kInt8);
  fronts<float>(one, kFloat32, Held::kFloat8);
  fronts<bf16>(three, kBfloat16, Held::kFloat8);
  latents<float>(one, three, kFloat32, Held::kAsRows);
  latents<bf16>(one, three, kBfloat16, Held::kAsRows);
  latents<float>(one, three, kFloat32, Held::kInt8);
  latents<bf16>(one, three, kBfloat16, Held::kFloat8);
  codes_of_e4m3();
  pool_free(one);
  pool_free(three);
  std::fclose(out);
  return same ? 0 : 1;
}
