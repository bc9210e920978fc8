#include "bundle/json_reader.h"

#include <algorithm>
#include <cmath>

#include "errors.h"

namespace pid::core {
namespace {

constexpr int deepest = 32;
constexpr std::size_t longest_name = 128;

bool is_name_character(char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '.' || c == '-';
}

[[noreturn]] void refuse_type(const char* wanted, const std::string& where, const Json& value) {
    refuse("expected ", wanted, " in ", where, ", but got ", shown(value));
}

} // namespace

Json parse_json(std::string_view text, const std::string& what, const NameListener& on_name) {
    const auto callback = [&](int depth, Json::parse_event_t event, const Json& value) {
        if (depth > deepest)
            refuse("expected ", what, " to be JSON, but got values nested more than ", deepest,
                   " deep");
        if (on_name && event == Json::parse_event_t::key)
            on_name(depth, value.get_ref<const std::string&>());
        return true;
    };
    try {
        return Json::parse(text.begin(), text.end(), callback);
    } catch (const Json::exception& error) {
        refuse("expected ", what, " to be JSON, but got ", cut(first_line(error.what())));
    }
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
