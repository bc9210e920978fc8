#include "backends/device.h"

#include "backends/kernels.h"
#include "errors.h"

#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace pid::core {

// Declared here as cuda.h has them, of which the versions after a `_v2` are the current ones.
struct CudaFunctions {
    int (*init)(unsigned);
    int (*device_get)(int*, int);
    int (*device_attribute)(int*, int, int);
    int (*error_name)(int, const char**);
    int (*context_retain)(void**, int);
    int (*context_release)(int);
    int (*context_set)(void*);
    int (*stream_create)(void**, unsigned);
    int (*stream_destroy)(void*);
    int (*stream_synchronize)(void*);
    int (*memory_info)(std::size_t*, std::size_t*);
    int (*allocate)(std::uint64_t*, std::size_t);
    int (*release)(std::uint64_t);
    int (*to_device)(std::uint64_t, const void*, std::size_t, void*);
    int (*to_host)(void*, std::uint64_t, std::size_t, void*);
    int (*on_device)(std::uint64_t, std::uint64_t, std::size_t, void*);
    int (*fill)(std::uint64_t, unsigned char, std::size_t, void*);
    int (*capture_begin)(void*, int);
    int (*capture_end)(void*, void**);
    int (*graph_instantiate)(void**, void*, unsigned long long);
    int (*graph_launch)(void*, void*);
    int (*graph_destroy)(void*);
    int (*graph_exec_destroy)(void*);
    int (*module_load)(void**, const void*);
    int (*module_unload)(void*);
    int (*module_function)(void**, void*, const char*);
    int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                  void*, void**, void**);
};

namespace {

constexpr int out_of_memory = 2;
constexpr int capability_major = 75;
constexpr int capability_minor = 76;
constexpr unsigned non_blocking = 1;
constexpr int thread_local_capture = 1;
constexpr unsigned threads_per_block = 256;

using Symbol = void (*)();

#ifdef _WIN32

Symbol look_up(const char* name) {
    static const HMODULE library = LoadLibraryA("nvcuda.dll");
    return library ? reinterpret_cast<Symbol>(GetProcAddress(library, name)) : nullptr;
}

#else

Symbol look_up(const char* name) {
    static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    return library != nullptr ? reinterpret_cast<Symbol>(dlsym(library, name)) : nullptr;
}

#endif

template <typename Function>
bool load(Function*& function, const char* name) {
    function = reinterpret_cast<Function*>(look_up(name));
    return function != nullptr;
}

// The driver, or nullptr when there is none of at least CUDA 12.
const CudaFunctions* driver() {
    static CudaFunctions f{};
    static const bool there =
        load(f.init, "cuInit") && load(f.device_get, "cuDeviceGet") &&
        load(f.device_attribute, "cuDeviceGetAttribute") && load(f.error_name, "cuGetErrorName") &&
        load(f.context_retain, "cuDevicePrimaryCtxRetain") &&
        load(f.context_release, "cuDevicePrimaryCtxRelease_v2") &&
        load(f.context_set, "cuCtxSetCurrent") && load(f.stream_create, "cuStreamCreate") &&
        load(f.stream_destroy, "cuStreamDestroy_v2") &&
        load(f.stream_synchronize, "cuStreamSynchronize") && load(f.allocate, "cuMemAlloc_v2") &&
        load(f.memory_info, "cuMemGetInfo_v2") && load(f.release, "cuMemFree_v2") &&
        load(f.to_device, "cuMemcpyHtoDAsync_v2") && load(f.to_host, "cuMemcpyDtoHAsync_v2") &&
        load(f.on_device, "cuMemcpyDtoDAsync_v2") && load(f.fill, "cuMemsetD8Async") &&
        load(f.capture_begin, "cuStreamBeginCapture_v2") &&
        load(f.capture_end, "cuStreamEndCapture") &&
        load(f.graph_instantiate, "cuGraphInstantiateWithFlags") &&
        load(f.graph_launch, "cuGraphLaunch") && load(f.graph_destroy, "cuGraphDestroy") &&
        load(f.graph_exec_destroy, "cuGraphExecDestroy") &&
        load(f.module_load, "cuModuleLoadData") && load(f.module_unload, "cuModuleUnload") &&
        load(f.module_function, "cuModuleGetFunction") && load(f.launch, "cuLaunchKernel") &&
        f.init(0) == 0;
    return there ? &f : nullptr;
}

std::uint64_t address(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer);
}

} // namespace

std::shared_ptr<CudaDevice> CudaDevice::open(int ordinal, void* stream) {
    const CudaFunctions* cuda = driver();
    if (cuda == nullptr)
        refuse("expected an NVIDIA driver and GPU for this backend, but found none; ",
               "use device cpu, or install the driver");
    int device = 0;
    if (cuda->device_get(&device, ordinal) != 0)
        refuse("expected a GPU, but cuda:", ordinal, " is none; nvidia-smi lists those there are");
    return std::shared_ptr<CudaDevice>(new CudaDevice(*cuda, ordinal, stream));
}

