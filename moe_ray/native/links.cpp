// The trunk's end of the socket carrier: calls go out from tensor memory and replies come into tensor memory, for all
// experts of a layer in one call and without the interpreter. No thread: the one that waits also receives.

#include <algorithm>
#include <chrono>
#include <mutex>
#include <vector>

#include "link.h"

using namespace moe_ray;
using Clock = std::chrono::steady_clock;

namespace {

// Waits until every call has an outcome; false if some has none before the deadline.
bool wait_all(int n, Link* const* links, const uint64_t* ids, int64_t timeout_us) {
  const auto deadline = Clock::now() + std::chrono::microseconds(timeout_us);
  std::vector<pollfd> polls(n);
  for (;;) {
    int waiting = 0;
    for (int i = 0; i < n; i++) {
      std::lock_guard<std::mutex> lock(links[i]->using_);
      const Pending* p = links[i]->find(ids[i]);
      if (!p || p->outcome != kWaiting) continue;
      polls[waiting++] = {links[i]->fd, POLLIN, 0};
    }
    if (!waiting) return true;
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (left < 0) return false;
    ::poll(polls.data(), waiting, static_cast<int>(std::min<int64_t>(left + 1, 1000)));
    for (int i = 0; i < n; i++)
      for (int j = 0; j < waiting; j++)
        if (polls[j].fd == links[i]->fd && polls[j].revents) {
          std::lock_guard<std::mutex> lock(links[i]->using_);
          links[i]->receive_ready();
          break;
        }
  }
}

struct Result {  // as Python reads it
  int32_t outcome, status, misfit, infinite;
  uint64_t num_rows, hidden_size, dtype, queued_rows, compute_us, queue_us;
};

}  // namespace

extern "C" {

void* link_new(int fd) { return new Link(fd); }
void link_free(void* link) { delete static_cast<Link*>(link); }

// Ends the link; threads that wait on it wake. From any thread.
void link_fail(void* link, const char* why) {
  auto* l = static_cast<Link*>(link);
  ::shutdown(l->fd, SHUT_RDWR);  // before the lock: a thread that holds it may be waiting
  std::lock_guard<std::mutex> lock(l->using_);
  l->fail(why);
}

// Why the link is broken; 0 bytes while it is not.
int link_reason(void* link, char* out, int size) {
  auto* l = static_cast<Link*>(link);
  std::lock_guard<std::mutex> lock(l->using_);
  const int count = std::min<int>(size, static_cast<int>(l->reason.size()));
  std::memcpy(out, l->reason.data(), count);
  return count;
}

// Calls of one layer to n replicas: call i has counts[i] rows, which follow those of call i - 1 in `rows` [R, D] and
// `weights` [R] float32; its reply goes to the same place in `target` [R, D]. Call i has runs[i] runs of rows
// with one adapter, at most kMaxRuns, which follow those of call i - 1 in `adapter_ids` and `adapter_rows`; `runs` null:
// no call has any.
void scatter(int n, void* const* links, const uint64_t* ids, uint64_t layer, const uint64_t* experts,
             const uint64_t* counts, uint64_t hidden, uint64_t dtype, const uint8_t* rows, const float* weights,
             uint8_t* target, const uint32_t* runs, const uint64_t* adapter_ids, const uint64_t* adapter_rows) {
  uint64_t at = 0;
  for (int i = 0; i < n; i++) {
    auto* l = static_cast<Link*>(links[i]);
    const uint64_t offset = at * hidden * (dtype == kFloat32 ? 4 : 2);
    std::lock_guard<std::mutex> lock(l->using_);
    l->send(ids[i], layer, experts[i], counts[i], hidden, dtype, rows + offset, weights + at, target + offset,
            runs ? runs[i] : 0, adapter_ids, adapter_rows);
    at += counts[i];
    if (runs) adapter_ids += runs[i], adapter_rows += runs[i];
  }
}

// Waits for the replies of n calls, `timeout_us` at most, and says what became of each.
void gather(int n, void* const* links, const uint64_t* ids, int64_t timeout_us, Result* results) {
  wait_all(n, reinterpret_cast<Link* const*>(links), ids, timeout_us);
  for (int i = 0; i < n; i++) {
    auto* l = static_cast<Link*>(links[i]);
    std::lock_guard<std::mutex> lock(l->using_);
    Result r{};
    const Pending* p = l->find(ids[i]);
    r.outcome = p ? p->outcome : kBroken;
    if (p) {
      const Header& h = p->reply;
      r = {p->outcome, static_cast<int32_t>(h.status), p->misfit, p->infinite, h.num_rows, h.hidden_size, h.dtype,
           h.queued_rows, h.compute_us, h.queue_us};
      if (p->outcome == kDone) l->drop(ids[i]);
    }
    results[i] = r;
  }
}

// The error text of a call whose reply was an error.
int call_error(void* link, uint64_t id, char* out, int size) {
  auto* l = static_cast<Link*>(link);
  std::lock_guard<std::mutex> lock(l->using_);
  const Pending* p = l->find(id);
  if (!p) return 0;
  const int count = std::min<int>(size, static_cast<int>(p->reply.error.size()));
  std::memcpy(out, p->reply.error.data(), count);
  return count;
}

// Forgets a call: its memory is not written to from now on.
void call_forget(void* link, uint64_t id) {
  auto* l = static_cast<Link*>(link);
  std::lock_guard<std::mutex> lock(l->using_);
  l->drop(id);
}

// Sends something that must be acknowledged, if that takes no waiting.
void link_ping(void* link) {
  auto* l = static_cast<Link*>(link);
  std::lock_guard<std::mutex> lock(l->using_);
  l->ping();
}

// As call_forget, and lets the replica skip it.
void call_cancel(void* link, uint64_t id) {
  auto* l = static_cast<Link*>(link);
  std::lock_guard<std::mutex> lock(l->using_);
  l->cancel(id);
}

}  // extern "C"
