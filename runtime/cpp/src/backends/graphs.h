// What a backend offers: a bundle's graphs, loaded once for all decoders and run by each.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backends/memory.h"
#include "backends/tensor.h"
#include "bundle/manifest.h"
#include "bundle/sizes.h"
#include "log.h"

namespace pid::core {

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

// A bundle's graphs as one decoder runs them, in its memory. Serves one thread at a time.
class Graphs {
public:
    Graphs() = default;
    Graphs(const Graphs&) = delete;
    Graphs& operator=(const Graphs&) = delete;
    virtual ~Graphs() = default;

    // Whether graphs take all images of a batch in one call, or one image per call.
    virtual bool whole_batches() const = 0;

    // Whether two images as a batch may take less time than one after another.
    virtual bool batches_gain() const { return false; }

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

    void throw_if_cancelled() const;

    // Set by any thread to stop the sequence that runs.
    std::atomic<bool> cancelled{false};
};

// What a decoder runs in its own way; see pid_decoder_params.
struct RunOptions {
    // Of the GPU; nullptr for one of the decoder's own.
    void* cuda_stream = nullptr;
    bool cuda_graphs = true;
    Log log;
};

// A bundle's graphs, loaded on one backend. Any number of decoders, each in a thread of its own,
// run them at the same time.
class LoadedGraphs {
public:
    LoadedGraphs() = default;
    LoadedGraphs(const LoadedGraphs&) = delete;
    LoadedGraphs& operator=(const LoadedGraphs&) = delete;
    virtual ~LoadedGraphs() = default;

    // The bundle's manifest, with the program that is run and its buffers.
    virtual const Manifest& manifest() const = 0;

    // The memory of one more decoder.
    virtual Memory memory(const RunOptions& options) = 0;

    // The graphs for the decoder of this memory. Refers to both.
    virtual std::unique_ptr<Graphs> graphs(Memory& memory, const RunOptions& options) = 0;
};

} // namespace pid::core
