#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

namespace pid::core {

std::size_t core_count() {
#ifdef __linux__
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof cores, &cores) == 0)
        return static_cast<std::size_t>(std::max(1, CPU_COUNT(&cores)));
#endif
    return std::max(1U, std::thread::hardware_concurrency());
}

void parallel_for(std::size_t count, std::size_t threads,
                  const std::function<void(std::size_t)>& work) {
    std::atomic<std::size_t> next{0};
    std::mutex mutex;
    std::exception_ptr thrown;
    const auto run = [&] {
        try {
            for (std::size_t index = next++; index < count; index = next++)
                work(index);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            thrown = std::current_exception();
            next = count;
        }
    };
    std::vector<std::thread> others;
    try {
        for (std::size_t thread = 1; thread < std::min(threads, count); ++thread)
            others.emplace_back(run);
    } catch (const std::system_error&) { // no more threads to be had: fewer do as well
    }
    run();
    for (std::thread& thread : others)
        thread.join();
    if (thrown)
        std::rethrow_exception(thrown);
}

} // namespace pid::core
