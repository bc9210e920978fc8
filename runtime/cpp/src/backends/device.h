// The few calls of CUDA's driver that GPU backends need, looked up in libcuda when the first of
// them is opened: neither building nor loading this library needs CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backends/tensor.h"

namespace pid::core {

struct CudaFunctions;
class Kernels;

// One GPU's primary context, and a stream in it. Every method makes the context the thread's own.
class CudaDevice : public std::enable_shared_from_this<CudaDevice> {
public:
    // Refuses when there is no driver or no such GPU.
    // stream: the caller's, or nullptr for one of our own.
    static std::shared_ptr<CudaDevice> open(int ordinal, void* stream);

    CudaDevice(const CudaDevice&) = delete;
    CudaDevice& operator=(const CudaDevice&) = delete;
    ~CudaDevice();

    int ordinal() const { return ordinal_; }
    void* stream() const { return stream_; }
    // Such as "sm89".
    std::string architecture() const;
    void make_current() const;

    // Memory that nobody uses.
    std::size_t free_bytes() const;

    // Fails with PID_ERROR_MEMORY when there is not so much.
    Allocation allocate(std::size_t bytes);
    // These are put on the stream; host memory may be used when they return.
    void copy_to_device(void* target, const void* source, std::size_t bytes) const;
    void copy_to_host(void* target, const void* source, std::size_t bytes) const;
    void copy_on_device(void* target, const void* source, std::size_t bytes) const;
    void fill_zero(void* target, std::size_t bytes) const;
    void synchronize() const;

    // A module of PTX, which the driver compiles for the GPU; it is unloaded with the device.
    void* load_module(const char* ptx) const;
    void* find_kernel(void* module, const char* name) const;
    // Put a kernel of at least so many threads on the stream. arguments: where each lies.
    void launch(void* kernel, std::uint64_t threads, void** arguments) const;

    // Our kernels, loaded when first asked for; nullptr where the driver refuses them.
    const Kernels* kernels() const;

    // Record what `work` puts on the stream, and return a function that puts all of it there again,
    // as one launch. The function holds the device.
    std::function<void()> capture(const std::function<void()>& work);

private:
    CudaDevice(const CudaFunctions& functions, int ordinal, void* stream);
    void check(int result, const char* what) const;

    const CudaFunctions& cuda_;
    int ordinal_;
    int device_ = 0;
    void* context_ = nullptr;
    void* stream_;
    bool owns_stream_ = false;
    mutable std::vector<void*> modules_;
    mutable std::once_flag loaded_; // its kernels: decoders may share a device
    mutable std::unique_ptr<Kernels> kernels_;
};

} // namespace pid::core
