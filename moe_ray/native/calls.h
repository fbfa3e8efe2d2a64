// Calls that wait for their turn in a replica, and the batches that are made of them. One batch computes at a time, each
// in the thread of its first call; calls of the same network that wait with it are computed along with it.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "adapter_run.h"
#include "memory.h"

namespace moe_ray {

constexpr size_t kWhy = 512;  // bytes of the text that says why a computation failed, its end included

// Computes `count` rows of `row_bytes` each into `out`, each times its weight; `runs` say which adapter is added for which
// rows and sum to `count`; none: no row has one. Returns 1; 0 if it could not, with the reason in `why` (kWhy bytes,
// zero-terminated). `handle` is what was given with the function.
using Forward = int32_t (*)(void* handle, const void* rows, const float* weights, int64_t count, int64_t row_bytes,
                            void* out, const AdapterRun* runs, int64_t num_runs, char* why);

struct HostStats {
  uint64_t calls, batches, rows, queued_rows, busy_ns, queue_ns, cancelled;
};

struct KeyStats {
  uint64_t layer, expert, calls, rows, busy_ns, queue_ns;
};

struct HeldAdapter {
  const void* handle;
  int64_t users;  // calls that name it and have not been answered
};

struct Network {  // of one (layer, expert)
  Forward forward;
  void* handle;
  KeyStats stats;                                               // this and the next: under the mutex of the queue
  std::map<uint64_t, std::unique_ptr<HeldAdapter>> adapters{};  // by id
};

struct Call {
  Network* network = nullptr;
  Memory rows, weights, out;
  std::vector<AdapterRun> runs;    // none: no row has an adapter
  std::vector<HeldAdapter*> uses;  // until it is answered
  int64_t count = 0, row_bytes = 0;
  uint64_t id = 0, arrived = 0, started = 0, ended = 0, queued = 0;
  bool done = false, cancelled = false, failed = false, busy = false;
  char why[kWhy] = "";
  std::condition_variable wake;  // of its own thread: it is done, or its turn
};

class CallQueue {
 public:
  // `most`: rows of a batch; `most_queued`: rows that wait or compute, beyond which further calls are not accepted.
  CallQueue(int64_t most, uint64_t most_queued) : most_(most), most_queued_(most_queued) {}

  // Waits until the call has been computed, with another's batch or in its own turn, which comes in the order of
  // arrival. So all experts serve the trunks in the same order, and none waits for the last of its experts longer than
  // it must. `taken_back()` is asked when its turn comes: if it is true, the call is cancelled.
  template <class TakenBack>
  void compute(Call& call, const TakenBack& taken_back) {
    call.done = call.cancelled = call.failed = false;
    std::unique_lock<std::mutex> lock(state);
    call.busy = stats_.queued_rows && stats_.queued_rows + call.count > most_queued_;
    if (call.busy) return;
    call.arrived = now();
    waiting_.push_back(&call);
    stats_.queued_rows += call.count;
    call.wake.wait(lock, [&] { return call.done || (!computing_ && waiting_.front() == &call); });
    if (!call.done) {
      computing_ = true;
      lock.unlock();
      try {
        if (taken_back())
          withdraw(call);
        else
          run(call);
      } catch (...) {  // no memory
        lock.lock();
        leave(call);
        next();
        throw;
      }
      lock.lock();
      next();
    }
    call.queued = stats_.queued_rows;
  }

  HostStats stats() {
    std::lock_guard<std::mutex> lock(state);
    return stats_;
  }

