#include "interpreter.h"

#include <algorithm>
#include <limits>
#include <set>

#include "errors.h"
#include "tables.h"

namespace pid::core {
namespace {

using Slices = std::vector<std::pair<std::uint64_t, std::uint64_t>>;

// How a run is cut along its chunked axis; one slice, not to be used, when it has none.
Slices slices_of(const Run& run, const Bucket& bucket, const Sizes& local) {
    if (run.chunk.empty())
        return {{0, 0}};
    return even_slices(local.value(run.chunk), bucket.chunk_tokens);
}

// Product of the sizes of a shape from an axis on.
std::uint64_t product_from(const Sizes& sizes, const SymbolicShape& shape, std::size_t axis) {
    std::uint64_t count = 1;
    for (; axis < shape.size(); ++axis)
        count *= sizes.value(shape[axis]);
    return count;
}

} // namespace

Program::Program(const Manifest& manifest, Memory& memory, Graphs& graphs, const Bucket& bucket,
                 const Sizes& sizes, Allocation arena, const Constants& constants)
    : manifest_(manifest), memory_(memory), graphs_(graphs), bucket_(bucket), sizes_(sizes),
      bucket_sizes_(sizes), arena_(std::move(arena)) {
    bucket_sizes_.set(chunk_symbol, bucket.chunk_tokens);
    for (const auto& [name, buffer] : manifest.buffers) {
        if (const auto* table = std::get_if<Table>(&buffer.source))
            memory.write(this->buffer(name), compute_table(*table, sizes).data(), PID_HOST);
        else if (std::holds_alternative<Constant>(buffer.source))
            memory.write(this->buffer(name), constants.at(name).data(), PID_HOST);
    }
}

std::uint64_t Program::arena_bytes(const Bucket& bucket, const Sizes& sizes) {
    const std::uint64_t bytes = product(bucket.arena_bytes, sizes.value("B"));
    if (bytes >= std::min<std::uint64_t>(too_much, std::numeric_limits<std::size_t>::max() / 2))
        refuse("expected a batch whose arena fits in memory, but got ", sizes.value("B"),
               " images; decode a smaller batch");
    return bytes;
}

Tensor Program::buffer(const std::string& name) const {
    return tensor(name, 0, bucket_sizes_.shape(manifest_.buffers.at(name).shape));
}

Tensor Program::image_part(const std::string& name, std::uint64_t image,
                           std::uint64_t count) const {
    const SymbolicShape& shape = manifest_.buffers.at(name).shape;
    Shape part = sizes_.shape(shape);
    part[0] = static_cast<std::int64_t>(count);
    return tensor(name, image * product_from(sizes_, shape, 1), std::move(part));
}

void Program::run(const std::string& section, std::uint64_t row, std::uint64_t step,
                  const NoiseSource& noise) {
    const auto key = std::make_tuple(section, row, step);
    auto found = parts_.find(key);
    if (found == parts_.end()) {
        Sizes sizes = bucket_sizes_;
        sizes.set("row", row);
        sizes.set("step", step);
        found = parts_.emplace(key, bind_section(section, sizes)).first;
    }
    for (const Part& part : found->second) {
        graphs_.throw_if_cancelled();
        if (const auto* call = std::get_if<Call>(&part))
            (*call)();
        else
            noise(std::get<BoundNoise>(part));
    }
}

void Program::refresh(const std::string& input) {
    auto found = refreshes_.find(input);
    if (found == refreshes_.end()) {
        std::vector<Call> calls;
        for (const std::size_t index : manifest_.dependent("prologue", {input}))
            bind("prologue", index, bucket_sizes_, calls);
        found = refreshes_.emplace(input, graphs_.sequence(std::move(calls))).first;
    }
    graphs_.throw_if_cancelled();
    found->second();
}

void Program::load_noise(const BoundNoise& noise, const void* image, pid_memory memory) {
    memory_.write(buffer(noise.instruction.image), image, memory);
    noise.patchify();
}

// A section's noise, and a sequence for all that runs between.
std::vector<Program::Part> Program::bind_section(const std::string& section, const Sizes& sizes) {
    std::vector<Part> parts;
    std::vector<Call> calls;
    const auto end_sequence = [&] {
        if (!calls.empty())
            parts.emplace_back(graphs_.sequence(std::move(calls)));
        calls.clear();
    };
    const std::vector<Instruction>& instructions = manifest_.program.at(section);
    for (std::size_t index = 0; index < instructions.size(); ++index) {
        const auto* noise = std::get_if<Noise>(&instructions[index]);
        if (noise == nullptr) {
            bind(section, index, sizes, calls);
            continue;
        }
        end_sequence();
        bind_run(noise->patchify(), bucket_sizes_, scratch_of(section, index), calls);
        parts.emplace_back(BoundNoise{*noise, graphs_.sequence(std::move(calls))});
        calls.clear();
    }
    end_sequence();
    return parts;
}

void Program::bind(const std::string& section, std::size_t index, const Sizes& sizes,
                   std::vector<Call>& calls) {
    const Instruction& instruction = manifest_.program.at(section)[index];
    if (const auto* copy = std::get_if<Copy>(&instruction))
        calls.push_back(memory_.copy(buffer(copy->source), buffer(copy->target)));
    else if (const auto* each = std::get_if<Each>(&instruction))
        bind_each(*each, sizes, scratch_of(section, index), calls);
    else
        bind_run(std::get<Run>(instruction), sizes, scratch_of(section, index), calls);
}

// One call per slice of the chunked axis, and per image where slices are not contiguous.
void Program::bind_run(const Run& run, const Sizes& sizes, const Scratch& scratch,
                       std::vector<Call>& calls) {
    const Sizes local = sizes.extended(run.dims);
    const Graph& graph = manifest_.graphs.at(run.graph);
    const auto cover = [&](const std::map<std::string, Port>& ports,
                           const std::map<std::string, Operand>& operands) {
        return std::all_of(ports.begin(), ports.end(), [&](const auto& port) {
            return covers_batch(operands.at(port.first), port.second, local);
        });
    };
    const Slices slices = slices_of(run, bucket_, local);
    if (graphs_.whole_batches() && slices.size() == 1 && cover(graph.inputs, run.inputs) &&
        cover(graph.outputs, run.outputs)) {
        calls.push_back(bind_call(run, sizes, local, {0, run.chunk, 0}, scratch));
        return;
    }
    for (std::uint64_t image = 0; image < local.value("B"); ++image) {
        for (const auto& [begin, end] : slices) {
            Sizes one = local;
            one.set("B", 1);
            if (!run.chunk.empty())
                one.set(run.chunk, end - begin);
            calls.push_back(bind_call(run, sizes, one, {image, run.chunk, begin}, scratch));
        }
    }
}

// For every image and slice, what there is to do, in order.
void Program::bind_each(const Each& each, const Sizes& sizes, const Scratch& scratch,
                        std::vector<Call>& calls) {
    for (std::uint64_t image = 0; image < sizes.value("B"); ++image) {
        for (const auto& [begin, end] : even_slices(sizes.value(each.axis), bucket_.chunk_tokens)) {
            Sizes cut = sizes;
            cut.set("B", 1);
            cut.set(each.axis, end - begin);
            const Slice where{image, each.axis, begin};
            const auto part_of = [&](const std::string& name) {
                const SymbolicShape seen = each.slice_of(manifest_.buffers.at(name));
                return slice({name, {}}, seen, sizes, cut, where);
            };
            for (const auto& part : each.parts) {
                if (const auto* run = std::get_if<Run>(&part)) {
                    calls.push_back(
                        bind_call(*run, sizes, cut.extended(run->dims), where, scratch));
                } else {
                    const Copy& copy = std::get<Copy>(part);
                    calls.push_back(memory_.copy(part_of(copy.source), part_of(copy.target)));
                }
            }
        }
    }
}

Call Program::bind_call(const Run& run, const Sizes& sizes, const Sizes& local, const Slice& where,
                        const Scratch& scratch) {
    const Graph& graph = manifest_.graphs.at(run.graph);
    Bindings tensors;
    for (const auto& [name, port] : graph.inputs)
        tensors.emplace(name, slice(run.inputs.at(name), port.shape, sizes, local, where));
    for (const auto& [name, port] : graph.outputs)
        tensors.emplace(name, slice(run.outputs.at(name), port.shape, sizes, local, where));
    return graphs_.bind(run.graph, tensors, scratch);
}

// What the graph of an instruction may work in.
Scratch Program::scratch_of(const std::string& section, std::size_t index) const {
    const auto planned = bucket_.scratch.find(section);
    if (planned == bucket_.scratch.end())
        return {};
    const std::uint64_t begin = planned->second[index] * sizes_.value("B");
    return {arena_.get() + begin, arena_bytes(bucket_, sizes_) - begin};
}

// Whether the batch elements of an operand lie next to each other.
bool Program::covers_batch(const Operand& operand, const Port& port, const Sizes& local) const {
    if (!has_symbol(port.shape, "B") || local.value("B") == 1)
        return true;
    const SymbolicShape& whole = manifest_.buffers.at(operand.buffer).shape;
    return local.count(port.shape) == bucket_sizes_.count(whole);
}

// The part of a buffer an operand, of a port that sees this shape, means in one call.
Tensor Program::slice(const Operand& operand, const SymbolicShape& seen, const Sizes& sizes,
                      const Sizes& local, const Slice& where) const {
    const SymbolicShape& shape = manifest_.buffers.at(operand.buffer).shape;
    std::uint64_t at = sizes.index(shape, operand.start);
    if (has_symbol(seen, "B"))
        at += where.image * product_from(sizes, shape, 1);
    const auto cut = std::find(seen.begin(), seen.end(), Size(where.axis));
    if (!where.axis.empty() && cut != seen.end() && !has_symbol(shape, chunk_symbol)) {
        const auto axis = static_cast<std::size_t>(cut - seen.begin());
        at += where.begin * product_from(local, seen, axis + 1);
    }
    return tensor(operand.buffer, at, local.shape(seen));
}

Tensor Program::tensor(const std::string& name, std::uint64_t first, Shape shape) const {
    const DType dtype = manifest_.buffers.at(name).dtype;
    const std::uint64_t offset =
        bucket_.offsets.at(name) * sizes_.value("B") + first * item_bytes(dtype);
    return {arena_.get() + offset, dtype, std::move(shape)};
}

std::vector<PlannedCall> planned_calls(const Manifest& manifest, const Bucket& bucket,
                                       const Sizes& sizes) {
    std::vector<PlannedCall> calls;
    for (const char* section : sections) {
        for (const Instruction& instruction : manifest.program.at(section)) {
            for (const Run& run : runs_of(instruction)) {
                Sizes local = sizes.extended(run.dims);
                local.set("B", 1);
                std::set<std::uint64_t> lengths;
                for (const auto& [begin, end] : slices_of(run, bucket, local))
                    lengths.insert(end - begin);
                for (const std::uint64_t length : lengths) {
                    Sizes one = local;
                    if (!run.chunk.empty())
                        one.set(run.chunk, length);
                    calls.push_back({run.graph, one});
                }
            }
        }
    }
    return calls;
}

Slices even_slices(std::uint64_t count, std::uint64_t largest) {
    const std::uint64_t parts = (count + largest - 1) / largest;
    Slices slices;
    for (std::uint64_t i = 0; i < parts; ++i)
        slices.emplace_back(i * count / parts, (i + 1) * count / parts);
    return slices;
}

} // namespace pid::core
