// Memory of a call, used again for the next one.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace moe_ray {

// Memory that only grows and is never cleared, aligned for vector instructions.
class Memory {
 public:
  uint8_t* room(size_t size) {
    if (size > size_) {
      data_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (size + 63) / 64 * 64)));
      size_ = data_ ? size : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }
  uint8_t* data() { return data_.get(); }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t size_ = 0;
};

}  // namespace moe_ray
