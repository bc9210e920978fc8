#include "errors.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <iomanip>

namespace pid::core {
namespace {

constexpr std::size_t most_shown = 80;

// Not a std::string: it must be there when there is no memory left.
constexpr std::size_t longest_message = 2048;
thread_local char message_of_thread[longest_message] = "";

} // namespace

bool says_memory_ran_out(const std::string& message) {
    std::string lower = message;
    std::transform(lower.begin(), lower.end(), lower.begin(), [](char c) {
        return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    });
    static constexpr std::array words{"out of memory", "out_of_memory", "allocate memory",
                                      "bad_alloc", "bad allocation"};
    return std::any_of(words.begin(), words.end(),
                       [&](const char* each) { return lower.find(each) != std::string::npos; });
}

std::string cut(std::string text) {
    if (text.size() > most_shown) {
        std::size_t length = most_shown;
        while (length > 0 && (static_cast<unsigned char>(text[length]) & 0xC0U) == 0x80U)
            --length; // no half character of UTF-8 at the end
        text.resize(length);
    }
    std::replace_if(
        text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20; }, ' ');
    return text;
}

std::string shown(const std::string& text) {
    return "'" + cut(text) + "'";
}

std::string shown(double number) {
    if (!std::isfinite(number))
        return std::isnan(number) ? "nan" : number > 0 ? "inf" : "-inf";
    const double size = std::abs(number);
    const bool plain = size == 0 || (1e-4 <= size && size < 1e16);
    std::array<char, 32> digits{};
    const auto format = plain ? std::chars_format::fixed : std::chars_format::scientific;
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), number, format);
    const std::string text(digits.data(), end.ptr);
    return plain && text.find('.') == std::string::npos ? text + ".0" : text;
}

std::string gigabytes(std::uint64_t bytes) {
    std::ostringstream text;
    text.imbue(std::locale::classic());
    text << std::fixed << std::setprecision(2) << static_cast<double>(bytes) / 1e9 << " GB";
    return text.str();
}

std::string first_line(const std::string& text) {
    return text.substr(0, text.find('\n'));
}

void set_last_error(const std::string& message) noexcept {
    std::size_t length = std::min(message.size(), longest_message - 1);
    // A cut must not leave half a character of UTF-8.
    while (length < message.size() && length > 0 &&
           (static_cast<unsigned char>(message[length]) & 0xC0U) == 0x80U)
        --length;
    message.copy(message_of_thread, length);
    message_of_thread[length] = '\0';
}

const char* last_error() noexcept {
    return message_of_thread;
}

} // namespace pid::core
