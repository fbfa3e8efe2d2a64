// Frames of the socket carrier: [header length, 4 bytes little-endian][protobuf header][tensor bytes], and the two
// headers of protos/moe_ray.proto that travel in them, ExpertCallHeader and ExpertReplyHeader.
#pragma once

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace moe_ray {

constexpr uint32_t kMaxHeader = 64 << 10;
constexpr int kStallMs = 30000;  // a peer that neither sends nor takes a byte for so long amid a message is given up
constexpr uint64_t kMaxTensor = 1ull << 30;
constexpr int kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3;  // DType
constexpr int kOk = 0, kFailed = 1, kRefused = 2, kCancelled = 3, kBusy = 4, kNoAdapter = 5;  // CallStatus
constexpr size_t kMaxRuns = 64;  // of rows with one adapter that a call may have

struct Closed : std::runtime_error { using std::runtime_error::runtime_error; };    // the connection is over
struct Malformed : std::runtime_error { using std::runtime_error::runtime_error; };  // what came is no frame of ours

// Both headers; what a message lacks stays 0.
struct Header {
  uint64_t call_id = 0, layer = 0, expert = 0, cancel = 0;              // of a call
  std::vector<uint64_t> adapter_ids, adapter_rows;                      // runs of its rows; none: no row has an adapter
  uint64_t status = 0, queued_rows = 0, compute_us = 0, queue_us = 0;  // of a reply
  uint64_t num_rows = 0, hidden_size = 0, dtype = 0;
  std::string error;

  uint64_t item() const { return dtype == kFloat32 ? 4 : 2; }
  uint64_t row_bytes() const {  // checked
    if (dtype < kFloat32 || dtype > kFloat16) throw Malformed("header.dtype is " + std::to_string(dtype));
    if (num_rows < 1 || hidden_size < 1 || num_rows > kMaxTensor || hidden_size > kMaxTensor ||
        num_rows * hidden_size > kMaxTensor / item())
      throw Malformed("header.num_rows x header.hidden_size is " + std::to_string(num_rows) + " x " +
                      std::to_string(hidden_size));
    return num_rows * hidden_size * item();
  }
  void check_runs() const {
    if (adapter_ids.size() != adapter_rows.size() || adapter_ids.size() > kMaxRuns)
      throw Malformed("header.adapter_ids has " + std::to_string(adapter_ids.size()) +
                      " items, header.adapter_rows " + std::to_string(adapter_rows.size()));
    uint64_t rows = 0;
    for (const uint64_t count : adapter_rows) {
      if (!count || count > num_rows) throw Malformed("header.adapter_rows has " + std::to_string(count));
      rows += count;
    }
    if (!adapter_rows.empty() && rows != num_rows)
      throw Malformed("header.adapter_rows sum to " + std::to_string(rows) + ", the rows are " +
                      std::to_string(num_rows));
  }
};

class Writer {  // one frame's length and header
 public:
  void number(int field, uint64_t value) {
    if (!value) return;
    bytes_[size_++] = static_cast<uint8_t>(field << 3);
    varint(value);
  }
  template <class Number>
  void numbers(int field, const Number* values, size_t count) {  // packed; at most kMaxRuns
    size_t length = 0;
    for (size_t i = 0; i < count; i++) {
      length++;
      for (uint64_t left = values[i]; left >= 0x80; left >>= 7) length++;
    }
    bytes_[size_++] = static_cast<uint8_t>(field << 3 | 2);
    varint(length);
    for (size_t i = 0; i < count; i++) varint(values[i]);
  }
  void text(int field, const std::string& value) {
    size_t length = std::min<size_t>(value.size(), kMaxText);
    while (length < value.size() && length && (value[length] & 0xc0) == 0x80) length--;  // whole characters: UTF-8
    bytes_[size_++] = static_cast<uint8_t>(field << 3 | 2);
    varint(length);
    std::memcpy(bytes_ + size_, value.data(), length);
    size_ += length;
  }
  iovec done() {
    const uint32_t length = static_cast<uint32_t>(size_ - 4);
    std::memcpy(bytes_, &length, 4);
    return {bytes_, size_};
  }

 private:
  static constexpr size_t kMaxText = 600, kMostOfRuns = kMaxRuns * (10 + 5) + 8;  // ids and rows

  void varint(uint64_t value) {
    for (; value >= 0x80; value >>= 7) bytes_[size_++] = static_cast<uint8_t>(value | 0x80);
    bytes_[size_++] = static_cast<uint8_t>(value);
  }

  uint8_t bytes_[128 + std::max(kMaxText, kMostOfRuns)];
  size_t size_ = 4;
};

inline uint64_t varint(const uint8_t*& p, const uint8_t* end) {
  uint64_t value = 0;
  for (int shift = 0; shift < 64 && p < end; shift += 7) {
    const uint8_t byte = *p++;
    value |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if (byte < 0x80) return value;
  }
  throw Malformed("a header that ends within a number");
}

inline void add_run(std::vector<uint64_t>& runs, uint64_t value) {
  if (runs.size() == kMaxRuns) throw Malformed("a header with more than " + std::to_string(kMaxRuns) + " adapter runs");
  runs.push_back(value);
}

// Fields by number; `reply` says which message it is. Unknown fields are skipped, as protobuf demands.
inline Header parse(const uint8_t* p, size_t size, bool reply) {
  Header h;
  uint64_t other = 0;
  uint64_t* const call_fields[] = {&h.call_id, &h.layer, &h.expert, &h.num_rows, &h.hidden_size, &h.dtype,
                                  &h.cancel};
  uint64_t* const reply_fields[] = {&h.call_id, &h.status, &other,         &h.num_rows, &h.hidden_size,
                                    &h.dtype,   &h.queued_rows, &h.compute_us, &h.queue_us};
  const uint8_t* const end = p + size;
  while (p < end) {
    const uint64_t tag = varint(p, end), field = tag >> 3, count = reply ? 9 : 7;
    auto* const runs = reply ? nullptr : field == 9 ? &h.adapter_ids : field == 10 ? &h.adapter_rows : nullptr;
    if ((tag & 7) == 0) {
      const uint64_t value = varint(p, end);
      if (runs) add_run(*runs, value);
      else if (field >= 1 && field <= count) *(reply ? reply_fields : call_fields)[field - 1] = value;
    } else if ((tag & 7) == 2) {
      const uint64_t length = varint(p, end);
      if (length > static_cast<uint64_t>(end - p)) throw Malformed("a header that ends within a text");
      if (reply && field == 3) h.error.assign(reinterpret_cast<const char*>(p), length);
      if (runs)  // packed
        for (const uint8_t* at = p; at < p + length;) add_run(*runs, varint(at, p + length));
      p += length;
    } else if ((tag & 7) == 1 && end - p >= 8) {
      p += 8;
    } else if ((tag & 7) == 5 && end - p >= 4) {
      p += 4;
    } else {
      throw Malformed("a header that is no protobuf message");
    }
  }
  return h;
}

inline const char* dtype_name(uint64_t dtype) {
  return dtype == kFloat32 ? "float32" : dtype == kBFloat16 ? "bfloat16" : dtype == kFloat16 ? "float16" : "unknown";
}

inline std::string system_error(int error) { return std::strerror(error); }

// Waits until the socket is ready for `events`; false after `timeout_ms` (negative: never).
inline bool ready(int fd, short events, int timeout_ms) {
  pollfd p{fd, events, 0};
  for (;;) {
    const int count = ::poll(&p, 1, timeout_ms);
    if (count > 0) return true;
    if (count == 0) return false;
    if (errno != EINTR) throw Closed(system_error(errno));
  }
}

// Bytes received now; 0 if there are none.
inline size_t receive(int fd, void* target, size_t size) {
  const ssize_t count = ::recv(fd, target, size, MSG_DONTWAIT);
  if (count > 0) return static_cast<size_t>(count);
  if (count == 0) throw Closed("the replica ended the connection");
  if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return 0;
  throw Closed(system_error(errno));
}

// Sends all parts; while the peer takes no more, calls `wait()`.
template <class Wait>
void send_all(int fd, iovec* parts, size_t count, const Wait& wait) {
  while (count) {
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = count;
    const ssize_t sent = ::sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EAGAIN || errno == EWOULDBLOCK) wait();
      else if (errno != EINTR) throw Closed(system_error(errno));
      continue;
    }
    size_t left = static_cast<size_t>(sent);
    while (count && left >= parts->iov_len) left -= parts->iov_len, parts++, count--;
    if (count) parts->iov_base = static_cast<uint8_t*>(parts->iov_base) + left, parts->iov_len -= left;
  }
}

}  // namespace moe_ray
