// What a decode does on a GPU by itself, on a GPU that is the host.
#include "backends/device.h"

#include "backends/backends.h"
#include "backends/kernels.h"
#include "bundle/folder.h"
#include "decoder.h"
#include "denoise.h"
#include "fake_cuda.h"
#include "interpreter.h"
#include "noise.h"
#include "test_support.h"

namespace {

using namespace pid::core;
using pid::test::numbers;

constexpr std::int64_t batch = 2, rows = 11, columns = 9, patch = 4, height = 5, width = 6;

class OnFakeGpu : public testing::Test {
protected:
    void SetUp() override { fake_gpu() = {}; }
};

struct Values {
    std::vector<float> values;
    Shape shape;

    Values(Shape wanted, float phase)
        : values(numbers(count_of(wanted), phase)), shape(std::move(wanted)) {}
    Tensor tensor() { return {reinterpret_cast<std::byte*>(values.data()), DType::float32, shape}; }
};

Shape tokens(std::int64_t down, std::int64_t across) {
    return {batch, down, across, patch, patch, 3};
}

TEST_F(OnFakeGpu, NormalsAreTheHosts) {
    const auto device = CudaDevice::open(0, nullptr);
    ASSERT_NE(device->kernels(), nullptr);
    Memory memory(device, 1);
    const Allocation block = memory.allocate(4 * 1003);
    const Tensor tensor{block.get(), DType::float32, {1003}};
    std::vector<float> found(1003), expected(1003);
    memory.fill_normal(tensor, 7, 3, std::uint64_t{1} << 33);
    memory.read(tensor, found.data(), PID_HOST);
    standard_normal(7, 3, std::uint64_t{1} << 33, 1003, expected.data(), 1);
    EXPECT_LE(pid::test::difference(found, expected), 1e-6F);
    EXPECT_EQ(fake_gpu().launches["pid_standard_normal"], 1);
}

// Kernels and the host do the same, to the bit.
TEST_F(OnFakeGpu, TilesAreBlendedAsOnTheHost) {
    const auto device = CudaDevice::open(0, nullptr);
    const HostBlending host;
    std::vector<std::vector<float>> found;
    for (const Blending* blending :
         {static_cast<const Blending*>(&host), static_cast<const Blending*>(device->kernels())}) {
        Values state(tokens(rows, columns), 0), tile(tokens(height, width), 1);
        Values ring(tokens(height, columns), 2), noise(tokens(4, columns), 3);
        Values before(tokens(rows, columns), 4);
        Values down({height, patch}, 5), across({width, patch}, 6);
        blending->add(ring.tensor(), tile.tensor(), down.tensor(), across.tensor(), 4, 3);
        blending->take(state.tensor(), tile.tensor(), 6, 3);
        const Tensor last = before.tensor(), fresh = noise.tensor();
        blending->mix(state.tensor(), ring.tensor(), &last, &fresh, {0.3F, 0.7F, -0.2F, 0.9F}, 3,
                      4);
        blending->mix(state.tensor(), ring.tensor(), nullptr, nullptr, {0.3F, 0.7F, 0, 0}, 7, 4);
        for (const Values* each : {&state, &tile, &ring, &before})
            found.push_back(each->values);
    }
    for (std::size_t each = 0; each < 4; ++each)
        EXPECT_EQ(found[each], found[each + 4]) << each;
    EXPECT_EQ(found[2], std::vector<float>(found[2].size(), 0)) << "rows that were mixed are free";
}

TEST_F(OnFakeGpu, WithoutKernelsTheHostMakesNoise) {
    fake_gpu().takes_kernels = false;
    Memory memory(CudaDevice::open(0, nullptr), 1);
    EXPECT_EQ(memory.blending(), nullptr);
    const Allocation block = memory.allocate(64);
    const Tensor tensor{block.get(), DType::float32, {16}};
    std::vector<float> found(16), expected(16);
    memory.fill_normal(tensor, 7, 3, 8);
    memory.read(tensor, found.data(), PID_HOST);
    standard_normal(7, 3, 8, 16, expected.data(), 1);
    EXPECT_EQ(found, expected);
    EXPECT_TRUE(fake_gpu().launches.empty());
}

class TilesOnFakeGpu : public pid::test::WithData {
protected:
    void SetUp() override {
        fake_gpu() = {};
        WithData::SetUp();
    }
};

// ONNX Runtime runs on the CPU, in the memory of the GPU that is the host.
TEST_F(TilesOnFakeGpu, OfAStateOnTheDeviceAreThoseOfOneOnTheHost) {
    BackendOptions options{};
    options.backend = "onnxruntime";
    options.device = "cpu";
    options.threads = 1;
    const pid::test::Path folder = pid::test::data_folder() / "any_times";
    const Manifest manifest = read_manifest(folder, false, 1);
    const auto loaded = load_graphs(folder, manifest, options);
    const Constants constants = read_constants(folder, manifest);
    const pid::test::GuidedInputs inputs;
    pid_decode_params params = inputs.params();
    params.tile_width = 96;
    params.tile_height = 96;
    params.overlap = 32;
    const Request request = check_request(manifest, params, false);
    ASSERT_TRUE(request.tiling);
    const Sizes sizes = request.program_sizes();
    const Bucket& bucket = manifest.bucket_for(sizes.value("L")).second;
    std::vector<std::vector<float>> images, states;
    const auto decode = [&](const std::shared_ptr<CudaDevice>& device, bool on_host) {
        Memory memory(device, 1);
        const auto graphs = loaded->graphs(memory, {});
        const Allocation arena = memory.allocate(Program::arena_bytes(bucket, sizes));
        Program program(manifest, memory, *graphs, bucket, sizes, arena, constants);
        Canvas canvas(program, request, on_host);
        canvas.denoise({[] {}, [] {}});
        EXPECT_TRUE(canvas.is_finite());
        canvas.read_image(images.emplace_back(2 * 3 * 160 * 192).data());
        canvas.read_state(states.emplace_back(2 * 3 * 160 * 192).data());
    };
    decode(nullptr, false);
    const auto device = CudaDevice::open(0, nullptr);
    decode(device, true);
    EXPECT_EQ(fake_gpu().launches.count("pid_mix"), 0U);
    decode(device, false);
    EXPECT_EQ(fake_gpu().launches["pid_add_tile"], 2 * request.calls());
    EXPECT_GT(fake_gpu().launches["pid_mix"], 0);
    EXPECT_EQ(images[0], images[1]);
    EXPECT_LE(pid::test::difference(images[0], images[2]), 1e-4F); // its noise is the kernel's
    EXPECT_LE(pid::test::difference(states[0], states[2]), 1e-4F);
}

} // namespace
