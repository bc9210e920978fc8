// What the tests share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "pid/pid_runtime.h"

namespace pid::test {

using Path = std::filesystem::path;

// Where tests/cpp put manifests, tables and bundles; "" when it does not run this.
Path data_folder();

std::string read_bytes(const Path& path);
void write_bytes(const Path& path, const std::string& bytes);

// A folder that is removed with all that is in it.
class Folder {
public:
    Folder();
    ~Folder();
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;

    const Path& path() const { return path_; }
    // A copy of a bundle of the data folder, with an absolute path.
    Path copy_of(const std::string& bundle) const;

private:
    Path path_;
};

// A complaint as users should meet it: one line that says something.
void expect_one_line(const std::string& message);

// Numbers of order 1 that are the same everywhere.
inline std::vector<float> numbers(std::size_t count, float phase) {
    std::vector<float> values(count);
    for (std::size_t i = 0; i < count; ++i)
        values[i] = std::sin(static_cast<float>(i) * 0.7F + phase);
    return values;
}

inline float difference(const std::vector<float>& a, const std::vector<float>& b) {
    float largest = a.size() == b.size() ? 0 : INFINITY;
    for (std::size_t i = 0; i < a.size() && i < b.size(); ++i)
        largest = std::max(largest, std::abs(a[i] - b[i]));
    return largest;
}

// Inputs of a decode with guidance, of two images of 160 x 192 pixels, for the bundle "any_times".
struct GuidedInputs {
    std::vector<float> latent = numbers(2 * 16 * 5 * 6, 1), caption = numbers(2 * 12 * 32, 2),
                       negative = numbers(12 * 32, 3);
    std::vector<double> times{0.97, 0.7, 0.3, 0};

    // Refers to these.
    pid_decode_params params() const {
        pid_decode_params given = pid_decode_default_params();
        given.latent = {latent.data(), PID_FLOAT32, PID_HOST, 4, {2, 16, 5, 6}};
        given.caption = {caption.data(), PID_FLOAT32, PID_HOST, 3, {2, 12, 32}};
        given.negative = {negative.data(), PID_FLOAT32, PID_HOST, 3, {1, 12, 32}};
        given.times = times.data();
        given.time_count = 4;
        given.guidance = 3;
        return given;
    }
};

// A test of what Python wrote; skipped when it wrote nothing.
class WithData : public testing::Test {
protected:
    void SetUp() override;
};

} // namespace pid::test
