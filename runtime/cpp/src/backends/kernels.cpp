#include "backends/kernels.h"

#include "backends/device.h"
#include "kernels_ptx.h"

namespace pid::core {
namespace {

constexpr std::uint64_t normals_per_thread = 4;

std::uint64_t address_of(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer);
}

// Launch a kernel with these arguments, each of exactly the type that the kernel has it in.
template <typename... Arguments>
void launch(const CudaDevice& device, void* kernel, std::uint64_t threads, Arguments... arguments) {
    void* all[] = {&arguments...};
    device.launch(kernel, threads, all);
}

} // namespace

Kernels::Kernels(const CudaDevice& device) : device_(device) {
    void* module = device.load_module(kernels_ptx);
    standard_normal_ = device.find_kernel(module, "pid_standard_normal");
    take_tile_ = device.find_kernel(module, "pid_take_tile");
    add_tile_ = device.find_kernel(module, "pid_add_tile");
    mix_ = device.find_kernel(module, "pid_mix");
}

void Kernels::fill_normal(const Tensor& tensor, std::uint64_t seed, std::uint32_t draw,
                          std::uint64_t start) const {
    const std::uint64_t count = count_of(tensor.shape);
    launch(device_, standard_normal_, (count + normals_per_thread - 1) / normals_per_thread,
           address_of(tensor.address), count, seed, draw, start);
}

void Kernels::take(const Tensor& state, const Tensor& tile, std::size_t row,
                   std::size_t column) const {
    const TokenLengths whole(state), part(tile);
    for (std::size_t image = 0; image < part.batch; ++image)
        launch(device_, take_tile_, part.image, address_of(row_of(state, image, 0)),
               address_of(row_of(tile, image, 0)), std::uint64_t{part.image},
               std::uint64_t{whole.row}, std::uint64_t{part.row}, std::uint64_t{row},
               std::uint64_t{column * part.token});
}

void Kernels::add(const Tensor& ring, const Tensor& tile, const Tensor& down, const Tensor& across,
                  std::size_t row, std::size_t column) const {
    const TokenLengths sums(ring), part(tile);
    for (std::size_t image = 0; image < part.batch; ++image)
        launch(device_, add_tile_, part.image, address_of(row_of(ring, image, 0)),
               address_of(row_of(tile, image, 0)), address_of(down.address),
               address_of(across.address), std::uint64_t{part.image}, std::uint64_t{sums.row},
               std::uint64_t{part.row}, std::uint64_t{row}, std::uint64_t{column * part.token},
               static_cast<std::uint32_t>(sums.rows), static_cast<std::uint32_t>(part.patch));
}

void Kernels::mix(const Tensor& state, const Tensor& ring, const Tensor* before,
                  const Tensor* noise, const std::array<float, 4>& factors, std::size_t row,
                  std::size_t rows) const {
    const TokenLengths whole(state), sums(ring);
    const auto [of_state, of_clean, of_before, of_noise] = factors;
    for (std::size_t image = 0; image < whole.batch; ++image)
        for (const RingPart& part : ring_parts(row, rows, sums.rows)) {
            const std::uint64_t count = part.count * whole.row;
            launch(device_, mix_, count, address_of(row_of(state, image, row + part.first)),
                   address_of(row_of(ring, image, part.at)),
                   before == nullptr ? 0 : address_of(row_of(*before, image, row + part.first)),
                   noise == nullptr ? 0 : address_of(row_of(*noise, image, part.first)), count,
                   of_state, of_clean, of_before, of_noise);
        }
}

} // namespace pid::core
