// An array of zeros of which only the pages that are touched take memory: a record of memory that is reserved but
// hardly used may be larger than the machine.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <utility>

namespace ptx {

template <class T>
class Zeros {
  public:
    explicit Zeros(size_t count = 0) : bytes_(count * sizeof(T)) {
        if (!bytes_) return;
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        data_ = static_cast<T*>(memory);
    }
    Zeros(Zeros&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)),
          bytes_(std::exchange(other.bytes_, 0)) {}
    Zeros& operator=(Zeros&& other) noexcept {
        std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~Zeros() {
        if (data_) munmap(data_, bytes_);
    }

    T& operator[](size_t k) { return data_[k]; }

  private:
    T* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace ptx