  // Lets no computation begin any more, in this process, and waits for those that have begun. For a process that exits:
  // a thread that comes into an interpreter which has ended would take the process down with it.
  static void end_all(int timeout_ms) {
    ending().store(true);
    for (; timeout_ms > 0 && computations().load() > 0; timeout_ms--)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

  // Resolves the adapters of a call, which are held until `release`. Returns the id of one that is not held, else 0.
  uint64_t hold(Call& call, const std::vector<uint64_t>& ids, const std::vector<uint64_t>& rows) {
    call.runs.clear();
    call.uses.clear();
    std::lock_guard<std::mutex> lock(state);
    for (size_t i = 0; i < ids.size(); i++) {
      const auto found = call.network->adapters.find(ids[i]);
      if (ids[i] && found == call.network->adapters.end()) return ids[i];
      HeldAdapter* held = ids[i] ? found->second.get() : nullptr;
      call.runs.push_back({ids[i], held ? held->handle : nullptr, static_cast<int64_t>(rows[i])});
      if (held) call.uses.push_back(held);
    }
    for (HeldAdapter* held : call.uses) held->users++;
    return 0;
  }

  void release(Call& call) {
    if (call.uses.empty()) return;
    std::lock_guard<std::mutex> lock(state);
    for (HeldAdapter* held : call.uses) held->users--;
    call.uses.clear();
    released_.notify_all();
  }

  // Lets no call name the adapter any more and waits for those that do.
  void remove(Network& network, uint64_t id) {
    std::unique_lock<std::mutex> lock(state);
    const auto found = network.adapters.find(id);
    if (found == network.adapters.end()) return;
    const std::unique_ptr<HeldAdapter> held = std::move(found->second);
    network.adapters.erase(found);
    released_.wait(lock, [&] { return held->users == 0; });
  }

  std::mutex state;

 private:
  static uint64_t now() {
    return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  }
  static std::atomic<bool>& ending() {
    static std::atomic<bool> value{false};
    return value;
  }
  static std::atomic<int>& computations() {
    static std::atomic<int> value{0};
    return value;
  }

  void next() {  // under state
    computing_ = false;
    if (!waiting_.empty()) waiting_.front()->wake.notify_one();
  }

  void leave(Call& call) {  // under state
    const auto it = std::find(waiting_.begin(), waiting_.end(), &call);
    if (it == waiting_.end()) return;
    waiting_.erase(it);
    stats_.queued_rows -= call.count;
  }

  void withdraw(Call& call) {  // its turn
    std::lock_guard<std::mutex> lock(state);
    leave(call);
    stats_.cancelled++;
    call.cancelled = true;
  }

  static bool forward(const Network& network, const uint8_t* rows, const float* weights, int64_t count,
                      int64_t row_bytes, uint8_t* out, const std::vector<AdapterRun>& runs, char* why) {
    computations().fetch_add(1);
    if (ending().load()) {
      computations().fetch_sub(1);
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
    why[0] = 0;
    const bool computed = network.forward(network.handle, rows, weights, count, row_bytes, out, runs.data(),
                                          static_cast<int64_t>(runs.size()), why) == 1;
    computations().fetch_sub(1);
    return computed;
  }

  void join_runs(const std::vector<Call*>& batch) {
    runs_.clear();
    const bool any = std::any_of(batch.begin(), batch.end(), [](const Call* c) { return !c->runs.empty(); });
    for (const Call* c : batch) {
      if (any && c->runs.empty()) runs_.push_back({0, nullptr, c->count});
      runs_.insert(runs_.end(), c->runs.begin(), c->runs.end());
    }
  }

  void run(Call& first) {  // its turn
    std::vector<Call*> batch{&first};
    int64_t rows = first.count;
    {
      std::lock_guard<std::mutex> lock(state);
      for (Call* other : waiting_) {
        const bool same = other->network == first.network && other->row_bytes == first.row_bytes;
        if (other == &first || !same || rows + other->count > most_) continue;
        batch.push_back(other);
        rows += other->count;
      }
    }
    Network& network = *first.network;
    const int64_t width = first.row_bytes;
    const uint64_t started = now();
    bool computed;
    if (batch.size() == 1) {
      const auto* weights = reinterpret_cast<const float*>(first.weights.data());
      computed = forward(network, first.rows.data(), weights, rows, width, first.out.data(), first.runs, first.why);
    } else {
      uint8_t* x = rows_.room(rows * width);
      uint8_t* factors = weights_.room(rows * sizeof(float));
      uint8_t* out = out_.room(rows * width);
      int64_t at = 0;
      for (Call* c : batch) {
        std::memcpy(x + at * width, c->rows.data(), c->count * width);
        std::memcpy(factors + at * sizeof(float), c->weights.data(), c->count * sizeof(float));
        at += c->count;
      }
      join_runs(batch);
      computed = forward(network, x, reinterpret_cast<const float*>(factors), rows, width, out, runs_, first.why);
      at = 0;
      for (Call* c : batch) {
        if (computed) std::memcpy(c->out.data(), out + at * width, c->count * width);
        if (c != &first) std::memcpy(c->why, first.why, kWhy);
        at += c->count;
      }
    }
    const uint64_t ended = now();
    std::lock_guard<std::mutex> lock(state);
    waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(),
                                  [&](Call* c) { return std::count(batch.begin(), batch.end(), c) > 0; }),
                   waiting_.end());
    stats_.batches++;
    stats_.busy_ns += ended - started;
    network.stats.busy_ns += ended - started;
    for (Call* c : batch) {
      c->started = started;
      c->ended = ended;
      c->failed = !computed;
      c->done = true;
      stats_.calls++;
      stats_.rows += c->count;
      stats_.queue_ns += started - c->arrived;
      stats_.queued_rows -= c->count;
      network.stats.calls++;
      network.stats.rows += c->count;
      network.stats.queue_ns += started - c->arrived;
      if (c != &first) c->wake.notify_one();
    }
  }

  const int64_t most_;           // rows of a batch
  const uint64_t most_queued_;
  std::vector<Call*> waiting_;   // in the order in which they came
  bool computing_ = false;
  HostStats stats_{};
  Memory rows_, weights_, out_;   // this and the next: of the batch that computes
  std::vector<AdapterRun> runs_;
  std::condition_variable released_;  // an adapter has fewer users
};

}  // namespace moe_ray
