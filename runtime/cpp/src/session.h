// What a backend offers the interpreter.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "manifest.h"
#include "pid/pid_runtime.h"
#include "sizes.h"
#include "tensor.h"

namespace pid::core {

class CudaDevice;

using Call = std::function<void()>;

// What a graph's ports are bound to, by name.
using Bindings = std::map<std::string, Tensor>;

// Memory a graph may work in, from `address` to the end of the arena; none where it is not planned.
struct Scratch {
    std::byte* address = nullptr;
    std::uint64_t bytes = 0;
};

// A kind of call that a decode is going to make: a graph, and the sizes of one image's.
struct PlannedCall {
    std::string graph;
    Sizes sizes;
};

// Memory and graphs of one backend. All graphs share it; so do all calls of a decoder.
//
// Memory is the host's, or a GPU's if the backend has one.
class Session {
public:
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    virtual ~Session() = default;

    // Whether graphs take all images of a batch in one call, or one image per call.
    virtual bool whole_batches() const = 0;

    // The bucket to decode so many patch tokens in. Refuses when there is none.
    virtual const Bucket& bucket_for(std::uint64_t tokens) const = 0;

    // Make ready for a shape, before its memory is allocated. Refuses when a graph cannot run at a
    // size, or when memory is known not to suffice.
    // needed_bytes: what is going to be allocated. batch: images of the shape.
    virtual void prepare(const std::vector<PlannedCall>& calls, std::uint64_t needed_bytes,
                         std::uint64_t batch);

    // A call that runs a graph on these inputs and outputs, as often as wanted.
    virtual Call bind(const std::string& graph, const Bindings& tensors,
                      const Scratch& scratch) = 0;

    // A call that makes these calls, bound or copies, in order. Stops with PID_ERROR_CANCELLED
    // between two of them when `cancelled` is set.
    virtual Call sequence(std::vector<Call> calls);

    // Memory, not initialised, aligned to at least 256 bytes. Fails with PID_ERROR_MEMORY.
    Allocation allocate(std::size_t bytes);
    // Copy into a tensor from memory of as many bytes.
    void write(const Tensor& tensor, const void* source, pid_memory memory);
    // Copy a tensor to memory of as many bytes; done when this returns.
    void read(const Tensor& tensor, void* target, pid_memory memory);
    // A call that copies between tensors of the same size.
    Call copy(const Tensor& source, const Tensor& target);
    void fill_zero(const Tensor& tensor);
    // Fill a float32 tensor with `standard_normal(seed, draw, 0, ..)`.
    void fill_normal(const Tensor& tensor, std::uint64_t seed, std::uint32_t draw);
    // Wait for all that was started.
    void synchronize();

    // The GPU whose memory this is; nullptr for the host's.
    const std::shared_ptr<CudaDevice>& device() const { return device_; }

    void throw_if_cancelled() const;

    // Set by any thread to stop the sequence that runs.
    std::atomic<bool> cancelled{false};

protected:
    Session(std::shared_ptr<CudaDevice> device, std::size_t threads);

    std::size_t threads() const { return threads_; }

private:
    std::shared_ptr<CudaDevice> device_;
    std::size_t threads_;
};

} // namespace pid::core
