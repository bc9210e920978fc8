// What Python wrote for tests to read.
#pragma once

#include <nlohmann/json.hpp>

#include "test_support.h"

namespace pid::test {

inline nlohmann::json read_json(const Path& path) {
    return nlohmann::json::parse(read_bytes(path));
}

} // namespace pid::test
