// Additions of adapters to products x W^T: + (x A^T) B^T for the rows of each adapter (LoRA: Hu et al. 2021,
// arXiv:2106.09685; B holds the scale). The thin products with A are made before, the ones with B where an output is
// stored: rows without an adapter are computed as ever, and the weights are read once for all.
#pragma once

#include "adapter_run.h"
#include "linear.h"

namespace moe_ray {

// What one adapter adds to one block of matrices. What has an A and a B of its own in it is a part: q, k and v, or gate
// and up.
struct Addition {
  const void *a, *b;  // blocks of one kind of floats: [ranks of all parts, K]; [N, rank], as the block that is added to
  int64_t column[3];  // of each part: where its products begin among those with a; -1: nothing is added to it
};

struct LowRankRoom {
  InputRoom inputs;
  std::vector<float> products;
};
inline thread_local LowRankRoom low_rank_room;

// y [rank] times a panel of B: sums over even and odd columns, one after the other.
template <class T>
Lanes times_floats(const T* w, int64_t rank, const float* y) {
  Lanes even = all(0.0f), odd = all(0.0f);
  for (int64_t j = 0; j < rank; j += 2) {
    even = plus_product(load(w + j * kPanel), all(y[j]), even);
    odd = plus_product(load(w + (j + 1) * kPanel), all(y[j + 1]), odd);
  }
  return even + odd;
}
inline Lanes times_pairs(const uint8_t* w, int64_t rank, const float* y) {
  Lanes even = all(0.0f), odd = all(0.0f);
  for (int64_t j = 0; j < rank; j += 2, w += 64) {
    even = plus_product(first_of_pairs(w), all(y[j]), even);
    odd = plus_product(second_of_pairs(w), all(y[j + 1]), odd);
  }
  return even + odd;
}
inline Lanes times_panel(const Matrix& b, int64_t panel, const float* y) {
  const uint8_t* w = b.data + panel * b.panel_bytes();
  switch (b.head->kind) {
    case kFloat32: return times_floats(reinterpret_cast<const float*>(w), b.k(), y);
    case kFloat16: return times_floats(reinterpret_cast<const half*>(w), b.k(), y);
    default: return times_pairs(w, b.k(), y);
  }
}

// The additions to one product of some rows. Valid until the thread makes the next ones.
class Additions {
 public:
  // Multiplies x [rows, ldx] with the A of each run's adapter, of which `of` is the block's addition.
  template <class Adapter, class T>
  Additions(Pool& pool, const AdapterRun* runs, int64_t num_runs, const Addition Adapter::*of, const T* x, int64_t ldx,
            int64_t rows) {
    for (int64_t r = 0, row = 0; r < num_runs; row += runs[r++].count) {
      const auto* adapter = static_cast<const Adapter*>(runs[r].adapter);
      const Addition* addition = adapter ? &(adapter->*of) : nullptr;
      if (addition && addition->a) begin(rows, num_runs), take(*addition, row, runs[r].count);
    }
    if (tasks_.empty()) return;
    products_ = room(low_rank_room.products, rows * ld_);
    const Matrix& any = tasks_[0].a;
    const Inputs in = inputs_for(pool, low_rank_room.inputs, any, x, ldx, rows);
    switch (any.head->kind) {
      case kFloat32: multiply<Floats<float>>(pool, in); break;
      case kFloat16: multiply<Floats<half>>(pool, in); break;
      default: multiply<Pairs>(pool, in);
    }
  }

  Additions(const Additions&) = delete;  // rows point into it

  // x and what is added to row `row` at a panel, which is of a part.
  Lanes to(Lanes x, int64_t row, int64_t panel, int part) const {
    if (of_row_.empty()) return x;
    const Held* held = of_row_[row];
    if (!held || held->column[part] < 0) return x;
    return x + times_panel(held->b, panel, products_ + row * ld_ + held->column[part]);
  }

 private:
  struct Held {
    Matrix b;
    const int64_t* column;
  };
  struct Task {  // some panels of A for the rows of one run
    Matrix a;
    int64_t row, rows, panel;
    int count;
  };

  void begin(int64_t rows, int64_t num_runs) {
    if (!of_row_.empty()) return;
    of_row_.resize(rows, nullptr);
    held_.reserve(num_runs);  // they are pointed to
  }

  void take(const Addition& addition, int64_t row, int64_t rows) {
    held_.push_back({matrix_at(addition.b), addition.column});
    std::fill(of_row_.begin() + row, of_row_.begin() + row + rows, &held_.back());
    const Matrix a = matrix_at(addition.a);
    ld_ = std::max(ld_, a.panels() * kPanel);
    for (int64_t panel = 0; panel < a.panels(); panel += kGroup)
      tasks_.push_back({a, row, rows, panel, static_cast<int>(std::min<int64_t>(kGroup, a.panels() - panel))});
  }

  template <class Of>
  void multiply(Pool& pool, const Inputs& in) {
    int64_t bytes = 0;
    for (const Task& task : tasks_) bytes += task.rows * task.count * task.a.panel_bytes();
    pool.run(static_cast<int>(tasks_.size()), bytes < kAloneBytes, [&](int which, int) {
      const Task& task = tasks_[which];
      Tile out;
      for (int64_t row = task.row, end = task.row + task.rows, some; row < end; row += some) {
        some = std::min<int64_t>(kMostRows, end - row);
        strip_of<Of>(static_cast<int>(some), in, row, task.a, task.panel, task.count, out);
        for (int64_t i = 0; i < some; i++)
          std::memcpy(products_ + (row + i) * ld_ + task.panel * kPanel, out.value[i],
                      task.count * kPanel * sizeof(float));
      }
    });
  }

  std::vector<const Held*> of_row_;  // [rows], or none where nothing is added
  std::vector<Held> held_;
  std::vector<Task> tasks_;
  float* products_ = nullptr;  // [rows, ld]
  int64_t ld_ = 0;
};

}  // namespace moe_ray
