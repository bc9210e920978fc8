// Parts of a manifest as JSON has them. Refuses what is not such a part.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "bundle/json_reader.h"
#include "bundle/manifest.h"

namespace pid::core {

// What the manifest says of its decoder, `model`, but for its latents.
Model read_model(const Json& value, const std::string& where);

// A bucket of the manifest or of an engine set, but for what the latter adds. Not checked yet.
Bucket read_bucket(const Json& value, const std::string& where);

// Members `buffers` and `program` of the manifest or of an engine set. Not checked yet.
std::map<std::string, Buffer> read_buffers(const Json& value, const std::string& where);
std::map<std::string, std::vector<Instruction>> read_program(const Json& value,
                                                             const std::string& where);

// A table or constant. what: the buffer, for messages.
Table read_table(const Json& source, const std::string& what);
Constant read_constant(const Json& source, const std::string& what);

} // namespace pid::core
