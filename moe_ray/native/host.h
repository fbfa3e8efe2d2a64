// The replica's end of the socket carrier: reads calls from one connection, computes them, answers, without the
// interpreter. Calls of the same layer that wait together (from several trunks) are computed as one batch.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "frames.h"
#include "simd.h"

namespace moe_ray {

constexpr size_t kFewCores = 4;  // from more on there is a free core for every thread that wakes

constexpr int64_t kShortCall = 16;  // rows up to which a call is bound by reading weights

struct HostStats {
  uint64_t calls, batches, rows, queued_rows, busy_ns, queue_ns, cancelled;
};

struct KeyStats {
  uint64_t layer, expert, calls, rows, busy_ns, queue_ns;
};

class Host {
 public:
  // ffn(w13, w2, rows, weights, count, out)
  using Ffn = void (*)(void* pool, const bf16* x, const float* weights, int64_t rows, const bf16* w13, const bf16* w2,
                       int64_t hidden, int64_t inner, bf16* out);

  // hidden 0: rows of any width.
  Host(void* pool, Ffn ffn, int64_t hidden, int64_t inner, int64_t most)
      : pool_(pool), ffn_(ffn), hidden_(hidden), inner_(inner), most_(most) {}

  // Each key once, while calls for others are served; what was added stays where it is.
  void add(uint64_t layer, uint64_t expert, const bf16* w13, const bf16* w2) {
    std::lock_guard<std::mutex> lock(state_);
    held_.emplace(Key{layer, expert}, Held{w13, w2, {layer, expert, 0, 0, 0, 0}});
  }

  // Answers calls until the connection ends.
  //
  // On a machine of few cores, as many threads as cores wait for the next call, each bound to its own core, and the one
  // whose core is free first takes it. Left to the scheduler, two experts that are called one right after the other
  // often queue on one core while the other idles, and every layer of a single stream takes twice as long.
  void serve(int fd) {
    Connection connection{fd};
    const std::vector<int> cores = cores_of_this_process();
    if (cores.size() > kFewCores) {
      answer(connection, -1);
      return;
    }
    std::vector<std::thread> others;
    for (size_t i = 1; i < cores.size(); i++) others.emplace_back([&, i] { answer(connection, cores[i]); });
    answer(connection, cores[0]);
    for (auto& other : others) other.join();
  }

  HostStats stats() {
    std::lock_guard<std::mutex> lock(state_);
    return stats_;
  }

  // Copies the counters of the first `most` keys; returns how many keys there are.
  size_t key_stats(KeyStats* out, size_t most) {
    std::lock_guard<std::mutex> lock(state_);
    size_t at = 0;
    for (const auto& [key, held] : held_) {
      if (at == most) break;
      out[at++] = held.stats;
    }
    return held_.size();
  }

 private:
  using Key = std::pair<uint64_t, uint64_t>;

  struct Held {
    const bf16 *w13, *w2;
    KeyStats stats;  // under state_
  };

  struct Call {
    Key key;
    std::vector<bf16> rows;
    std::vector<float> weights;
    bf16* out = nullptr;
    int64_t count = 0, hidden = 0;
    uint64_t id = 0, arrived = 0, started = 0, ended = 0, queued = 0;
    bool done = false, cancelled = false;
    std::condition_variable wake;  // of its own thread: it is done, or its turn
  };

  struct Connection {
    explicit Connection(int fd) : fd(fd), stage(4096 + kMaxHeader) {}

    size_t more(uint8_t* target, size_t size) {
      for (;;) {
        if (const size_t got = receive(fd, target, size)) return got;
        if (!ready(fd, POLLIN, kStallMs)) throw Closed("nothing came for 30 s amid a message");
      }
    }
    void stage_up_to(size_t size) {
      if (start) std::memmove(stage.data(), stage.data() + start, end - start), end -= start, start = 0;
      while (end < size) end += more(stage.data() + end, std::max<size_t>(size, 4096) - end);
    }
    void read_into(void* target, size_t size) {
      auto* to = static_cast<uint8_t*>(target);
      const size_t staged = std::min(size, end - start);
      std::memcpy(to, stage.data() + start, staged);
      start += staged;
      for (size_t at = staged; at < size;) at += more(to + at, size - at);
    }

    const int fd;
    std::mutex reading;  // held from the first byte of a call to the last of its reply
    bool over = false;
    std::atomic<bool> staged{false};  // the next call has begun to come
    std::vector<uint8_t> stage;
    size_t start = 0, end = 0;
    Call call;
    std::vector<bf16> out;
  };

  static std::vector<int> cores_of_this_process() {
    cpu_set_t set;
    std::vector<int> cores;
    if (sched_getaffinity(getpid(), sizeof(set), &set) == 0)
      for (int i = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &set)) cores.push_back(i);
    return cores.empty() ? std::vector<int>{-1} : cores;
  }

