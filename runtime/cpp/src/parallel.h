// Work spread over the processor's cores.
#pragma once

#include <cstddef>
#include <functional>

namespace pid::core {

// Cores this process may run on.
std::size_t core_count();

// Call `work` with 0, 1, .. count - 1, on at most `threads` threads; throws what `work` throws.
void parallel_for(std::size_t count, std::size_t threads,
                  const std::function<void(std::size_t)>& work);

} // namespace pid::core
