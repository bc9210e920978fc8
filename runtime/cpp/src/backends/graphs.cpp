#include "backends/graphs.h"

#include <utility>

#include "errors.h"

namespace pid::core {

void Graphs::prepare(const std::vector<PlannedCall>&, std::uint64_t, std::uint64_t) {}

Call Graphs::sequence(std::vector<Call> calls) {
    return [this, calls = std::move(calls)] {
        for (const Call& call : calls) {
            throw_if_cancelled();
            call();
        }
    };
}

void Graphs::throw_if_cancelled() const {
    if (cancelled)
        throw Failure(PID_ERROR_CANCELLED, "expected a decode to run to its end, but it was "
                                           "cancelled");
}

} // namespace pid::core
