// What this library tells whoever embeds it, beside results and errors.
#pragma once

#include <functional>
#include <string>

#include "errors.h"
#include "pid/pid_runtime.h"

namespace pid::core {

// Empty when nobody listens.
using Log = std::function<void(pid_log_level, const std::string&)>;

template <typename... Parts>
void note(const Log& log, const Parts&... parts) {
    if (log)
        log(PID_LOG_INFO, text_of(parts...));
}

} // namespace pid::core