CudaDevice::CudaDevice(const CudaFunctions& functions, int ordinal, void* stream)
    : cuda_(functions), ordinal_(ordinal), stream_(stream) {
    check(cuda_.device_get(&device_, ordinal), "find the GPU");
    check(cuda_.context_retain(&context_, device_), "start the GPU");
    if (stream_ != nullptr)
        return;
    try {
        make_current();
        check(cuda_.stream_create(&stream_, non_blocking), "make a stream");
        owns_stream_ = true;
    } catch (...) {
        cuda_.context_release(device_);
        throw;
    }
}

CudaDevice::~CudaDevice() {
    // Nothing can be done about what fails here.
    cuda_.context_set(context_);
    for (void* module : modules_)
        cuda_.module_unload(module);
    if (owns_stream_)
        cuda_.stream_destroy(stream_);
    cuda_.context_release(device_);
}

std::string CudaDevice::architecture() const {
    int major = 0, minor = 0;
    check(cuda_.device_attribute(&major, capability_major, device_), "ask for the architecture");
    check(cuda_.device_attribute(&minor, capability_minor, device_), "ask for the architecture");
    return "sm" + std::to_string(major) + std::to_string(minor);
}

void CudaDevice::make_current() const {
    check(cuda_.context_set(context_), "use the GPU");
}

std::size_t CudaDevice::free_bytes() const {
    make_current();
    std::size_t free = 0, total = 0;
    check(cuda_.memory_info(&free, &total), "tell its free memory");
    return free;
}

Allocation CudaDevice::allocate(std::size_t bytes) {
    make_current();
    std::uint64_t memory = 0;
    check(cuda_.allocate(&memory, bytes), "allocate memory");
    auto* at = reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(memory));
    return Allocation(at, [device = shared_from_this()](std::byte* held) {
        device->cuda_.context_set(device->context_);
        device->cuda_.release(address(held));
    });
}

void CudaDevice::copy_to_device(void* target, const void* source, std::size_t bytes) const {
    make_current();
    check(cuda_.to_device(address(target), source, bytes, stream_), "copy to the GPU");
    synchronize();
}

void CudaDevice::copy_to_host(void* target, const void* source, std::size_t bytes) const {
    make_current();
    check(cuda_.to_host(target, address(source), bytes, stream_), "copy from the GPU");
    synchronize();
}

void CudaDevice::copy_on_device(void* target, const void* source, std::size_t bytes) const {
    make_current();
    check(cuda_.on_device(address(target), address(source), bytes, stream_), "copy on the GPU");
}

void CudaDevice::fill_zero(void* target, std::size_t bytes) const {
    make_current();
    check(cuda_.fill(address(target), 0, bytes, stream_), "fill memory");
}

void CudaDevice::synchronize() const {
    make_current();
    check(cuda_.stream_synchronize(stream_), "wait for the GPU");
}

const Kernels* CudaDevice::kernels() const {
    std::call_once(loaded_, [this] {
        try {
            kernels_ = std::make_unique<Kernels>(*this);
        } catch (const Failure&) { // the host does their work
        }
    });
    return kernels_.get();
}

void* CudaDevice::load_module(const char* ptx) const {
    make_current();
    void* module = nullptr;
    check(cuda_.module_load(&module, ptx), "take our kernels");
    modules_.push_back(module);
    return module;
}

void* CudaDevice::find_kernel(void* module, const char* name) const {
    void* kernel = nullptr;
    check(cuda_.module_function(&kernel, module, name), "find a kernel");
    return kernel;
}

void CudaDevice::launch(void* kernel, std::uint64_t threads, void** arguments) const {
    make_current();
    const auto blocks =
        static_cast<unsigned>((threads + threads_per_block - 1) / threads_per_block);
    check(
        cuda_.launch(kernel, blocks, 1, 1, threads_per_block, 1, 1, 0, stream_, arguments, nullptr),
        "launch a kernel");
}

std::function<void()> CudaDevice::capture(const std::function<void()>& work) {
    make_current();
    void* graph = nullptr;
    check(cuda_.capture_begin(stream_, thread_local_capture), "record a graph");
    try {
        work();
    } catch (...) {
        cuda_.capture_end(stream_, &graph);
        cuda_.graph_destroy(graph);
        throw;
    }
    check(cuda_.capture_end(stream_, &graph), "record a graph");
    void* executable = nullptr;
    const int result = cuda_.graph_instantiate(&executable, graph, 0);
    cuda_.graph_destroy(graph);
    check(result, "prepare a graph");
    const std::shared_ptr<void> held(executable, [device = shared_from_this()](void* each) {
        device->cuda_.context_set(device->context_);
        device->cuda_.graph_exec_destroy(each);
    });
    return [this, held] {
        make_current();
        check(cuda_.graph_launch(held.get(), stream_), "launch a graph");
    };
}

void CudaDevice::check(int result, const char* what) const {
    if (result == 0)
        return;
    const char* name = nullptr;
    if (cuda_.error_name(result, &name) != 0 || name == nullptr)
        name = "an unknown error";
    if (result == out_of_memory)
        throw Shortage(text_of("too little (", name, " on cuda:", ordinal_, ")"));
    throw Failure(PID_ERROR_BACKEND,
                  text_of("expected cuda:", ordinal_, " to ", what, ", but got ", name));
}

} // namespace pid::core
