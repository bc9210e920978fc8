#include "backends/memory.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>

#include "backends/device.h"
#include "backends/kernels.h"
#include "errors.h"
#include "noise.h"

namespace pid::core {
namespace {

constexpr std::align_val_t alignment{4096};

Allocation allocate_on_host(std::size_t bytes) {
    auto* memory = static_cast<std::byte*>(::operator new(bytes, alignment, std::nothrow));
    if (memory == nullptr)
        throw Shortage("too little");
    return Allocation(memory, [](std::byte* held) { ::operator delete(held, alignment); });
}

} // namespace

bool all_finite(const float* values, std::size_t count) {
    return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}

Memory::Memory(std::shared_ptr<CudaDevice> device, std::size_t threads)
    : device_(std::move(device)), threads_(threads) {}

Allocation Memory::allocate(std::size_t bytes) {
    return device_ ? device_->allocate(bytes) : allocate_on_host(bytes);
}

void Memory::write(const Tensor& tensor, const void* source, pid_memory memory) {
    if (!device_)
        std::memcpy(tensor.address, source, tensor.bytes());
    else if (memory == PID_CUDA)
        device_->copy_on_device(tensor.address, source, tensor.bytes());
    else
        device_->copy_to_device(tensor.address, source, tensor.bytes());
}

void Memory::read(const Tensor& tensor, void* target, pid_memory memory) {
    if (!device_) {
        std::memcpy(target, tensor.address, tensor.bytes());
    } else if (memory == PID_CUDA) {
        device_->copy_on_device(target, tensor.address, tensor.bytes());
        device_->synchronize();
    } else {
        device_->copy_to_host(target, tensor.address, tensor.bytes());
    }
}

Call Memory::copy(const Tensor& source, const Tensor& target) {
    if (!device_)
        return [source, target] { std::memcpy(target.address, source.address, source.bytes()); };
    return [device = device_, source, target] {
        device->copy_on_device(target.address, source.address, source.bytes());
    };
}

void Memory::fill_zero(const Tensor& tensor) {
    if (device_)
        device_->fill_zero(tensor.address, tensor.bytes());
    else
        std::memset(tensor.address, 0, tensor.bytes());
}

void Memory::fill_normal(const Tensor& tensor, std::uint64_t seed, std::uint32_t draw,
                         std::uint64_t start) {
    const std::size_t count = count_of(tensor.shape);
    if (!device_) {
        auto* values = reinterpret_cast<float*>(tensor.address);
        standard_normal(seed, draw, start, count, values, threads_);
        return;
    }
    if (const Kernels* kernels = device_->kernels()) {
        kernels->fill_normal(tensor, seed, draw, start);
        return;
    }
    std::vector<float> values(count);
    standard_normal(seed, draw, start, count, values.data(), threads_);
    device_->copy_to_device(tensor.address, values.data(), tensor.bytes());
}

bool Memory::is_finite(const Tensor& tensor) {
    const std::size_t count = count_of(tensor.shape);
    if (!device_)
        return all_finite(reinterpret_cast<const float*>(tensor.address), count);
    std::vector<float> values(count);
    read(tensor, values.data(), PID_HOST);
    return all_finite(values.data(), count);
}

const Blending* Memory::blending() const {
    static const HostBlending on_host;
    if (!device_)
        return &on_host;
    return device_->kernels();
}

void Memory::synchronize() {
    if (device_)
        device_->synchronize();
}

} // namespace pid::core
