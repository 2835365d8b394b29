// What decoding shares: names of registers become rows, literals become rows of constants, and each statement goes to its topic.
#include "decode.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ptx {

std::string format(const char* pattern, ...) {
    char text[2048];
    va_list arguments;
    va_start(arguments, pattern);
    vsnprintf(text, sizeof text, pattern, arguments);
    va_end(arguments);
    return text;
}

// ---- types and literals --------------------------------------------------------------------------------------------------------------

bool is_type(const std::string& part) {
    if (part == "pred" || part == "bf16" || part == "bf16x2" || part == "f16x2") return true;
    if (part.size() < 2 || !strchr("busf", part[0])) return false;
    const std::string bits = part.substr(1);
    return bits == "8" || bits == "16" || bits == "32" || bits == "64";
}

Type type_of(const std::string& part) {
    if (!is_type(part)) throw Failure(format("'%s' is not a type that the machine knows", part.c_str()));
    if (part == "pred") return {'p', 0};
    if (part == "bf16") return {'h', 16};
    if (part == "bf16x2" || part == "f16x2") return {'b', 32};
    return {part[0], atoi(part.c_str() + 1)};
}

// The bits of a literal: 0f3F800000 and 0d... are floats by their bits, anything else is an integer.
static uint64_t literal_bits(const std::string& text, Type type) {
    if (text.size() > 2 && text[0] == '0' && strchr("fFdD", text[1])) {
        const uint64_t bits = strtoull(text.c_str() + 2, nullptr, 16);
        const bool is_double = strchr("dD", text[1]) != nullptr;
        if (is_double == (type.bits == 64)) return bits;
        double wide;
        float narrow;
        if (is_double) {
            memcpy(&wide, &bits, 8);
            narrow = float(wide);
        } else {
            const uint32_t word = uint32_t(bits);
            memcpy(&narrow, &word, 4);
            wide = narrow;
        }
        uint64_t other = 0;
        is_double ? memcpy(&other, &narrow, 4) : memcpy(&other, &wide, 8);
        return other;
    }
    const bool negative = text[0] == '-';
    std::string digits = text.substr(negative);
    while (!digits.empty() && (digits.back() == 'U' || digits.back() == 'u')) digits.pop_back();
    const uint64_t value = digits.rfind("0b", 0) == 0 ? strtoull(digits.c_str() + 2, nullptr, 2) : strtoull(digits.c_str(), nullptr, 0);
    return negative ? -value : value;
}

// ---- names ---------------------------------------------------------------------------------------------------------------------------

Names::Row Names::allocate(uint32_t width) {
    const uint32_t alignment = width ? 64 : 4;
    const uint32_t offset = (kernel.register_bytes + alignment - 1) / alignment * alignment;
    kernel.register_bytes = offset + (width ? width * LANES : 4);
    kernel.widths[offset] = width;
    return {offset, width};
}

Names::Row Names::declare(const std::string& name, uint32_t width) {
    const Row row = allocate(width);
    scopes.back()[name] = row;
    kernel.names[row.offset] = name;
    return row;
}

Names::Row Names::constant(uint64_t bits, uint32_t width) {
    if (width && width < 8) bits &= (1ull << 8 * width) - 1;
    const std::string key = format("%u:%llx", width, (unsigned long long)bits);
    const auto known = constants.find(key);
    if (known != constants.end()) return known->second;
    const Row row = allocate(width);
    kernel.constants.push_back({row.offset, width, bits});
    return constants[key] = row;
}

Names::Row Names::special(const std::string& name) {
    for (const Special& known : kernel.specials) {
        if (known.name == name) return {known.row, kernel.widths.at(known.row)};
    }
    const Row row = allocate(4);
    kernel.specials.push_back({name, row.offset});
    kernel.names[row.offset] = name;
    return row;
}

uint32_t Names::shared_array(const std::string& name, uint32_t bytes, uint32_t alignment) {
    const uint32_t offset = (kernel.shared_bytes + alignment - 1) / alignment * alignment;
    kernel.shared_bytes = offset + bytes;
    return shared_arrays[name] = offset;
}

// ---- operands ------------------------------------------------------------------------------------------------------------------------

bool Statement::has(const char* part) const {
    for (size_t i = 1; i < parts.size(); i++) {
        if (parts[i] == part) return true;
    }
    return false;
}

void Decoder::unknown(const char* why) const {
    throw Failure(format("PTX line %d: %s: %s", statement.line, statement.text.c_str(), why));
}

Type Decoder::type(int from_the_end) const {
    const size_t at = statement.parts.size() - 1 - size_t(from_the_end);
    if (at >= statement.parts.size() || !is_type(statement.parts[at])) unknown("it has no type where one is expected");
    return type_of(statement.parts[at]);
}

