// Runs a manifest's program on a backend's graphs: the whole of the runtime that is not a backend.
//
// A program is bound to one set of sizes at a time. Binding lays the buffers out in the arena,
// resolves every operand to a contiguous part of it, and turns each instruction into the calls it
// stands for; running is then a walk over those calls. pid_runtime/interpreter.py is the same in
// Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "backends/graphs.h"
#include "backends/memory.h"
#include "bundle/manifest.h"

namespace pid::core {

using Constants = std::map<std::string, std::vector<float>>;

// A noise instruction, and the call that fills its target from its image.
struct BoundNoise {
    const Noise& instruction;
    Call patchify;
};

// Fills the target of a noise instruction.
using NoiseSource = std::function<void(const BoundNoise&)>;

// A manifest's program bound to one set of sizes. Refers to all it is made from.
class Program {
public:
    // arena: at least `arena_bytes(bucket, sizes)` bytes. constants: by buffer.
    Program(const Manifest& manifest, Memory& memory, Graphs& graphs, const Bucket& bucket,
            const Sizes& sizes, Allocation arena, const Constants& constants);

    // Bytes of the one allocation of a decode; refuses what no machine has.
    static std::uint64_t arena_bytes(const Bucket& bucket, const Sizes& sizes);

    const Sizes& sizes() const { return sizes_; }
    Memory& memory() const { return memory_; }

    // A whole buffer.
    Tensor buffer(const std::string& name) const;
    // The part [count, ..] of a buffer [B, ..] that belongs to images of the batch.
    Tensor image_part(const std::string& name, std::uint64_t image, std::uint64_t count = 1) const;

    // Run a section of the program. row: of the sampler's times. noise: called for each noise
    // instruction.
    void run(const std::string& section, std::uint64_t row, std::uint64_t step,
             const NoiseSource& noise);

    // Run again what of the prologue depends on an input, which has new values.
    void refresh(const std::string& input);

    // Fill a noise instruction's target from an image [B, 3, H, W] float32.
    void load_noise(const BoundNoise& noise, const void* image, pid_memory memory);

private:
    using Part = std::variant<Call, BoundNoise>;

    std::vector<Part> bind_section(const std::string& section, const Sizes& sizes);
    // The calls of an instruction other than noise.
    void bind(const std::string& section, std::size_t index, const Sizes& sizes,
              std::vector<Call>& calls);
    void bind_run(const Run& run, const Sizes& sizes, const Scratch& scratch,
                  std::vector<Call>& calls);
    void bind_each(const Each& each, const Sizes& sizes, const Scratch& scratch,
                   std::vector<Call>& calls);
    // What of its buffers a call is about: an image of the batch, and where its slice begins along
    // the axis that is cut, "" for none.
    struct Slice {
        std::uint64_t image;
        const std::string& axis;
        std::uint64_t begin;
    };
    // One call. sizes: as buffers have them; local: as the graph's ports do.
    Call bind_call(const Run& run, const Sizes& sizes, const Sizes& local, const Slice& where,
                   const Scratch& scratch);
    Scratch scratch_of(const std::string& section, std::size_t index) const;
    bool covers_batch(const Operand& operand, const Port& port, const Sizes& local) const;
    Tensor slice(const Operand& operand, const SymbolicShape& seen, const Sizes& sizes,
                 const Sizes& local, const Slice& where) const;
    Tensor tensor(const std::string& name, std::uint64_t first, Shape shape) const;

    const Manifest& manifest_;
    Memory& memory_;
    Graphs& graphs_;
    const Bucket& bucket_;
    Sizes sizes_;
    Sizes bucket_sizes_; // with those of the bucket
    Allocation arena_;
    std::map<std::tuple<std::string, std::uint64_t, std::uint64_t>, std::vector<Part>> parts_;
    std::map<std::string, Call> refreshes_; // by input
};

// Every kind of call that a decode of one image of these sizes makes.
std::vector<PlannedCall> planned_calls(const Manifest& manifest, const Bucket& bucket,
                                       const Sizes& sizes);

// Cut 0 .. count into as few slices (begin, end) as `largest` allows, as even as can be.
std::vector<std::pair<std::uint64_t, std::uint64_t>> even_slices(std::uint64_t count,
                                                                 std::uint64_t largest);

} // namespace pid::core
