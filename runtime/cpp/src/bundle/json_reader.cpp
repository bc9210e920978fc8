#include "bundle/json_reader.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "errors.h"

namespace pid::core {
namespace {

constexpr int deepest = 32;
constexpr std::size_t most_shown = 80;
constexpr std::size_t longest_name = 128;

bool is_name_character(char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '.' || c == '-';
}

// Cut, without half a character of UTF-8 at the end, and without line ends.
std::string cut(std::string value) {
    if (value.size() > most_shown) {
        std::size_t length = most_shown;
        while (length > 0 && (static_cast<unsigned char>(value[length]) & 0xC0U) == 0x80U)
            --length;
        value.resize(length);
    }
    std::replace_if(
        value.begin(), value.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20; },
        ' ');
    return value;
}

[[noreturn]] void refuse_type(const char* wanted, const std::string& where, const Json& value) {
    refuse("expected ", wanted, " in ", where, ", but got ", shown(value));
}

} // namespace

Json parse_json(std::string_view text, const std::string& what) {
    const Json::parser_callback_t callback = [&](int depth, Json::parse_event_t, Json&) {
        if (depth > deepest)
            refuse("expected ", what, " to be JSON, but got values nested more than ", deepest,
                   " deep");
        return true;
    };
    try {
        return Json::parse(text.begin(), text.end(), callback);
    } catch (const Json::exception& error) {
        refuse("expected ", what, " to be JSON, but got ", cut(first_line(error.what())));
    }
}

std::vector<std::string> member_names(std::string_view text, const char* object) {
    std::vector<std::string> names;
    std::set<std::string> known; // of two members of one name, the first has the place
    bool inside = false;
    const auto callback = [&](int depth, Json::parse_event_t event, Json& value) {
        if (event != Json::parse_event_t::key)
            return true;
        if (depth == 1) {
            inside = value == object;
            if (inside) { // of two objects, the last one counts
                names.clear();
                known.clear();
            }
        } else if (depth == 2 && inside && known.insert(value.get<std::string>()).second) {
            names.push_back(value.get<std::string>());
        }
        return depth == 1; // nothing below is kept
    };
    [[maybe_unused]] const Json rest = Json::parse(text.begin(), text.end(), callback);
    return names;
}

std::string shown(const Json& value) {
    // What is shown is cut anyway: do not write out megabytes first.
    if (value.is_object())
        return value.empty() ? "{}" : "an object with the member " + shown(value.begin().key());
    if (value.is_array())
        return value.empty() ? "[]" : "a list of " + std::to_string(value.size());
    if (value.is_string())
        return shown(value.get_ref<const std::string&>());
    return value.is_null() ? "null" : value.dump();
}

std::string shown(const std::string& text) {
    return "'" + cut(text) + "'";
}

std::string shown(double number) {
    if (!std::isfinite(number))
        return std::isnan(number) ? "nan" : number > 0 ? "inf" : "-inf";
    return Json(number).dump();
}

const Json& member(const Json& object, const char* name, const std::string& where) {
    const auto found = object.find(name);
    if (found == object.end())
        refuse("expected a member '", name, "' in ", where, ", but it is absent");
    return *found;
}

const Json& object(const Json& value, const std::string& where) {
    if (!value.is_object())
        refuse_type("an object", where, value);
    return value;
}

const Json& list(const Json& value, const std::string& where) {
    if (!value.is_array())
        refuse_type("a list", where, value);
    return value;
}

std::uint64_t integer(const Json& value, const std::string& where) {
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() > largest_integer)
        refuse_type("an integer of at least 0", where, value);
    return value.get<std::uint64_t>();
}

double number(const Json& value, const std::string& where) {
    if (!value.is_number() ||
        !(std::abs(value.get<double>()) <= static_cast<double>(largest_integer)))
        refuse_type("a number", where, value);
    return value.get<double>();
}

std::string text(const Json& value, const std::string& where) {
    if (!value.is_string())
        refuse_type("a string", where, value);
    return value.get<std::string>();
}

bool is_plain_name(const std::string& name) {
    return !name.empty() && name.size() <= longest_name && name[0] != '.' && name[0] != '-' &&
           std::all_of(name.begin(), name.end(), is_name_character);
}

const std::string& plain_name(const std::string& name, const std::string& where) {
    if (!is_plain_name(name))
        refuse("expected a plain name in ", where, ", but got ", shown(name));
    return name;
}

} // namespace pid::core
