// JSON members of the types they should have; anything else is refused in one line.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "errors.h"

namespace pid::core {

using Json = nlohmann::json;
using NameListener = std::function<void(int, const std::string&)>;

// No integer of a manifest is larger, so that any JSON reader gets it exactly.
constexpr std::uint64_t largest_integer = (std::uint64_t{1} << 53U) - 1;

// JSON text as a value, nested at most as deep as any bundle's. Refuses other text.
// what: the file, for the message.
// on_name: told every member's depth, from 1, and name, in the order of the text, which `Json` does
// not keep (one that does looks members up one after another, which takes minutes in a file of
// nothing else).
Json parse_json(std::string_view text, const std::string& what, const NameListener& on_name = {});

// A value as short text for a message.
std::string shown(const Json& value);

// where: what is being read, for the message.
const Json& member(const Json& object, const char* name, const std::string& where);
const Json& object(const Json& value, const std::string& where);
const Json& list(const Json& value, const std::string& where);
std::uint64_t integer(const Json& value, const std::string& where);
double number(const Json& value, const std::string& where);
std::string text(const Json& value, const std::string& where);

// Whether a file, graph, port or buffer may be called so: never a path.
bool is_plain_name(const std::string& name);
// `name`, or a refusal.
const std::string& plain_name(const std::string& name, const std::string& where);

} // namespace pid::core
