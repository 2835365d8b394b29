// Decoding: a statement of PTX becomes an Instruction with a function that runs it. Each topic's file has one `decode_*`, which returns
// false for an opcode of another topic, and throws for a variant that the machine does not know.
#pragma once
#include "machine.h"

namespace ptx {

// A statement as the parser leaves it: "@!%p1 add.s32 %r1, %r2, 4;" has the parts add, s32 and the operands %r1, %r2, 4.
struct Statement {
    std::string opcode;               // with its dots
    std::vector<std::string> parts;   // between the dots
    std::vector<std::string> operands;  // brackets and braces as they stand: "[%rd1+4]", "{%f1, %f2}"
    std::string predicate;            // a register's name, or empty
    bool negated = false;
    int line = 0, source = -1;
    std::string text;

    // Is it one of the parts after the first?
    bool has(const char* part) const;
};

struct Type {
    char kind;   // 'b', 'u', 's', 'f', 'p' (a predicate), 'h' (bf16)
    int bits;    // 0 for a predicate
    uint32_t bytes() const { return uint32_t(bits) / 8; }
};

// An address: a row of 32 or 64 bits, and a constant to add.
struct Address {
    uint32_t row;
    int64_t offset;
    bool wide;  // the row has 64 bits
};

// The names that a statement may use, by scope, and the rows that they stand for (decode.cpp).
struct Names {
    Kernel& kernel;
    struct Row {
        uint32_t offset;
        uint32_t width;  // bytes per lane; 0: a predicate
    };
    std::vector<std::map<std::string, Row>> scopes;
    std::map<std::string, Row> constants;                       // by width and bits
    std::map<std::string, uint32_t> shared_arrays;              // their offsets
    std::map<std::string, std::pair<uint32_t, uint32_t>> module_shared;  // of the module: bytes and alignment, until a kernel uses one
    std::vector<std::string> dynamic_arrays;                    // .extern .shared

    explicit Names(Kernel& kernel) : kernel(kernel), scopes(1) {}
    Row allocate(uint32_t width);
    Row declare(const std::string& name, uint32_t width);
    Row constant(uint64_t bits, uint32_t width);
    Row special(const std::string& name);
    uint32_t shared_array(const std::string& name, uint32_t bytes, uint32_t alignment);
};

struct Decoder {
    Module& module;
    Kernel& kernel;
    const Statement& statement;
    Names& names;
    Instruction out;

    // The type at the end of the opcode, or `from_the_end` parts before it.
    Type type(int from_the_end = 0) const;
    [[noreturn]] void unknown(const char* why = "the machine does not know it") const;

    // Rows of operands, noted as read or written. A literal becomes a row of constants of that type; "_" a row that nobody reads.
    uint32_t source(int operand, Type type) { return source(statement.operands.at(size_t(operand)), type); }
    uint32_t target(int operand, Type type) { return target(statement.operands.at(size_t(operand)), type); }
    uint32_t source(const std::string& text, Type type);
    uint32_t target(const std::string& text, Type type);
    std::vector<uint32_t> sources(int operand, Type type);  // of "{%f1, %f2}", or of a single one
    std::vector<uint32_t> targets(int operand, Type type);
    Address address(int operand);  // of "[%rd1+4]", "[name+4]" or "[%r1]"
    int64_t literal(int operand) const;  // a number that must be written there
};

Type type_of(const std::string& part);  // "s32"; throws Failure for anything else
bool is_type(const std::string& part);

bool decode_integer(Decoder&);       // integer.cpp: add, sub, mul, mad, div, rem, min, max, logic, shifts, bits of integers
bool decode_float(Decoder&);         // float.cpp: the same for floats, fma, and approximations
bool decode_convert(Decoder&);       // convert.cpp: cvt, cvta, mov
bool decode_small_floats(Decoder&);  // small_floats.cpp: cvt to and from floats of 16 bits
bool decode_predicates(Decoder&);    // predicates.cpp: setp, selp, logic of predicates
bool decode_memory(Decoder&);        // access.cpp: ld, st, atom, red
bool decode_collective(Decoder&);    // collective.cpp: shfl, vote, match, redux, bar.warp.sync, activemask
bool decode_copies(Decoder&);        // copies.cpp: cp.async, mbarrier, fences
bool decode_tensor_cores(Decoder&);  // tensor_cores.cpp: ldmatrix, mma, wgmma
bool decode_control(Decoder&);       // control.cpp: bra, bar.sync, ret, exit, trap, nanosleep

Instruction decode(Module&, Kernel&, const Statement&, Names&);

// Reads a PTX text. Throws Failure for what the machine does not know.
std::unique_ptr<Module> parse(const std::string& text);

}  // namespace ptx
