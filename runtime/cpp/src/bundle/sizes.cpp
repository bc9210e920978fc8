#include "bundle/sizes.h"

#include <algorithm>

namespace pid::core {

std::size_t count_of(const Shape& shape) {
    std::size_t count = 1;
    for (const std::int64_t size : shape)
        count *= static_cast<std::size_t>(size);
    return count;
}

std::string text_of_shape(const Shape& shape) {
    std::string text = "[";
    for (const std::int64_t size : shape)
        text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

std::string text_of(const SymbolicShape& shape) {
    std::string text = "[";
    for (const Size& size : shape) {
        if (text.size() > 1)
            text += ", ";
        if (const auto* symbol = std::get_if<std::string>(&size))
            text += '"' + *symbol + '"';
        else
            text += std::to_string(std::get<std::uint64_t>(size));
    }
    return text + "]";
}

bool has_symbol(const SymbolicShape& shape, const std::string& symbol) {
    return std::find(shape.begin(), shape.end(), Size(symbol)) != shape.end();
}

std::uint64_t product(std::uint64_t a, std::uint64_t b) {
    return b != 0 && a > too_much / b ? too_much : a * b;
}

std::uint64_t sum(std::uint64_t a, std::uint64_t b) {
    return a > too_much || b > too_much ? too_much : std::min(a + b, too_much);
}

Sizes Sizes::of_request(const Network& network, std::uint64_t batch, std::uint64_t latent_height,
                        std::uint64_t latent_width, std::uint64_t text_tokens, std::uint64_t rows) {
    const std::uint64_t p = network.patch_size;
    const std::uint64_t hs = product(latent_height, network.tokens_per_latent);
    const std::uint64_t ws = product(latent_width, network.tokens_per_latent);
    const std::uint64_t tokens = product(hs, ws);
    Sizes sizes;
    sizes.values_ = {{"B", batch},
                     {"T", text_tokens},
                     {"h", latent_height},
                     {"w", latent_width},
                     {"Hs", hs},
                     {"Ws", ws},
                     {"H", product(hs, p)},
                     {"W", product(ws, p)},
                     {"L", tokens},
                     {"S", sum(text_tokens, tokens)},
                     {"N", rows},
                     {"row", 0},
                     {"step", 0}};
    return sizes;
}

Sizes Sizes::of_column(const Network& network, std::uint64_t rows, std::uint64_t tokens) {
    const std::uint64_t least = network.least_tokens();
    const std::uint64_t text = network.text_max_length;
    Sizes sizes;
    sizes.values_ = {{"B", 1},
                     {"T", text},
                     {"h", (tokens + least - 1) / least},
                     {"w", 1},
                     {"Hs", tokens},
                     {"Ws", 1},
                     {"H", product(tokens, network.patch_size)},
                     {"W", network.patch_size},
                     {"L", tokens},
                     {"S", sum(text, tokens)},
                     {"N", rows},
                     {"row", rows - 1},
                     {"step", rows - 1}};
    return sizes;
}

Sizes Sizes::of_row(const Network& network, std::uint64_t rows, std::uint64_t tokens) {
    return of_column(network, rows, tokens)
        .extended({{"h", "w"}, {"w", "h"}, {"Hs", "Ws"}, {"Ws", "Hs"}, {"H", "W"}, {"W", "H"}});
}

std::uint64_t Sizes::value(const Size& size) const {
    const auto* symbol = std::get_if<std::string>(&size);
    return symbol != nullptr ? values_.at(*symbol) : std::get<std::uint64_t>(size);
}

std::uint64_t Sizes::count(const SymbolicShape& shape) const {
    std::uint64_t count = 1;
    for (const Size& size : shape)
        count = product(count, value(size));
    return count;
}

std::uint64_t Sizes::bytes(DType dtype, const SymbolicShape& shape) const {
    return product(item_bytes(dtype), count(shape));
}

Shape Sizes::shape(const SymbolicShape& shape) const {
    Shape numbers;
    for (const Size& size : shape)
        numbers.push_back(static_cast<std::int64_t>(value(size)));
    return numbers;
}

std::uint64_t Sizes::index(const SymbolicShape& shape, const SymbolicShape& start) const {
    std::uint64_t flat = 0;
    for (std::size_t axis = 0; axis < start.size(); ++axis)
        flat = sum(product(flat, value(shape[axis])), value(start[axis]));
    return flat;
}

Sizes Sizes::resized(std::uint64_t height, std::uint64_t width) const {
    const std::uint64_t per_latent = values_.at("Ws") / values_.at("w");
    const std::uint64_t patch = values_.at("W") / values_.at("Ws");
    const std::uint64_t hs = per_latent * height, ws = per_latent * width;
    Sizes sizes = *this;
    for (const auto& [symbol, value] :
         std::map<std::string, std::uint64_t>{{"h", height},
                                              {"w", width},
                                              {"Hs", hs},
                                              {"Ws", ws},
                                              {"H", hs * patch},
                                              {"W", ws * patch},
                                              {"L", hs * ws},
                                              {"S", values_.at("T") + hs * ws}})
        sizes.values_[symbol] = value;
    return sizes;
}

Sizes Sizes::extended(const std::map<std::string, std::string>& dims) const {
    Sizes sizes = *this;
    for (const auto& [local, symbol] : dims)
        sizes.values_[local] = value(symbol);
    return sizes;
}

} // namespace pid::core
