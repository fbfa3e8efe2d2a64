// What has come of a connection: bytes are staged, so that a header with a small tensor behind it comes in one system
// call; what is left of a large tensor is received straight into its memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "calls.h"
#include "frames.h"

namespace moe_ray {

class Connection {
 public:
  explicit Connection(int fd) : fd(fd), stage_(kStage + kMaxHeader) {}

  // Receives the beginning of a frame; false if nothing has come, or something is staged already: then true.
  bool begin() {
    if (end_ != start_) return true;
    start_ = end_ = 0;  // before what may throw: another thread must not find an old call again
    end_ = receive(fd, stage_.data(), kStage);
    return end_ != 0;
  }

  // The header of the frame that has begun.
  Header header() {
    stage_up_to(kLength);
    const size_t length = announced();
    if (length > kMaxHeader) throw Malformed("a header of " + std::to_string(length) + " bytes");
    stage_up_to(kLength + length);
    const Header h = parse(stage_.data() + start_ + kLength, length, false);
    start_ += kLength + length;
    return h;
  }

  void read_into(void* target, size_t size) {
    auto* to = static_cast<uint8_t*>(target);
    const size_t staged = std::min(size, end_ - start_);
    std::memcpy(to, stage_.data() + start_, staged);
    start_ += staged;
    for (size_t at = staged; at < size;) at += more(to + at, size - at);
  }

  // Whether the trunk waits for a call no more: the frame behind it takes it back, or the trunk is gone.
  bool taken_back(uint64_t id) {
    if (start_ == end_) start_ = end_ = 0;
    try {
      if (const size_t room = std::min<size_t>(kStage, stage_.size() - end_))
        end_ += receive(fd, stage_.data() + end_, room);
      if (end_ - start_ < kLength || end_ - start_ - kLength < announced()) return false;
      const Header next = parse(stage_.data() + start_ + kLength, announced(), false);
      return next.cancel && next.call_id == id;
    } catch (const Closed&) {
      return true;
    } catch (const Malformed&) {
      return false;  // the thread that reads it as the next call ends the connection
    }
  }

  // Sends all parts, however long the trunk takes.
  void reply(iovec* parts, size_t count) {
    send_all(fd, parts, count, [&] { ready(fd, POLLOUT, -1); });
  }

  bool has_staged() const { return end_ != start_; }

  const int fd;
  std::mutex reading;  // held from the first byte of a call to the last of its reply
  bool over = false;   // under reading
  std::atomic<bool> staged{false};  // the next call has begun to come
  Call call;                        // the one that is being answered

 private:
  static constexpr size_t kStage = 4096, kLength = sizeof(uint32_t);

  uint32_t announced() const {
    uint32_t length;
    std::memcpy(&length, stage_.data() + start_, kLength);
    return length;
  }

  size_t more(uint8_t* target, size_t size) {
    for (;;) {
      if (const size_t got = receive(fd, target, size)) return got;
      if (!ready(fd, POLLIN, kStallMs)) throw Closed("nothing came for 30 s amid a message");
    }
  }

  void stage_up_to(size_t size) {
    if (end_ - start_ >= size) return;
    if (start_) {
      std::memmove(stage_.data(), stage_.data() + start_, end_ - start_);
      end_ -= start_;
      start_ = 0;
    }
    while (end_ < size) end_ += more(stage_.data() + end_, std::max<size_t>(size, kStage) - end_);
  }

  std::vector<uint8_t> stage_;
  size_t start_ = 0, end_ = 0;
};

}  // namespace moe_ray
