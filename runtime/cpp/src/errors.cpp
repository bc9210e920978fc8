#include "errors.h"

#include <algorithm>
#include <cstddef>
#include <iomanip>

namespace pid::core {
namespace {

// Not a std::string: it must be there when there is no memory left.
constexpr std::size_t longest_message = 2048;
thread_local char message_of_thread[longest_message] = "";

} // namespace

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
