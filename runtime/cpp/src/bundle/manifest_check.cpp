// "Checks" of docs/bundle-format.md. A manifest that passes can be run at any shape its buckets
// hold: no name leads nowhere, no value is missing, and nothing reads or writes outside the arena.
#include "bundle/manifest_check.h"

#include <algorithm>
#include <array>
#include <set>

#include "bundle/files.h"
#include "errors.h"

namespace pid::core {
namespace {

constexpr std::size_t largest_rank = 8;
constexpr std::uint64_t largest_steps = 1000;
constexpr std::uint64_t largest_arena = std::uint64_t{1} << 40U;
constexpr std::uint64_t most_tokens_per_latent = 1024;

using Names = std::set<std::string>;

const Names size_symbols{"B", "T", "h", "w", "Hs", "Ws", "H", "W", "L", "S", "N"};
const Names buffer_symbols{"B", "T", "h", "w", "Hs", "Ws", "H", "W", "L", "S", "N", chunk_symbol};
const Names reserved_symbols{"B", "row", "step"};
const Names precisions{"fp32", "fp16", "bf16", "fp8", "fp8-fp32", "int8", "int8-fp32"};
const Names kinds{"input", "schedule", "table", "constant", "temporary", "output"};

// May start an operand.
bool is_index(const std::string& symbol) {
    return symbol != "B" && (size_symbols.count(symbol) > 0 || symbol == "row" || symbol == "step");
}

[[noreturn]] void refuse_unknown(const std::string& name, const char* what) {
    refuse("expected a ", what, " the manifest knows, but got ", shown(name));
}

template <typename Part>
const Part& named(const std::map<std::string, Part>& parts, const std::string& name,
                  const char* what) {
    const auto found = parts.find(name);
    if (found == parts.end())
        refuse_unknown(name, what);
    return found->second;
}

void check_files(const Manifest& manifest) {
    require(manifest.files.count(manifest_file) == 0, "a manifest that does not list itself",
            "one");
    for (const auto& [name, file] : manifest.files)
        require(is_sha256(file.sha256), "a SHA-256 in hexadecimal for " + name, shown(file.sha256));
    named(manifest.files, weights_file, "file");
    for (const auto& [name, graph] : manifest.graphs) {
        require(is_sha256(graph.weights_sha256), "a SHA-256 in hexadecimal for weights of " + name,
                shown(graph.weights_sha256));
        named(manifest.files, graph.file, "file");
        if (!graph.contrib_file.empty())
            named(manifest.files, graph.contrib_file, "file");
    }
}

void check_network(const Manifest& manifest) {
    if (precisions.count(manifest.precision) == 0)
        refuse_unknown(manifest.precision, "precision");
    const Network& network = manifest.network;
    const std::array<std::pair<const char*, std::uint64_t>, 4> sizes{
        {{"patch_size", network.patch_size},
         {"text_max_length", network.text_max_length},
         {"latent_channels", network.latent_channels},
         {"text_dim", network.text_dim}}};
    for (const auto& [name, size] : sizes)
        require(0 < size && size <= largest_size, text_of("a positive ", name), size);
    require(0 < network.tokens_per_latent && network.tokens_per_latent <= most_tokens_per_latent,
            "tokens_per_latent from 1 to 1024", network.tokens_per_latent);
}

void check_sampler(const Sampler& sampler) {
    require(0 < sampler.max_steps && sampler.max_steps <= largest_steps, "from 1 to 1000 steps",
            sampler.max_steps);
    require(std::find(rules.begin(), rules.end(), sampler.rule) != rules.end(),
            "a rule of " + joined(rules), sampler.rule);
    require(1 <= sampler.guidance && sampler.guidance <= largest_guidance, "guidance from 1 to 100",
            shown(sampler.guidance));
    if (sampler.flow_shift) {
        const auto& [shift, size] = *sampler.flow_shift;
        require(sampler.times.empty(), "no flow_shift where times are known", shown(shift));
        require(1e-3 <= shift && shift <= 1e3, "a flow_shift from 0.001 to 1000", shown(shift));
        require(0 < size && size <= largest_size, "a positive size of flow_shift", size);
    }
    if (sampler.times.empty()) {
        require(sampler.schedules.empty(), "no schedules where there are no times", "some");
        require(0 < sampler.steps && sampler.steps <= sampler.max_steps, "steps up to max_steps",
                sampler.steps);
        return;
    }
    const std::uint64_t count = sampler.times.size();
    require(count == sampler.max_steps, "as many times as max_steps", count);
    for (const double time : sampler.times)
        require(0 < time && time <= 1, "times in (0, 1]", shown(time));
    named(sampler.schedules, std::to_string(sampler.steps), "schedule");
    for (const auto& [steps, rows] : sampler.schedules) {
        require(!rows.empty() && steps == std::to_string(rows.size()) && rows.size() <= count,
                steps + " rows", rows.size());
        double last = 2;
        for (const std::uint64_t row : rows) {
            require(row < count, text_of("rows below ", count), row);
            const double time = sampler.times[row];
            require(time < last, "descending times in schedule " + steps, shown(time));
            last = time;
        }
    }
}

// symbols: those that are sizes; any name if nullptr, as the instruction decides.
void check_shape(const std::string& what, const SymbolicShape& shape, const Names* symbols) {
    require(!shape.empty() && shape.size() <= largest_rank, what + " of 1 to 8 axes", shape.size());
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
        if (const auto* number = std::get_if<std::uint64_t>(&shape[axis])) {
            require(0 < *number && *number <= largest_size, "positive sizes of " + what, *number);
            continue;
        }
        const auto& symbol = std::get<std::string>(shape[axis]);
        require(symbols == nullptr || symbols->count(symbol) > 0, "known sizes of " + what,
                shown(symbol));
        require(symbol != "B" || axis == 0, "the batch as the first axis of " + what,
                text_of(shape));
    }
}

SymbolicShape table_shape(const Table& table) {
    if (const auto* rope = std::get_if<Rope2d>(&table))
        return {"L", rope->head_dim / 2};
    if (const auto* rope = std::get_if<Rope1d>(&table))
        return {"T", rope->head_dim / 2};
    const auto& pixels = std::get<PixelAxis>(table);
    return {"L", pixels.patch_size, pixels.size / 2};
}

// Whether a buffer has place for a slice alone.
bool holds_slice(const Buffer& buffer) {
    return has_symbol(buffer.shape, chunk_symbol);
}

void check_buffer(const std::string& name, const Buffer& buffer) {
    const std::string what = "buffer '" + name + "'";
    check_shape(what, buffer.shape, &buffer_symbols);
    require(kinds.count(buffer.kind) > 0, what + " of a known kind", shown(buffer.kind));
    if (holds_slice(buffer)) {
        const auto first = buffer.shape.begin() + (buffer.shape[0] == Size("B") ? 1 : 0);
        const bool sliced = *first == Size(chunk_symbol) &&
                            std::all_of(first + 1, buffer.shape.end(), [](const Size& size) {
                                return std::holds_alternative<std::uint64_t>(size);
                            });
        require(sliced, text_of(what, " to have ", chunk_symbol, " first and no other size"),
                text_of(buffer.shape));
        require(buffer.kind == "temporary", what + " of a slice to be temporary",
                shown(buffer.kind));
    }
    if (const auto* table = std::get_if<Table>(&buffer.source)) {
        require(buffer.dtype == DType::float32 && buffer.shape == table_shape(*table),
                what + " as its table", text_of(buffer.shape));
    } else if (std::holds_alternative<Constant>(buffer.source)) {
        const bool fixed =
            std::all_of(buffer.shape.begin(), buffer.shape.end(), [](const Size& size) {
                return std::holds_alternative<std::uint64_t>(size);
            });
        require(buffer.dtype == DType::float32 && fixed, what + " to be float32 and of fixed shape",
                text_of(buffer.shape));
    }
}

struct Interface {
    const char* kind;
    DType dtype;
    SymbolicShape shape;
};

// The buffers a runtime fills and reads by name are there, and no others wait to be filled.
void check_interface(const Manifest& manifest) {
    const Network& network = manifest.network;
    const DType f32 = DType::float32;
    const std::uint64_t pixels = product(3, product(network.patch_size, network.patch_size));
    std::map<std::string, Interface> expected{
        {"latent", {"input", f32, {"B", network.latent_channels, "h", "w"}}},
        {"caption", {"input", f32, {"B", "T", network.text_dim}}},
        {"sigma", {"input", f32, {"B"}}},
        {"update", {"schedule", f32, {"N", std::uint64_t{3}}}},
        {"state", {"temporary", f32, {"B", "L", pixels}}},
        {"image", {"output", f32, {"B", std::uint64_t{3}, "H", "W"}}},
        {"image_bytes", {"output", DType::uint8, {"B", "H", "W", std::uint64_t{3}}}}};
    if (manifest.sampler.times.empty())
        expected["timestep"] = {"schedule", f32, {"N", std::uint64_t{1}}};
    for (const auto& [name, wanted] : expected) {
        const Buffer& buffer = named(manifest.buffers, name, "buffer");
        require(buffer.kind == wanted.kind && buffer.dtype == wanted.dtype &&
                    buffer.shape == wanted.shape,
                text_of("buffer '", name, "' as ", wanted.kind, " ", name_of(wanted.dtype), " ",
                        text_of(wanted.shape)),
                text_of(buffer.kind, " ", name_of(buffer.dtype), " ", text_of(buffer.shape)));
    }
    for (const auto& [name, buffer] : manifest.buffers)
        require(expected.count(name) > 0 || (buffer.kind != "input" && buffer.kind != "schedule"),
                "inputs and schedules this version fills", shown(name));
}

// The buffer of that name, which an instruction may write.
const Buffer& written(const Manifest& manifest, const std::string& name) {
    const Buffer& buffer = named(manifest.buffers, name, "buffer");
    require(buffer.kind == "temporary" || buffer.kind == "output",
            "buffer '" + name + "' to be one a program writes", shown(buffer.kind));
    return buffer;
}

bool alike(const Buffer& a, const Buffer& b) {
    return a.dtype == b.dtype && a.shape == b.shape;
}

void check_start(const std::string& what, const Operand& operand, const Buffer& buffer) {
    require(operand.start.empty() || operand.start.size() == buffer.shape.size(),
            what + " to start in its buffer", text_of(operand.start));
    for (const Size& at : operand.start)
        if (const auto* symbol = std::get_if<std::string>(&at))
            require(is_index(*symbol), what + " to start at a known index", shown(*symbol));
}

// Where a port has the axis that is cut, it is the first, or right after the batch, and once.
bool cut_first(const SymbolicShape& shape, const std::string& chunk) {
    const std::size_t first = shape[0] == Size("B") ? 1 : 0;
    return first < shape.size() && shape[first] == Size(chunk) &&
           std::count(shape.begin(), shape.end(), Size(chunk)) == 1;
}

void check_operands(const Manifest& manifest, const Run& run,
                    const std::map<std::string, Port>& ports,
                    const std::map<std::string, Operand>& operands) {
    Names symbols = size_symbols;
    for (const auto& [local, symbol] : run.dims)
        symbols.insert(local);
    for (const auto& [name, operand] : operands)
        require(ports.count(name) > 0, "graph '" + run.graph + "' run with its ports alone",
                shown(name));
    for (const auto& [name, port] : ports) {
        const std::string what = "'" + name + "' of graph '" + run.graph + "'";
        const auto operand = operands.find(name);
        require(operand != operands.end(), "an operand for " + what, "none");
        const Buffer& buffer = named(manifest.buffers, operand->second.buffer, "buffer");
        require(port.dtype == buffer.dtype, text_of(what, " to be ", name_of(port.dtype)),
                name_of(buffer.dtype));
        check_shape(what, port.shape, &symbols);
        check_start(what, operand->second, buffer);
        if (holds_slice(buffer))
            require(!run.chunk.empty() && has_symbol(port.shape, run.chunk) &&
                        operand->second.start.empty(),
                    what + " to be a slice, in '" + operand->second.buffer + "'",
                    text_of(port.shape));
        if (!run.chunk.empty() && has_symbol(port.shape, run.chunk))
            require(cut_first(port.shape, run.chunk), what + " to have " + run.chunk + " first",
                    text_of(port.shape));
    }
}

// Names, and everything that does not depend on sizes.
void check_run(const Manifest& manifest, const Run& run) {
    const Graph& graph = named(manifest.graphs, run.graph, "graph");
    require(reserved_symbols.count(run.chunk) == 0, "graph '" + run.graph + "' cut along a size",
            shown(run.chunk));
    for (const auto& [local, symbol] : run.dims)
        require(symbol != "B" && size_symbols.count(symbol) > 0 &&
                    reserved_symbols.count(local) == 0,
                "sizes for graph '" + run.graph + "'", shown(local + " = " + symbol));
    require(run.chunk.empty() || size_symbols.count(run.chunk) > 0 || run.dims.count(run.chunk) > 0,
            "graph '" + run.graph + "' cut along a size it has", shown(run.chunk));
    check_operands(manifest, run, graph.inputs, run.inputs);
    check_operands(manifest, run, graph.outputs, run.outputs);
    for (const auto& [name, operand] : run.outputs)
        written(manifest, operand.buffer);
    if (!run.chunk.empty())
        for (const auto& [name, port] : graph.outputs)
            require(has_symbol(port.shape, run.chunk),
                    "outputs of '" + run.graph + "' cut along " + run.chunk, shown(name));
}

void check_each(const Manifest& manifest, const Each& each) {
    require(each.axis != "B" && size_symbols.count(each.axis) > 0, "each slice of a size",
            shown(each.axis));
    require(!each.parts.empty(), "something to do for each slice of " + each.axis, "nothing");
    for (const auto& part : each.parts) {
        if (const auto* run = std::get_if<Run>(&part)) {
            require(run->dims.count(each.axis) == 0,
                    each.axis + " in '" + run->graph + "' as it is", "other");
            check_run(manifest, *run);
            continue;
        }
        const Copy& copy = std::get<Copy>(part);
        const Buffer& source = named(manifest.buffers, copy.source, "buffer");
        const Buffer& target = written(manifest, copy.target);
        const SymbolicShape shape = each.slice_of(source);
        require(source.dtype == target.dtype && shape == each.slice_of(target) &&
                    cut_first(shape, each.axis),
                "a copy of slices of '" + copy.source + "' to a buffer like it",
                shown(copy.target));
    }
}

void check_instruction(const Manifest& manifest, const std::string& section,
                       const Instruction& instruction) {
    if (const auto* copy = std::get_if<Copy>(&instruction)) {
        const Buffer& source = named(manifest.buffers, copy->source, "buffer");
        require(alike(source, written(manifest, copy->target)) && !holds_slice(source),
                "a copy of '" + copy->source + "' to a buffer like it", shown(copy->target));
    } else if (const auto* noise = std::get_if<Noise>(&instruction)) {
        require(section == "prologue" || section == "step", "noise in prologue or step", section);
        const Buffer& image = written(manifest, noise->image);
        const bool pixels = image.dtype == DType::float32 &&
                            image.shape == SymbolicShape{"B", std::uint64_t{3}, "H", "W"};
        require(pixels, "a noise image", shown(noise->image));
        require(alike(written(manifest, noise->target), manifest.buffers.at("state")),
                "noise of the state's shape", shown(noise->target));
        check_run(manifest, noise->patchify());
    } else if (const auto* each = std::get_if<Each>(&instruction)) {
        check_each(manifest, *each);
    } else {
        check_run(manifest, std::get<Run>(instruction));
    }
}

// Every operand lies in its buffer.
void check_extent(const Manifest& manifest, const Run& run, const Sizes& sizes) {
    const Graph& graph = manifest.graphs.at(run.graph);
    const Sizes local = sizes.extended(run.dims);
    Sizes cut = local;
    if (!run.chunk.empty())
        cut.set(run.chunk, std::min(local.value(run.chunk), sizes.value(chunk_symbol)));
    const auto check = [&](const std::map<std::string, Port>& ports,
                           const std::map<std::string, Operand>& operands) {
        for (const auto& [name, port] : ports) {
            const Operand& operand = operands.at(name);
            const Buffer& buffer = manifest.buffers.at(operand.buffer);
            const SymbolicShape& shape = buffer.shape;
            const std::uint64_t end = sum(sizes.index(shape, operand.start),
                                          (holds_slice(buffer) ? cut : local).count(port.shape));
            require(end <= sizes.count(shape),
                    text_of("'", name, "' of graph '", run.graph, "' inside buffer '",
                            operand.buffer, "'"),
                    text_of("its end at element ", end));
        }
    };
    check(graph.inputs, run.inputs);
    check(graph.outputs, run.outputs);
}

} // namespace

