// The memory a decoder works in: the host's, or a GPU's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "backends/blending.h"
#include "backends/tensor.h"
#include "pid/pid_runtime.h"

namespace pid::core {

class CudaDevice;

using Call = std::function<void()>;

// Whether none is NaN or infinity.
bool all_finite(const float* values, std::size_t count);

class Memory {
public:
    // device: whose memory this is, and whose stream work is put on; nullptr for the host.
    // threads: that make noise.
    Memory(std::shared_ptr<CudaDevice> device, std::size_t threads);

    // Memory, not initialised, aligned to at least 256 bytes. Fails with PID_ERROR_MEMORY.
    Allocation allocate(std::size_t bytes);
    // Copy into a tensor from memory of as many bytes.
    void write(const Tensor& tensor, const void* source, pid_memory memory);
    // Copy a tensor to memory of as many bytes; done when this returns.
    void read(const Tensor& tensor, void* target, pid_memory memory);
    // A call that copies between tensors of the same size.
    Call copy(const Tensor& source, const Tensor& target);
    void fill_zero(const Tensor& tensor);
    // Fill a float32 tensor with `standard_normal(seed, draw, start, ..)`; start is a multiple
    // of 4.
    void fill_normal(const Tensor& tensor, std::uint64_t seed, std::uint32_t draw,
                     std::uint64_t start = 0);
    // Whether a float32 tensor has neither NaN nor infinity.
    bool is_finite(const Tensor& tensor);
    // Wait for all that was started.
    void synchronize();

    // What decodes in tiles do with their state in this memory; nullptr where it cannot.
    const Blending* blending() const;

    std::size_t threads() const { return threads_; }
    const std::shared_ptr<CudaDevice>& device() const { return device_; }

private:
    std::shared_ptr<CudaDevice> device_;
    std::size_t threads_;
};

} // namespace pid::core