  // One thread's share of a connection; `core` -1: any.
  void answer(Connection& c, int core) {
    // A batch thread that wakes does not preempt others: else, on a machine shared with the trunk, the first call that
    // the trunk sends would take its core, and the calls to the other experts would wait for that expert to finish.
    const sched_param normal{};
    sched_setscheduler(0, SCHED_BATCH, &normal);
    cpu_set_t mine, all;
    CPU_ZERO(&mine);
    if (core >= 0) CPU_SET(core, &mine);
    const bool bound = core >= 0 && sched_getaffinity(getpid(), sizeof(all), &all) == 0 && bind(mine);
    for (;;) {
      try {
        if (!c.staged.load(std::memory_order_relaxed)) ready(c.fd, POLLIN, -1);
        std::lock_guard<std::mutex> lock(c.reading);
        if (c.over) return;
        if (c.end == c.start) {
          c.start = c.end = 0;  // before what may throw: the other thread must not find an old call again
          c.end = receive(c.fd, c.stage.data(), 4096);
          if (!c.end) continue;  // another thread took the call
        }
        one(c, [&](int64_t rows, const auto& work) {
          // A long call may be moved to a core that has become free.
          const bool loose = bound && rows > kShortCall && bind(all);
          work();
          if (loose) bind(mine);
        });
        c.staged.store(c.end != c.start, std::memory_order_relaxed);
      } catch (const std::exception&) {
        std::lock_guard<std::mutex> lock(c.reading);
        c.over = true;
        ::shutdown(c.fd, SHUT_RDWR);  // wakes the other threads
        return;
      }
    }
  }

  static bool bind(const cpu_set_t& set) { return sched_setaffinity(0, sizeof(set), &set) == 0; }

  // Reads a call that has begun, computes it by around(rows, work) and replies.
  template <class Around>
  void one(Connection& c, const Around& around) {
    if (c.end - c.start < 4) c.stage_up_to(4);
    uint32_t length;
    std::memcpy(&length, c.stage.data() + c.start, 4);
    if (length > kMaxHeader) throw Malformed("a header of " + std::to_string(length) + " bytes");
    if (c.end - c.start < 4 + length) c.stage_up_to(4 + length);
    const Header h = parse(c.stage.data() + c.start + 4, length, false);
    c.start += 4 + length;
    if (h.cancel) return;  // too late: that call has been answered
    // What does not fit is read, so that the calls behind it are found, and refused.
    const uint64_t bytes = h.row_bytes();
    Call& call = c.call;
    call.rows.resize((bytes + 1) / 2);
    call.weights.resize(h.num_rows);
    c.read_into(call.rows.data(), bytes);
    c.read_into(call.weights.data(), h.num_rows * sizeof(float));
    const std::string why = refusal(h);
    Writer w;
    w.number(1, h.call_id);
    if (!why.empty()) {
      w.number(2, kRefused);
      w.text(3, why);
      iovec part = w.done();
      send_all(c.fd, &part, 1, [&] { ready(c.fd, POLLOUT, -1); });
      return;
    }
    c.out.resize(h.num_rows * h.hidden_size);
    call.id = h.call_id;
    call.key = {h.layer, h.expert};
    call.count = static_cast<int64_t>(h.num_rows);
    call.hidden = static_cast<int64_t>(h.hidden_size);
    call.out = c.out.data();
    around(call.count, [&] { compute(c, call); });
    if (call.cancelled) {
      w.number(2, kCancelled);
      iovec part = w.done();
      send_all(c.fd, &part, 1, [&] { ready(c.fd, POLLOUT, -1); });
      return;
    }
    w.number(4, h.num_rows);
    w.number(5, h.hidden_size);
    w.number(6, h.dtype);
    w.number(7, call.queued);
    w.number(8, (call.ended - call.started) / 1000);
    w.number(9, (call.started - call.arrived) / 1000);
    iovec parts[] = {w.done(), {c.out.data(), bytes}};
    send_all(c.fd, parts, 2, [&] { ready(c.fd, POLLOUT, -1); });
  }

  static uint64_t now() {
    return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  }

  Held* find(const Key& key) {
    std::lock_guard<std::mutex> lock(state_);
    const auto found = held_.find(key);
    return found == held_.end() ? nullptr : &found->second;
  }

  std::string refusal(const Header& h) {
    if (!find({h.layer, h.expert}))
      return "layer " + std::to_string(h.layer) + " expert " + std::to_string(h.expert) +
             " is not held by this replica";
    if (hidden_ && static_cast<int64_t>(h.hidden_size) != hidden_)
      return "rows have " + std::to_string(h.hidden_size) + " columns, expected " + std::to_string(hidden_);
    if (h.dtype != kBFloat16) return "rows are not bfloat16, in which this replica computes";
    return "";
  }