bool lies_in_arena(const Bucket& bucket, std::uint64_t offset, std::uint64_t bytes) {
    return offset % arena_alignment == 0 && sum(offset, bytes) <= bucket.arena_bytes;
}

void check_bucket(const Manifest& manifest, const std::string& name, const Bucket& bucket,
                  std::uint64_t scratch_bytes) {
    const std::string what = "bucket '" + name + "'";
    const std::uint64_t least = manifest.network.least_tokens();
    require(least <= bucket.max_tokens && bucket.max_tokens <= largest_size,
            text_of(what, " of ", least, " to ", largest_size, " tokens"), bucket.max_tokens);
    require(0 < bucket.chunk_tokens && bucket.chunk_tokens <= bucket.max_tokens,
            "chunk_tokens of " + what + " from 1 to max_tokens", bucket.chunk_tokens);
    require(bucket.arena_bytes <= largest_arena, "an arena of " + what + " of at most 1 TiB",
            bucket.arena_bytes);
    require(bucket.offsets.size() == manifest.buffers.size() &&
                std::all_of(
                    bucket.offsets.begin(), bucket.offsets.end(),
                    [&](const auto& offset) { return manifest.buffers.count(offset.first) > 0; }),
            "an offset of " + what + " for every buffer", "other names");
    // Byte counts are products of sizes: within the bucket they are largest at one of these two.
    const std::uint64_t rows = manifest.sampler.max_steps;
    std::array<Sizes, 2> largest{Sizes::of_column(manifest.network, rows, bucket.max_tokens),
                                 Sizes::of_row(manifest.network, rows, bucket.max_tokens)};
    for (Sizes& sizes : largest)
        sizes.set(chunk_symbol, bucket.chunk_tokens);
    std::uint64_t total = 0;
    for (const auto& [buffer_name, buffer] : manifest.buffers) {
        const std::uint64_t bytes = std::max(largest[0].bytes(buffer.dtype, buffer.shape),
                                             largest[1].bytes(buffer.dtype, buffer.shape));
        const std::uint64_t offset = bucket.offsets.at(buffer_name);
        require(lies_in_arena(bucket, offset, bytes),
                "buffer '" + buffer_name + "' aligned in the arena of " + what, offset);
        total = sum(total, (bytes + arena_alignment - 1) / arena_alignment * arena_alignment);
    }
    total = sum(total, scratch_bytes);
    require(bucket.arena_bytes <= total,
            text_of("an arena of ", what, " of ", total, " bytes or less"), bucket.arena_bytes);
    for (const auto& [section, instructions] : manifest.program) {
        for (const Instruction& instruction : instructions) {
            for (const Run& run : runs_of(instruction))
                for (const Sizes& sizes : largest)
                    check_extent(manifest, run, sizes);
        }
    }
}

