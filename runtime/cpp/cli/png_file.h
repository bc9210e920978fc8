// Images as PNG files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace pid::cli {

// Refuse a path that no image may be written to: it must end in .png, in a folder that is there
// and writable. To be called before minutes of work.
void check_image_path(const std::filesystem::path& path);

// Texts of a PNG file, by keyword; UTF-8.
using PngTexts = std::vector<std::pair<std::string, std::string>>;

// Write pixels [height, width, 3], 8-bit RGB, and texts. An existing file is replaced. The file
// appears whole or not at all. Refuses when writing fails (no space on the disk).
void save_png(const std::filesystem::path& path, const std::uint8_t* pixels, std::size_t height,
              std::size_t width, const PngTexts& texts);

} // namespace pid::cli
