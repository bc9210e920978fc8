// ONNX Runtime in this process: its environment, the memory its sessions work in, and its errors.
#pragma once

#include <memory>
#include <string>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include "errors.h"

namespace pid::core {

// One for all bundles, with one arena for the scratch memory of all sessions. What the arena once
// had it keeps, so whoever stops decoding gives back what no run uses.
class OrtEnvironment {
public:
    // The one there is, or a new one. Refuses an ONNX Runtime that is too old.
    static std::shared_ptr<OrtEnvironment> shared();

    OrtEnvironment();

    Ort::Env& env() { return env_; }

    // For sessions: let them work in the arena.
    static void use_shared_arena(Ort::SessionOptions& options);

    // Return to the system what no run of any session uses now.
    void give_back() noexcept;

private:
    Ort::Env env_;
    Ort::Session copying_{nullptr}; // an arena shrinks at the end of a run only
};

// What ONNX Runtime says of memory that ran out, without its own files and functions.
std::string shortage_of(const std::string& message);

// What ONNX Runtime throws, as a failure of ours.
template <typename Function>
auto guarded(pid_status status, const std::string& what, Function function) {
    try {
        return function();
    } catch (const Ort::Exception& error) {
        if (says_memory_ran_out(error.what()))
            throw Shortage(shortage_of(error.what()));
        throw Failure(status, what + ": " + first_line(error.what()));
    }
}

} // namespace pid::core