  // Whether nobody waits for a call any more: the frame behind it takes it back, or the trunk is gone.
  static bool taken_back(Connection& c, uint64_t id) {
    if (c.start == c.end) c.start = c.end = 0;
    try {
      if (const size_t room = std::min<size_t>(4096, c.stage.size() - c.end))
        c.end += receive(c.fd, c.stage.data() + c.end, room);
      uint32_t length;
      if (c.end - c.start < sizeof(length)) return false;
      std::memcpy(&length, c.stage.data() + c.start, sizeof(length));
      if (c.end - c.start - sizeof(length) < length) return false;
      const Header next = parse(c.stage.data() + c.start + sizeof(length), length, false);
      return next.cancel && next.call_id == id;
    } catch (const Closed&) {
      return true;
    } catch (const Malformed&) {
      return false;  // whoever reads it as the next call ends the connection
    }
  }

  // Whose call came first computes first, each in its own thread, and those that fit in with it along. So all experts
  // serve the trunks in the same order, and none waits for the last of its experts longer than it must.
  void compute(Connection& c, Call& call) {
    call.done = call.cancelled = false;
    std::unique_lock<std::mutex> lock(state_);
    call.arrived = now();
    waiting_.push_back(&call);
    stats_.queued_rows += call.count;
    call.wake.wait(lock, [&] { return call.done || (!computing_ && waiting_.front() == &call); });
    if (!call.done) {
      computing_ = true;
      lock.unlock();
      try {
        if (taken_back(c, call.id))
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

  void next() {  // under state_
    computing_ = false;
    if (!waiting_.empty()) waiting_.front()->wake.notify_one();
  }

  void leave(Call& call) {  // under state_
    const auto it = std::find(waiting_.begin(), waiting_.end(), &call);
    if (it == waiting_.end()) return;
    waiting_.erase(it);
    stats_.queued_rows -= call.count;
  }

  void withdraw(Call& call) {  // its turn
    std::lock_guard<std::mutex> lock(state_);
    leave(call);
    stats_.cancelled++;
    call.cancelled = true;
  }

  void run(Call& first) {  // its turn
    std::vector<Call*> batch{&first};
    int64_t rows = first.count;
    {
      std::lock_guard<std::mutex> lock(state_);
      for (Call* other : waiting_)
        if (other != &first && other->key == first.key && other->hidden == first.hidden && rows + other->count <= most_)
          batch.push_back(other), rows += other->count;
    }
    Held& held = *find(first.key);
    const int64_t hidden = first.hidden;
    const uint64_t started = now();
    if (batch.size() == 1) {
      ffn_(pool_, first.rows.data(), first.weights.data(), rows, held.w13, held.w2, hidden, inner_, first.out);
    } else {
      std::vector<bf16> x(rows * hidden), out(rows * hidden);
      std::vector<float> factors(rows);
      int64_t at = 0;
      for (const Call* c : batch) {
        std::memcpy(x.data() + at * hidden, c->rows.data(), c->count * hidden * sizeof(bf16));
        std::memcpy(factors.data() + at, c->weights.data(), c->count * sizeof(float));
        at += c->count;
      }
      ffn_(pool_, x.data(), factors.data(), rows, held.w13, held.w2, hidden, inner_, out.data());
      at = 0;
      for (const Call* c : batch) {
        std::memcpy(c->out, out.data() + at * hidden, c->count * hidden * sizeof(bf16));
        at += c->count;
      }
    }
    const uint64_t ended = now();
    std::lock_guard<std::mutex> lock(state_);
    waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(),
                                  [&](Call* c) { return std::count(batch.begin(), batch.end(), c) > 0; }),
                   waiting_.end());
    stats_.batches++;
    stats_.busy_ns += ended - started;
    held.stats.busy_ns += ended - started;
    for (Call* c : batch) {
      c->started = started, c->ended = ended, c->done = true;
      stats_.calls++;
      stats_.rows += c->count;
      stats_.queue_ns += started - c->arrived;
      stats_.queued_rows -= c->count;
      held.stats.calls++;
      held.stats.rows += c->count;
      held.stats.queue_ns += started - c->arrived;
      if (c != &first) c->wake.notify_one();
    }
  }

  void* pool_;
  Ffn ffn_;
  const int64_t hidden_, inner_, most_;
  std::map<Key, Held> held_;  // under state_
  std::mutex state_;
  std::vector<Call*> waiting_;  // in the order in which they came
  bool computing_ = false;
  HostStats stats_{};
};

}  // namespace moe_ray
