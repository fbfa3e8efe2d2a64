// One connection of the trunk to a replica: calls go out from tensor memory and replies come into tensor memory. No
// thread: the one that waits also receives. Not thread-safe by itself: hold `using_`.
#pragma once

#include <algorithm>
#include <mutex>
#include <vector>

#include "frames.h"

namespace moe_ray {

enum Outcome : int32_t { kWaiting = 0, kDone = 1, kError = 2, kBroken = 3 };

struct Pending {
  uint64_t id = 0, num_rows = 0, hidden_size = 0, dtype = 0;
  uint8_t* target = nullptr;  // null: forgotten, the reply is dropped when it comes
  Outcome outcome = kWaiting;
  Header reply;
  bool misfit = false, infinite = false;
};

inline bool finite(const uint8_t* bytes, uint64_t size, uint64_t dtype) {
  uint32_t bad = 0;
  if (dtype == kFloat32) {
    const auto* p = reinterpret_cast<const uint32_t*>(bytes);
    for (uint64_t i = 0; i < size / 4; i++) bad |= (p[i] & 0x7f800000u) == 0x7f800000u;
  } else {
    const uint16_t mask = dtype == kBFloat16 ? 0x7f80 : 0x7c00;
    const auto* p = reinterpret_cast<const uint16_t*>(bytes);
    for (uint64_t i = 0; i < size / 2; i++) bad |= (p[i] & mask) == mask;
  }
  return !bad;
}

class Link {
 public:
  explicit Link(int fd) : fd(fd) {}

  void send(uint64_t id, uint64_t layer, uint64_t expert, uint64_t rows, uint64_t hidden, uint64_t dtype,
            const void* data, const void* weights, uint8_t* target, uint32_t runs, const uint64_t* adapter_ids,
            const uint64_t* adapter_rows) {
    Pending p;
    p.id = id;
    p.num_rows = rows;
    p.hidden_size = hidden;
    p.dtype = dtype;
    p.target = target;
    pending.push_back(p);
    if (broken()) {
      pending.back().outcome = kBroken;
      return;
    }
    Writer w;
    const uint64_t fields[] = {id, layer, expert, rows, hidden, dtype};
    for (int i = 0; i < 6; i++) w.number(i + 1, fields[i]);
    if (runs) {
      w.numbers(9, adapter_ids, runs);
      w.numbers(10, adapter_rows, runs);
    }
    iovec parts[] = {w.done(),
                     {const_cast<void*>(data), rows * hidden * (dtype == kFloat32 ? 4 : 2)},
                     {const_cast<void*>(weights), rows * 4}};
    guarded([&] {
      send_all(fd, parts, 3, [&] {
        pollfd p{fd, POLLIN | POLLOUT, 0};
        const int count = ::poll(&p, 1, kStallMs);
        if (count == 0) throw Closed("the peer took nothing for 30 s");
        // The replica may itself wait for us to take a reply before it reads on.
        if (count > 0 && (p.revents & POLLIN)) pump();
      });
    });
  }

  // Takes in what has arrived.
  void receive_ready() {
    if (!broken()) guarded([&] { pump(); });
  }

  Pending* find(uint64_t id) {
    for (auto& p : pending)
      if (p.id == id) return &p;
    return nullptr;
  }

  void drop(uint64_t id) {
    for (size_t i = 0; i < pending.size(); i++)
      if (pending[i].id == id) {
        if (pending[i].outcome == kWaiting && !broken()) {
          pending[i].target = nullptr;
          if (body_ == id) body_target_ = nullptr;
        } else {
          pending.erase(pending.begin() + i);
        }
        return;
      }
  }

  // Forgets a call and tells the replica, if that takes no waiting.
  void cancel(uint64_t id) {
    const Pending* p = find(id);
    const bool tell = p && p->outcome == kWaiting;
    drop(id);
    if (tell) withdraw(id);
  }

  // Sends something that must be acknowledged, if that takes no waiting: the withdrawal of call 0, which is none.
  void ping() { withdraw(0); }

  void withdraw(uint64_t id) {
    if (broken()) return;
    guarded([&] {
      if (!ready(fd, POLLOUT, 0)) return;
      Writer w;
      w.number(1, id);
      w.number(7, 1);
      iovec part = w.done();
      send_all(fd, &part, 1, [&] {
        if (!ready(fd, POLLOUT, kStallMs)) throw Closed("the peer took nothing for 30 s");
      });
    });
  }

  void fail(const std::string& why) {
    if (broken()) return;
    reason = why;
    ::shutdown(fd, SHUT_RDWR);
    for (auto& p : pending)
      if (p.outcome == kWaiting) p.outcome = kBroken;
  }

  bool broken() const { return !reason.empty(); }

  const int fd;
  std::mutex using_;
  std::string reason;
  std::vector<Pending> pending;

 private:
  template <class Act>
  void guarded(const Act& act) {
    try {
      act();
    } catch (const std::exception& error) {
      fail(error.what());
    }
  }

  void pump() {
    for (;;) {
      if (body_left_) {
        const size_t want = body_target_ ? body_left_ : std::min<size_t>(body_left_, sizeof(stage_));
        size_t got = std::min(want, end_ - start_);
        if (got) {
          if (body_target_) std::memcpy(body_target_, stage_ + start_, got);
          start_ += got;
        } else {
          start_ = end_ = 0;
          got = receive(fd, body_target_ ? body_target_ : stage_, want);
          if (!got) return;
        }
        if (body_target_) body_target_ += got;
        body_left_ -= got;
        if (!body_left_) finish();
        continue;
      }
      uint32_t length = 0;
      const size_t staged = end_ - start_;
      if (staged >= 4) {
        std::memcpy(&length, stage_ + start_, 4);
        if (length > kMaxHeader) throw Malformed("a header of " + std::to_string(length) + " bytes");
        if (staged >= 4 + length) {
          begin(parse(stage_ + start_ + 4, length, true));
          start_ += 4 + length;
          continue;
        }
      }
      if (start_) {
        std::memmove(stage_, stage_ + start_, staged);
        start_ = 0;
        end_ = staged;
      }
      const size_t got = receive(fd, stage_ + end_, std::max<size_t>(4096, 4 + length) - end_);
      if (!got) return;
      end_ += got;
    }
  }

  void begin(const Header& h) {
    Pending* p = find(h.call_id);
    if (!p || p->outcome != kWaiting)
      throw Malformed("the replica answered call " + std::to_string(h.call_id) + ", which is not in flight");
    p->reply = h;
    body_ = h.call_id;
    if (h.status != kOk) return finish();
    body_left_ = h.row_bytes();
    p->misfit = h.num_rows != p->num_rows || h.hidden_size != p->hidden_size || h.dtype != p->dtype;
    body_target_ = p->misfit ? nullptr : p->target;
  }

  void finish() {
    Pending* p = find(body_);
    body_ = 0;
    body_target_ = nullptr;
    if (!p->target) {  // forgotten
      pending.erase(pending.begin() + (p - pending.data()));
      return;
    }
    if (p->reply.status == kOk && !p->misfit)
      p->infinite = !finite(p->target, p->num_rows * p->hidden_size * p->reply.item(), p->dtype);
    p->outcome = p->reply.status != kOk || p->misfit || p->infinite ? kError : kDone;
  }

  uint8_t stage_[kMaxHeader + 8];
  size_t start_ = 0, end_ = 0;
  uint64_t body_ = 0, body_left_ = 0;
  uint8_t* body_target_ = nullptr;
};

}  // namespace moe_ray