static Names::Row find(Decoder& d, const std::string& text, Type type) {
    Names& names = d.names;
    const uint32_t width = type.kind == 'p' ? 0 : type.bits == 8 ? 2 : type.bytes();
    for (auto scope = names.scopes.rbegin(); scope != names.scopes.rend(); ++scope) {
        const auto found = scope->find(text);
        if (found != scope->end()) return found->second;
    }
    if (text == "_") return names.allocate(width);
    if (text[0] == '%') return names.special(text);
    if (isdigit(text[0]) || text[0] == '-') return names.constant(type.kind == 'p' ? literal_bits(text, type) & 1 : literal_bits(text, type), width);
    if (text == "WARP_SZ") return names.constant(LANES, width);
    const auto shared = names.shared_arrays.find(text);
    if (shared != names.shared_arrays.end()) return names.constant(SHARED_BASE + shared->second, width);
    const auto of_module = names.module_shared.find(text);
    if (of_module != names.module_shared.end()) {
        const uint32_t offset = names.shared_array(text, of_module->second.first, of_module->second.second);
        return names.constant(SHARED_BASE + offset, width);
    }
    for (const std::string& name : names.dynamic_arrays) {
        if (name != text) continue;
        uint32_t& row = width == 8 ? d.kernel.dynamic_row_wide : d.kernel.dynamic_row;
        if (row == NONE) row = names.allocate(width).offset;
        return {row, width};
    }
    for (const auto& array : d.module.arrays) {
        if (array->name == text) return names.constant(array->address, 8);
    }
    d.unknown(format("'%s' is not declared", text.c_str()).c_str());
}

uint32_t Decoder::source(const std::string& text, Type type) {
    const uint32_t row = find(*this, text, type).offset;
    out.reads.push_back(row);
    return row;
}

uint32_t Decoder::target(const std::string& text, Type type) {
    const uint32_t row = find(*this, text, type).offset;
    out.writes.push_back(row);
    return row;
}

// The elements of "{%f1, %f2}", or the text itself.
static std::vector<std::string> elements(const std::string& text) {
    if (text[0] != '{') return {text};
    std::vector<std::string> found(1);
    for (const char letter : text.substr(1, text.size() - 2)) {
        if (letter == ',') found.emplace_back();
        else if (!isspace(letter)) found.back() += letter;
    }
    return found;
}

std::vector<uint32_t> Decoder::sources(int operand, Type type) {
    std::vector<uint32_t> rows;
    for (const std::string& text : elements(statement.operands.at(size_t(operand)))) rows.push_back(source(text, type));
    return rows;
}

std::vector<uint32_t> Decoder::targets(int operand, Type type) {
    std::vector<uint32_t> rows;
    for (const std::string& text : elements(statement.operands.at(size_t(operand)))) rows.push_back(target(text, type));
    return rows;
}

Address Decoder::address(int operand) {
    std::string text = statement.operands.at(size_t(operand));
    if (text.size() < 3 || text[0] != '[') unknown("an address is expected");
    text = text.substr(1, text.size() - 2);
    const size_t plus = text.find('+');
    const int64_t offset = plus == std::string::npos ? 0 : int64_t(literal_bits(text.substr(plus + 1), {'s', 64}));
    std::string base = text.substr(0, plus);
    while (!base.empty() && isspace(base.back())) base.pop_back();
    const Names::Row row = find(*this, base, {'b', 64});
    out.reads.push_back(row.offset);
    return {row.offset, offset, row.width == 8};
}

int64_t Decoder::literal(int operand) const {
    const std::string& text = statement.operands.at(size_t(operand));
    if (!isdigit(text[0]) && text[0] != '-') unknown("a number is expected");
    return int64_t(literal_bits(text, {'s', 64}));
}

// ---- topics --------------------------------------------------------------------------------------------------------------------------

// What an arithmetic instruction makes of an undefined value.
static Follows follows(const Statement& statement) {
    const std::string& opcode = statement.parts[0];
    return opcode == "selp" ? Follows::CHOICE : opcode == "and" ? Follows::AND : opcode == "or" ? Follows::OR : Follows::ALWAYS;
}

Instruction decode(Module& module, Kernel& kernel, const Statement& statement, Names& names) {
    Decoder d{module, kernel, statement, names, {}};
    d.out.line = statement.line;
    d.out.source = statement.source;
    d.out.text = statement.text;
    if (!statement.predicate.empty()) {
        d.out.predicate = d.source(statement.predicate, {'p', 0});
        d.out.reads.clear();
        d.out.negated = statement.negated;
    }
    using Topic = bool (*)(Decoder&);
    const auto is_arithmetic = [](Topic topic) {
        return topic == decode_integer || topic == decode_float || topic == decode_predicates || topic == decode_small_floats || topic == decode_convert;
    };
    for (const Topic topic : {decode_control, decode_memory, decode_integer, decode_float, decode_predicates, decode_small_floats, decode_convert,
                              decode_collective, decode_copies, decode_tensor_cores}) {
        try {
            if (!topic(d)) continue;
        } catch (const std::out_of_range&) {  // an operand or a part that is not there
            d.unknown("it has other operands than the machine knows");
        }
        if (is_arithmetic(topic)) d.out.follows = follows(statement);
        return std::move(d.out);
    }
    d.unknown();
}

}  // namespace ptx