void check_manifest(const Manifest& manifest) {
    check_files(manifest);
    check_network(manifest);
    check_sampler(manifest.sampler);
    for (const auto& [name, graph] : manifest.graphs) {
        for (const auto& [port_name, port] : graph.inputs)
            check_shape("'" + port_name + "' of graph '" + name + "'", port.shape, nullptr);
        for (const auto& [port_name, port] : graph.outputs) {
            require(graph.inputs.count(port_name) == 0,
                    "other outputs than inputs of graph '" + name + "'", shown(port_name));
            check_shape("'" + port_name + "' of graph '" + name + "'", port.shape, nullptr);
        }
    }
    check_program(manifest);
    require(!manifest.buckets.empty(), "a bucket", "none");
    for (const auto& [name, bucket] : manifest.buckets)
        check_bucket(manifest, name, bucket);
}

void check_program(const Manifest& manifest) {
    for (const auto& [name, buffer] : manifest.buffers)
        check_buffer(name, buffer);
    check_interface(manifest);
    for (const char* section : sections)
        named(manifest.program, section, "program section");
    require(manifest.program.size() == sections.size(), "just the five sections of a program",
            manifest.program.size());
    for (const auto& [section, instructions] : manifest.program) {
        const auto draws =
            std::count_if(instructions.begin(), instructions.end(), [](const Instruction& each) {
                return std::holds_alternative<Noise>(each);
            });
        require(draws <= 1, "at most one noise in " + section, draws);
        for (const Instruction& instruction : instructions)
            check_instruction(manifest, section, instruction);
    }
}

} // namespace pid::core
