// Runs a fuzz target without libFuzzer: every file of a folder, and random mutations of them, the
// same in every run. Takes libFuzzer's arguments FOLDER, -runs=N and -max_total_time=SECONDS.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Bytes = std::vector<std::uint8_t>;
using Clock = std::chrono::steady_clock;

std::vector<Bytes> read_folder(const char* folder) {
    std::vector<std::filesystem::path> paths;
    for (const auto& entry : std::filesystem::directory_iterator(folder))
        paths.push_back(entry.path());
    std::sort(paths.begin(), paths.end());
    std::vector<Bytes> files;
    for (const auto& path : paths) {
        std::ifstream file(path, std::ios::binary);
        files.emplace_back((std::istreambuf_iterator<char>(file)),
                           std::istreambuf_iterator<char>());
    }
    return files;
}

// A few bytes changed, and a part deleted, repeated or taken from another file.
Bytes mutate(Bytes bytes, const std::vector<Bytes>& files, std::mt19937& random) {
    const auto below = [&](std::size_t end) { return end == 0 ? 0 : random() % end; };
    const auto at = [&](Bytes& of, std::size_t index) {
        return of.begin() + static_cast<std::ptrdiff_t>(index);
    };
    for (std::size_t change = 0; change <= below(4); ++change) {
        const std::size_t begin = below(bytes.size()), length = below(64);
        const std::size_t end = std::min(bytes.size(), begin + length);
        Bytes other = files[below(files.size())];
        const std::size_t from = below(other.size()), to = std::min(other.size(), from + length);
        switch (below(5)) {
        case 0:
            if (!bytes.empty())
                bytes[begin] = static_cast<std::uint8_t>(random());
            break;
        case 1: // digits, letters and brackets change meanings
            if (!bytes.empty())
                bytes[begin] = static_cast<std::uint8_t>("0123456789-.eE\"[]{}:,BLQ"[below(24)]);
            break;
        case 2:
            bytes.erase(at(bytes, begin), at(bytes, end));
            break;
        case 3:
            bytes.insert(at(bytes, begin), at(other, from), at(other, to));
            break;
        default: {
            const Bytes part(at(bytes, begin), at(bytes, end));
            bytes.insert(at(bytes, below(bytes.size())), part.begin(), part.end());
        }
        }
    }
    return bytes;
}

} // namespace

int main(int count, char** words) {
    std::vector<Bytes> files;
    unsigned long runs = 10000;
    std::chrono::seconds most(10);
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        if (word.rfind("-runs=", 0) == 0)
            runs = std::strtoul(words[i] + 6, nullptr, 10);
        else if (word.rfind("-max_total_time=", 0) == 0)
            most = std::chrono::seconds(std::strtol(words[i] + 16, nullptr, 10));
        else if (word[0] != '-')
            files = read_folder(words[i]);
    }
    if (files.empty()) {
        std::fprintf(stderr, "usage: fuzz_.. FOLDER [-runs=N] [-max_total_time=SECONDS]\n");
        return 2;
    }
    for (const Bytes& file : files)
        LLVMFuzzerTestOneInput(file.data(), file.size());
    std::mt19937 random(0);
    const auto begin = Clock::now();
    unsigned long run = 0;
    for (; run < runs && Clock::now() - begin < most; ++run) {
        const Bytes bytes = mutate(files[random() % files.size()], files, random);
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
    std::printf("Done %lu runs\n", run);
    return 0;
}
