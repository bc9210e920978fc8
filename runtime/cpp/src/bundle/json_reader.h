// JSON members of the types they should have; anything else is refused in one line.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

namespace pid::core {

using Json = nlohmann::json;

// No integer of a manifest is larger, so that any JSON reader gets it exactly.
constexpr std::uint64_t largest_integer = (std::uint64_t{1} << 53U) - 1;

// JSON text as a value, nested at most as deep as any bundle's. Refuses other text.
// what: the file, for the message.
Json parse_json(std::string_view text, const std::string& what);

// Names of the members of an object that is a member of JSON text, in the order of the text, which
// `Json` does not keep. The text has been parsed before.
std::vector<std::string> member_names(std::string_view text, const char* object);

// A value as short text for a message.
std::string shown(const Json& value);
// Text in quotes, cut.
std::string shown(const std::string& text);
// A number as Python writes it, such as 1.0.
std::string shown(double number);

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
