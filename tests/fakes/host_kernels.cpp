// The kernels for GPUs (KERNELS, the path of kernels.cu), run on the host: by
// tests/fakes/kernels.py, and by the fake driver of runtime/cpp/tests.
#include <cmath>
struct Dim {
    unsigned x;
};
static thread_local Dim blockIdx, blockDim, threadIdx;
#define __device__
#define __global__
static float __fmul_rn(float a, float b) {
    return a * b;
}
static float __fadd_rn(float a, float b) {
    return a + b;
}
using std::cos;
using std::log;
using std::sin;
using std::sqrt;
#include KERNELS

typedef unsigned long long Long;

// Every thread of a launch, one after another.
template <typename Kernel>
void run(unsigned blocks, unsigned threads, Kernel kernel) {
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
            kernel();
}

extern "C" void philox(unsigned* words, unsigned key0, unsigned key1) {
    philox_4x32_10(words, key0, key1);
}
extern "C" void run_pid_standard_normal(unsigned blocks, unsigned threads, float* out, Long count,
                                        Long seed, unsigned draw, Long start) {
    run(blocks, threads, [=] { pid_standard_normal(out, count, seed, draw, start); });
}
extern "C" void run_pid_take_tile(unsigned blocks, unsigned threads, float* state, float* tile,
                                  Long count, Long a, Long b, Long row, Long left) {
    run(blocks, threads, [=] { pid_take_tile(state, tile, count, a, b, row, left); });
}
extern "C" void run_pid_add_tile(unsigned blocks, unsigned threads, float* ring, float* tile,
                                 float* down, float* across, Long count, Long a, Long b, Long row,
                                 Long left, unsigned rows, unsigned patch) {
    run(blocks, threads,
        [=] { pid_add_tile(ring, tile, down, across, count, a, b, row, left, rows, patch); });
}
extern "C" void run_pid_mix(unsigned blocks, unsigned threads, float* state, float* clean,
                            float* before, float* noise, Long count, float of_state, float of_clean,
                            float of_before, float of_noise) {
    run(blocks, threads, [=] {
        pid_mix(state, clean, before, noise, count, of_state, of_clean, of_before, of_noise);
    });
}
