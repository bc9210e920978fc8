// A driver whose GPU is the host: libcuda.so.1 for tests. Its stream does everything at once, and
// its kernels are ours, compiled for the host.
#include "fake_cuda.h"

#include <cstdint>
#include <cstring>
#include <map>
#include <new>
#include <string>

#include "host_kernels.cpp"

namespace {

constexpr int success = 0, out_of_memory = 2, unsupported_ptx = 222;

std::map<std::uint64_t, std::size_t> allocations;

template <typename Value>
Value value_of(void** arguments, int index) {
    return *static_cast<Value*>(arguments[index]);
}

void* at(std::uint64_t address) {
    return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
}

} // namespace

FakeGpu& fake_gpu() {
    static FakeGpu gpu;
    return gpu;
}

extern "C" {

int cuInit(unsigned) {
    return success;
}

int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? success : 101;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 75 ? 8 : 9;
    return success;
}

int cuGetErrorName(int error, const char** name) {
    *name = error == out_of_memory ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_UNKNOWN";
    return success;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
    *context = &fake_gpu();
    return success;
}

int cuDevicePrimaryCtxRelease_v2(int) {
    return success;
}

int cuCtxSetCurrent(void* context) {
    return context == &fake_gpu() ? success : 201;
}

int cuStreamCreate(void** stream, unsigned) {
    *stream = &fake_gpu();
    return success;
}

int cuStreamDestroy_v2(void*) {
    return success;
}

int cuStreamSynchronize(void*) {
    return success;
}

int cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
    *free = *total = fake_gpu().free_bytes;
    return success;
}

int cuMemAlloc_v2(std::uint64_t* address, std::size_t bytes) {
    if (bytes > fake_gpu().free_bytes)
        return out_of_memory;
    void* memory = ::operator new(bytes, std::align_val_t{256});
    std::memset(memory, 0xFF, bytes); // NaN for whoever reads what nobody wrote
    *address = reinterpret_cast<std::uintptr_t>(memory);
    allocations[*address] = bytes;
    fake_gpu().free_bytes -= bytes;
    return success;
}

int cuMemFree_v2(std::uint64_t address) {
    fake_gpu().free_bytes += allocations.at(address);
    allocations.erase(address);
    ::operator delete(at(address), std::align_val_t{256});
    return success;
}

int cuMemcpyHtoDAsync_v2(std::uint64_t to, const void* from, std::size_t bytes, void*) {
    std::memcpy(at(to), from, bytes);
    return success;
}

int cuMemcpyDtoHAsync_v2(void* to, std::uint64_t from, std::size_t bytes, void*) {
    std::memcpy(to, at(from), bytes);
    return success;
}

int cuMemcpyDtoDAsync_v2(std::uint64_t to, std::uint64_t from, std::size_t bytes, void*) {
    std::memcpy(at(to), at(from), bytes);
    return success;
}

int cuMemsetD8Async(std::uint64_t to, unsigned char value, std::size_t bytes, void*) {
    std::memset(at(to), value, bytes);
    return success;
}

// Nothing is recorded here.
int cuStreamBeginCapture_v2(void*, int) {
    return 900;
}

int cuStreamEndCapture(void*, void**) {
    return 900;
}

int cuGraphInstantiateWithFlags(void**, void*, unsigned long long) {
    return 900;
}

int cuGraphLaunch(void*, void*) {
    return 900;
}

int cuGraphDestroy(void*) {
    return success;
}

int cuGraphExecDestroy(void*) {
    return success;
}

int cuModuleLoadData(void** module, const void* ptx) {
    if (!fake_gpu().takes_kernels)
        return unsupported_ptx;
    if (std::strstr(static_cast<const char*>(ptx), ".entry pid_mix(") == nullptr)
        return 218;
    *module = &fake_gpu();
    return success;
}

int cuModuleUnload(void*) {
    return success;
}

int cuModuleGetFunction(void** function, void*, const char* name) {
    static std::map<std::string, std::string> names;
    *function = &names.emplace(name, name).first->second;
    return success;
}

int cuLaunchKernel(void* function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned,
                   unsigned, unsigned, void*, void** p, void**) {
    const std::string& name = *static_cast<std::string*>(function);
    const auto floats = [p](int index) {
        return static_cast<float*>(at(value_of<std::uint64_t>(p, index)));
    };
    const auto number = [p](int index) { return value_of<std::uint64_t>(p, index); };
    const auto word = [p](int index) { return value_of<std::uint32_t>(p, index); };
    const auto factor = [p](int index) { return value_of<float>(p, index); };
    if (name == "pid_standard_normal")
        run_pid_standard_normal(blocks, threads, floats(0), number(1), number(2), word(3),
                                number(4));
    else if (name == "pid_take_tile")
        run_pid_take_tile(blocks, threads, floats(0), floats(1), number(2), number(3), number(4),
                          number(5), number(6));
    else if (name == "pid_add_tile")
        run_pid_add_tile(blocks, threads, floats(0), floats(1), floats(2), floats(3), number(4),
                         number(5), number(6), number(7), number(8), word(9), word(10));
    else if (name == "pid_mix")
        run_pid_mix(blocks, threads, floats(0), floats(1), floats(2), floats(3), number(4),
                    factor(5), factor(6), factor(7), factor(8));
    else
        return 500;
    ++fake_gpu().launches[name];
    return success;
}

} // extern "C"
