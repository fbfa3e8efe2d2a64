// The replica's end of the socket carrier: reads calls from connections, has them computed, answers. It knows rows of one
// width and dtype; what computes them is a function and an opaque handle for each (layer, expert).
#pragma once

#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "calls.h"
#include "connection.h"
#include "cores.h"
#include "frames.h"

namespace moe_ray {

constexpr size_t kFewCores = 4;  // from more on there is a free core for every thread that wakes

constexpr int64_t kShortCall = 16;  // rows up to which a call is bound by reading weights

class Host {
 public:
  // hidden 0: rows of any width; dtype 0: of any dtype. `most`: rows of a batch. `most_queued`: rows that
  // wait or compute, beyond which further calls are answered as busy. `spread`: whether a connection
  // may have a thread on each core; else the thread that calls `serve` alone answers it, from any core.
  Host(int64_t hidden, uint64_t dtype, int64_t most, uint64_t most_queued, bool spread)
      : hidden_(hidden), dtype_(dtype), spread_(spread), queue_(most, most_queued) {}

  // Each key once, while calls for others are served; what was added stays where it is.
  void add(uint64_t layer, uint64_t expert, Forward forward, void* handle) {
    std::lock_guard<std::mutex> lock(queue_.state);
    networks_.emplace(Key{layer, expert}, Network{forward, handle, {layer, expert, 0, 0, 0, 0}});
  }

  // Lets calls for a key name an adapter, by a handle of what computes. The id: not 0. False: the key is not held, or
  // has this adapter already.
  bool add_adapter(uint64_t layer, uint64_t expert, uint64_t id, const void* handle) {
    Network* network = find(layer, expert);
    if (!network) return false;
    std::lock_guard<std::mutex> lock(queue_.state);
    return network->adapters.emplace(id, std::make_unique<HeldAdapter>(HeldAdapter{handle, 0})).second;
  }

  // Refuses calls that name an adapter from now on, and returns when those that came before have been computed.
  void remove_adapter(uint64_t layer, uint64_t expert, uint64_t id) {
    if (Network* network = find(layer, expert)) queue_.remove(*network, id);
  }

  // Answers calls until the connection ends.
  //
  // On a machine of few cores, as many threads as cores wait for the next call, each bound to its own core, and the one
  // whose core is free first takes it. Left to the scheduler, two experts that are called one right after the other
  // often queue on one core while the other idles, and every layer of a single stream takes twice as long.
  void serve(int fd) {
    Connection connection{fd};
    const std::vector<int> cores = cores_of_this_process();
    if (!spread_ || cores.size() > kFewCores) {
      answer(connection, -1);
      return;
    }
    std::vector<std::thread> others;
    for (size_t i = 1; i < cores.size(); i++) others.emplace_back([&, i] { answer(connection, cores[i]); });
    answer(connection, cores[0]);
    for (auto& other : others) other.join();
  }

  HostStats stats() { return queue_.stats(); }

  // Copies the counters of the first `most` keys; returns how many keys there are.
  size_t key_stats(KeyStats* out, size_t most) {
    std::lock_guard<std::mutex> lock(queue_.state);
    size_t at = 0;
    for (const auto& [key, network] : networks_) {
      if (at == most) break;
      out[at++] = network.stats;
    }
    return networks_.size();
  }

 private:
  using Key = std::pair<uint64_t, uint64_t>;

  // One thread's share of a connection.
  void answer(Connection& c, int core) {
    OnCore place(core, spread_);  // alone, it must not wait while another core is idle
    for (;;) {
      try {
        if (!c.staged.load(std::memory_order_relaxed)) ready(c.fd, POLLIN, -1);
        std::lock_guard<std::mutex> lock(c.reading);
        if (c.over) return;
        if (!c.begin()) continue;  // another thread took the call
        one(c, place);
        c.staged.store(c.has_staged(), std::memory_order_relaxed);
      } catch (const std::exception&) {
        std::lock_guard<std::mutex> lock(c.reading);
        c.over = true;
        ::shutdown(c.fd, SHUT_RDWR);  // wakes the other threads
        return;
      }
    }
  }

