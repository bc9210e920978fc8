// Our kernels on a GPU, which kernels.cu of pid_runtime/backends says what they do.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "backends/blending.h"

namespace pid::core {

class CudaDevice;

// Noise, and the `Blending` of a GPU's memory. All is put on the device's stream.
class Kernels : public Blending {
public:
    // Fails with the driver's words where it refuses them.
    explicit Kernels(const CudaDevice& device);

    // Fill a float32 tensor with `standard_normal(seed, draw, start, ..)`; start is a multiple
    // of 4.
    void fill_normal(const Tensor& tensor, std::uint64_t seed, std::uint32_t draw,
                     std::uint64_t start) const;

    void take(const Tensor& state, const Tensor& tile, std::size_t row,
              std::size_t column) const override;
    void add(const Tensor& ring, const Tensor& tile, const Tensor& down, const Tensor& across,
             std::size_t row, std::size_t column) const override;
    void mix(const Tensor& state, const Tensor& ring, const Tensor* before, const Tensor* noise,
             const std::array<float, 4>& factors, std::size_t row, std::size_t rows) const override;

private:
    const CudaDevice& device_; // which has these
    void* standard_normal_;
    void* take_tile_;
    void* add_tile_;
    void* mix_;
};

} // namespace pid::core