  // Reads a call that has begun, computes it and replies.
  void one(Connection& c, OnCore& place) {
    const Header h = c.header();
    if (h.cancel) return;  // too late: that call has been answered
    // What does not fit is read, so that the calls behind it are found, and refused.
    const uint64_t bytes = h.row_bytes();
    h.check_runs();
    Call& call = c.call;
    c.read_into(call.rows.room(bytes), bytes);
    c.read_into(call.weights.room(h.num_rows * sizeof(float)), h.num_rows * sizeof(float));
    const std::string why = refusal(h);
    if (!why.empty()) return no_rows(c, h.call_id, kRefused, why);
    call.out.room(bytes);
    call.id = h.call_id;
    call.network = find(h.layer, h.expert);
    if (const uint64_t id = queue_.hold(call, h.adapter_ids, h.adapter_rows))
      return no_rows(c, h.call_id, kNoAdapter, "adapter " + std::to_string(id) + " is not held by this replica");
    call.count = static_cast<int64_t>(h.num_rows);
    call.row_bytes = static_cast<int64_t>(h.hidden_size * h.item());
    {
      const Holding holding{queue_, call};
      place.during(call.count > kShortCall, [&] { queue_.compute(call, [&] { return c.taken_back(call.id); }); });
    }
    if (call.busy) return no_rows(c, h.call_id, kBusy, "as many rows are queued as this replica accepts");
    if (call.cancelled) return no_rows(c, h.call_id, kCancelled, "");
    if (call.failed) return no_rows(c, h.call_id, kFailed, failure(h, call.why));
    Writer w;
    w.number(1, h.call_id);
    w.number(4, h.num_rows);
    w.number(5, h.hidden_size);
    w.number(6, h.dtype);
    w.number(7, call.queued);
    w.number(8, (call.ended - call.started) / 1000);
    w.number(9, (call.started - call.arrived) / 1000);
    iovec parts[] = {w.done(), {call.out.data(), bytes}};
    c.reply(parts, 2);
  }

  static void no_rows(Connection& c, uint64_t id, int status, const std::string& why) {
    Writer w;
    w.number(1, id);
    w.number(2, status);
    if (!why.empty()) w.text(3, why);
    iovec part = w.done();
    c.reply(&part, 1);
  }

  struct Holding {  // a call's adapters
    CallQueue& queue;
    Call& call;
    ~Holding() { queue.release(call); }
  };

  Network* find(uint64_t layer, uint64_t expert) {
    std::lock_guard<std::mutex> lock(queue_.state);
    const auto found = networks_.find({layer, expert});
    return found == networks_.end() ? nullptr : &found->second;
  }

  std::string refusal(const Header& h) {
    if (!find(h.layer, h.expert)) return key_of(h) + " is not held by this replica";
    if (hidden_ && static_cast<int64_t>(h.hidden_size) != hidden_)
      return "rows have " + std::to_string(h.hidden_size) + " columns, expected " + std::to_string(hidden_);
    if (dtype_ && h.dtype != dtype_)
      return std::string("rows are ") + dtype_name(h.dtype) + ", this replica computes in " + dtype_name(dtype_);
    return "";
  }

  static std::string key_of(const Header& h) {
    return "layer " + std::to_string(h.layer) + " expert " + std::to_string(h.expert);
  }
  static std::string failure(const Header& h, const char* why) {
    return key_of(h) + ": " + (why[0] ? why : "computing failed without a reason");
  }

  const int64_t hidden_;
  const uint64_t dtype_;
  const bool spread_;
  CallQueue queue_;
  std::map<Key, Network> networks_;  // under queue_.state
};

}  // namespace moe_ray
