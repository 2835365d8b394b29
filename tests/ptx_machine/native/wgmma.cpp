// wgmma: products of a warpgroup (four warps), with operands in shared memory that descriptors name, and sums in registers.
//
// A product is computed when its warp waits for its group, or, under an odd seed, at once: both are allowed, and a kernel that reads sums
// or overwrites operands too early differs under one of them. Besides, checks stop it in any order: operands are read when a product is
// computed, and in any case when it is waited for. Each warp computes its 16 of the 64 rows. The first warp of a group notes what was
// issued, so that the others can be compared with it.
//
// Registers: wgmma.fence must come before the first product, and between an ordinary access to a register and a product that uses it.
// Products of one shape may follow each other in the same sums. Until a wait, nobody may touch sums, or fragments of the first operand.
#include <algorithm>
#include <cstdlib>

#include "decode.h"
#include "matrix.h"
#include "memory.h"
#include "tensor_cores.h"

namespace ptx {

constexpr int K = 16, ROWS = 16, MOST_COLUMNS = 256, GROUP = 4;  // of the sum; of a warp; warps
constexpr uint32_t CHUNK = 16;                                    // bytes: 8 neighbours along the contiguous dimension

// What a product is decoded with: flags in Instruction::immediate, the columns in `size`; rows: the sums, and four fragments if `a` is NONE.
constexpr int64_t A_MN_MAJOR = 1, B_MN_MAJOR = 2, NEGATED = 4, HALF = 8;

// ---- descriptors ---------------------------------------------------------------------------------------------------------------------

// An operand is a span (rows of A, columns of B) by K. `row` is how many bytes are contiguous before the next of 8 rows begins: as many as
// the swizzle's mode says, or 16 if there is none. A row is of the span if K-major, of K if MN-major.
struct Operand {
    uint64_t descriptor;
    char name;
    bool mn_major;
    uint32_t start, leading, stride, row;

    Operand(uint64_t descriptor, char name, bool mn_major) : descriptor(descriptor), name(name), mn_major(mn_major) {
        static const uint32_t ROW_BYTES[] = {16, 128, 64, 32};
        start = uint32_t(descriptor << 4) & 0x3fff0;
        leading = uint32_t(descriptor >> 12) & 0x3fff0;
        stride = uint32_t(descriptor >> 28) & 0x3fff0;
        row = ROW_BYTES[descriptor >> 62];
    }
    // Where the 8 elements from (s, k) are: along k if K-major, along the span if MN-major. The canonical layouts of the PTX ISA, from the
    // operand's start, and then the swizzle of the address.
    uint32_t offset(uint32_t s, uint32_t k) const {
        if (!mn_major) return s / 8 * stride + s % 8 * row + (row == CHUNK ? k / 8 * leading : k * 2);
        const uint32_t across = row / 2;
        const uint32_t at = row == CHUNK ? s / 8 * stride + k / 8 * leading : s / across * leading + s % across * 2 + k / 8 * stride;
        return at + k % 8 * row;
    }
    uint32_t place(uint32_t s, uint32_t k) const {
        const uint32_t at = start + offset(s, k);
        return at ^ ((at >> 7 & (row / CHUNK - 1)) << 4);
    }
};

static void check(Warp& w, const Operand& operand) {
    const uint64_t descriptor = operand.descriptor;
    const char name = operand.name;
    if (descriptor & 0x3ff1c000c000c000ull)
        fail(w, -1, format("descriptor 0x%llx of operand %c has bits that no field has: perhaps a start address that overflowed",
                           (unsigned long long)descriptor, name));
    if (descriptor >> 49 & 7)
        fail(w, -1, format("the machine knows no base offset, and that of operand %c is %d: let its swizzled rows begin at a multiple of %u bytes",
                           name, int(descriptor >> 49 & 7), 8 * operand.row));
    if (operand.row == 16) return;
    const uint32_t in_pattern = operand.start % (8 * operand.row), most = operand.mn_major ? 0 : operand.row - 2 * CHUNK;
    if (in_pattern > most)
        fail(w, -1, format("operand %c begins at byte %u of its %u-byte swizzle pattern, which begins at a multiple of %u%s", name, in_pattern,
                           8 * operand.row, 8 * operand.row, operand.mn_major ? "" : "; only a place in its first row, two chunks from the end, will do"));
    if (!operand.mn_major && operand.leading > CHUNK)
        fail(w, -1, format("the leading offset of operand %c is %u bytes; for a K-major swizzled operand it is not used, and written as 16 (1 in its field)",
                           name, operand.leading));
}

// Checks one access of the tensor cores to `bytes` of shared memory that hold (s, k), and returns where they are.
static const uint8_t* read(Warp& w, const Operand& operand, uint32_t s, uint32_t k, uint32_t address, uint32_t bytes) {
    if (address < SHARED_BASE || address - SHARED_BASE + bytes > w.block->shared->size())
        fail(w, -1, format("operand %c is not within shared memory (%u bytes): (%u, %u) is at offset %d; start %d, leading %u, stride %u bytes",
                           operand.name, w.block->shared->size(), s, k, int(address - SHARED_BASE), int(operand.start - SHARED_BASE),
                           operand.leading, operand.stride));
    return w.block->shared->at(w, 0, address, bytes, Access::ASYNC_READ);
}

// Calls take(s, k, chunk) for each 8 neighbours of `span` of the operand from `first` on. What lies together is checked together: of a
// K-major operand the two chunks of a row under a swizzle, or a column of 8 without one; of an MN-major one 8 rows of K as wide as the
// swizzle, if all of them belong to the span.
template <class Take>
static void for_chunks(Warp& w, const Operand& operand, uint32_t first, uint32_t span, Take take) {
    if (!operand.mn_major && operand.row > CHUNK && operand.start % (2 * CHUNK) == 0) {
        for (uint32_t s = first; s < first + span; s++) {
            const uint32_t address = operand.place(s, 0), both = address & ~(2 * CHUNK - 1);
            const uint8_t* bytes = read(w, operand, s, 0, both, 2 * CHUNK);
            take(s, 0, bytes + (address - both));
            take(s, 8, bytes + ((address - both) ^ CHUNK));
        }
        return;
    }
    const uint32_t across = operand.mn_major ? operand.row / 2 : 8;  // of the span, in 8 rows that lie together
    for (uint32_t s = first; s < first + span; s += across) {
        const uint32_t some = std::min(across, first + span - s);
        for (uint32_t k = 0; k < K; k += 8) {
            const bool together = some == across && s % across == 0 && (operand.mn_major || operand.row == CHUNK);
            const uint32_t begin = operand.start + operand.offset(s, k);
            const uint8_t* bytes = together ? read(w, operand, s, k, begin, 8 * operand.row) : nullptr;
            for (uint32_t row = 0; row < 8; row++) {
                for (uint32_t n = 0; n < (operand.mn_major ? some : 8); n += 8) {
                    const uint32_t at_s = operand.mn_major ? s + n : s + row, at_k = operand.mn_major ? k + row : k;
                    const uint32_t address = operand.place(at_s, at_k);
                    take(at_s, at_k, together ? bytes + (address - begin) : read(w, operand, at_s, at_k, address, CHUNK));
                }
            }
        }
    }
}

// ---- a warp's quarter ------------------------------------------------------------------------------------------------------------------

template <Element E>
static void load_first(Warp& w, const Product& product, Column (&a)[K]) {
    const Instruction& i = *product.instruction;
    if (i.a == NONE) {
        const uint32_t* rows = &i.rows[i.size / 2];
        for (int eight = 0; eight < 2; eight++) columns<E>(a + 8 * eight, w.row<uint32_t>(rows[2 * eight]), w.row<uint32_t>(rows[2 * eight + 1]));
        return;
    }
    const Operand operand(product.a, 'A', i.immediate & A_MN_MAJOR);
    const uint32_t top = uint32_t(w.number % GROUP * ROWS);
    if (operand.mn_major) {
        for_chunks(w, operand, top, ROWS, [&](uint32_t s, uint32_t k, const uint8_t* bytes) {
            uint16_t chunk[8];
            memcpy(chunk, bytes, CHUNK);
            for (uint32_t n = 0; n < 8; n++) a[k][s - top + n] = widen<E>(chunk[n]);
        });
        return;
    }
    uint32_t fragments[2][2][LANES];
    for_chunks(w, operand, top, ROWS, [&](uint32_t s, uint32_t k, const uint8_t* bytes) {
        memcpy(&fragments[k / 8][(s - top) / 8][s % 8 * 4], bytes, CHUNK);
    });
    for (int half = 0; half < 2; half++) columns<E>(a + 8 * half, fragments[half][0], fragments[half][1]);
}

template <Element E>
static void compute(Warp& w, const Product& product) {
    const Instruction& i = *product.instruction;
    const uint32_t n = i.size;
    Column a[K];
    load_first<E>(w, product, a);
    if (i.immediate & NEGATED) {
        for (Column& column : a) column = -column;
    }
    float b[K * MOST_COLUMNS];
    const Operand operand(product.b, 'B', i.immediate & B_MN_MAJOR);
    const int down = operand.mn_major ? int(n) : 1, across = operand.mn_major ? 1 : K;
    for_chunks(w, operand, 0, n, [&](uint32_t s, uint32_t k, const uint8_t* bytes) {
        uint16_t chunk[8];
        memcpy(chunk, bytes, CHUNK);
        widen<E>(b + int(k) * down + int(s) * across, chunk, 8);
    });
    for (uint32_t j = 0; j < n / 8; j++) {
        Column sum[8];
        multiply<K>(sum, a, b + 8 * int(j) * across, down, across);
        float *to[4], *old[4];
        for (uint32_t r = 0; r < 4; r++) {
            to[r] = w.row<float>(i.rows[4 * j + r]);
            old[r] = product.adds ? to[r] : nullptr;
        }
        scatter(sum, {to[0], to[1], to[2], to[3]}, {old[0], old[1], old[2], old[3]});
    }
}

// The product was computed at once, but might have read its operands until now: nobody may have written to them.
static void read_again(Warp& w, const Product& product) {
    const Instruction& i = *product.instruction;
    const auto look = [](uint32_t, uint32_t, const uint8_t*) {};
    if (i.a != NONE) for_chunks(w, Operand(product.a, 'A', i.immediate & A_MN_MAJOR), uint32_t(w.number % GROUP * ROWS), ROWS, look);
    for_chunks(w, Operand(product.b, 'B', i.immediate & B_MN_MAJOR), 0, i.size, look);
}

// Faults are reported at the product, not at the wait.
static void carry_out(Warp& w, Product& product) {
    const int here = w.at;
    w.at = product.at;
    if (product.done) read_again(w, product);
    else if (product.instruction->immediate & HALF) compute<Element::F16>(w, product);
    else compute<Element::BF16>(w, product);
    product.done = true;
    w.at = here;
}

// ---- what the warps of a group issued --------------------------------------------------------------------------------------------------

static Products& first_of_group(Warp& w) { return *w.block->warps[size_t(w.number / GROUP * GROUP)].products; }

static void compare_with_group(Warp& w, const Product& product) {
    auto& warps = w.block->warps;
    const size_t first = size_t(w.number / GROUP * GROUP);
    if (first + GROUP > warps.size()) fail(w, -1, format("a product of a warpgroup, which is four warps; the block has %d", int(warps.size())));
    uint64_t all = w.products->issued + 1;  // that all of them issued
    for (size_t other = first; other < first + GROUP; other++) {
        if (!warps[other].alive && warps[other].products->issued <= w.products->issued)
            fail(w, -1, format("a product of a warpgroup of which warp %d has ended without it: the others would wait for ever", int(other)));
        all = std::min(all, &warps[other] == &w ? all : warps[other].products->issued);
    }
    Products& group = first_of_group(w);
    const uint64_t number = w.products->issued++ - group.log_start;
    if (number == group.log.size()) {
        group.log.push_back(product);
    } else {
        const Product& wanted = group.log[size_t(number)];
        if (wanted.at != product.at)
            fail(w, -1, format("the warps of a warpgroup issue different products: another warp's is in PTX line %d", wanted.instruction->line));
        if (wanted.a != product.a || wanted.b != product.b || wanted.adds != product.adds)
            fail(w, -1, format("the warps of a warpgroup issue different products: descriptors 0x%llx and 0x%llx, %s, and here 0x%llx and 0x%llx, %s",
                               (unsigned long long)wanted.a, (unsigned long long)wanted.b, wanted.adds ? "adding" : "not adding",
                               (unsigned long long)product.a, (unsigned long long)product.b, product.adds ? "adding" : "not adding"));
    }
    for (; group.log_start < all; group.log_start++) group.log.pop_front();
}

// ---- registers -----------------------------------------------------------------------------------------------------------------------

static std::string name_of(const Warp& w, uint32_t row) {
    const auto found = w.block->kernel->names.find(row);
    return found == w.block->kernel->names.end() ? "a register" : found->second;
}

static void check_registers(Warp& w, const Instruction& i) {
    Products& products = *w.products;
    if (!products.fenced) fail(w, -1, "no wgmma.fence before the first product of this warp");
    for (size_t n = 0; n < i.rows.size(); n++) {
        const uint8_t state = products.rows[i.rows[n] / 64];
        const bool sum = n < i.size / 2;
        if (state & UNFENCED)
            fail(w, -1, format("no wgmma.fence between an access to %s and the product that uses it as %s", name_of(w, i.rows[n]).c_str(),
                               sum ? "a sum" : "a fragment"));
        if (state & (sum ? FRAGMENT : SUMS))
            fail(w, -1, format("%s is %s, and a product under way uses it as %s", name_of(w, i.rows[n]).c_str(), sum ? "a sum" : "a fragment",
                               sum ? "a fragment" : "a sum"));
    }
    const auto compare = [&](const Product& other) {
        if (other.instruction->size == i.size) return;
        for (size_t n = 0; n < i.size / 2; n++) {
            const auto& rows = other.instruction->rows;
            if (std::find(rows.begin(), rows.begin() + other.instruction->size / 2, i.rows[n]) != rows.begin() + other.instruction->size / 2)
                fail(w, -1, format("%s is a sum of a product of another shape under way: wgmma.wait_group must come between them",
                                   name_of(w, i.rows[n]).c_str()));
        }
    };
    for (const auto& group : products.groups) std::for_each(group.begin(), group.end(), compare);
    std::for_each(products.open.begin(), products.open.end(), compare);
}

static void mark_registers(Products& products, const Product& product) {
    const Instruction& i = *product.instruction;
    for (size_t n = 0; n < i.rows.size(); n++) products.rows[i.rows[n] / 64] |= n < i.size / 2 ? SUMS : FRAGMENT;
}

// ---- instructions --------------------------------------------------------------------------------------------------------------------

static void need_all(Warp& w, uint32_t lanes) {
    if (lanes != ALL) fail(w, -1, format("an instruction of a whole warp, executed by %d of its 32 lanes", __builtin_popcount(lanes)));
}

static uint64_t uniform(Warp& w, uint32_t row, const char* what) {
    const uint64_t* values = w.row<uint64_t>(row);
    for (int lane = 1; lane < LANES; lane++) {
        if (values[lane] != values[0])
            fail(w, lane, format("the lanes of a warp give different descriptors of operand %s: 0x%llx and 0x%llx", what,
                                 (unsigned long long)values[0], (unsigned long long)values[lane]));
    }
    return values[0];
}

static void multiply_async(Warp& w, const Instruction& i, uint32_t lanes) {
    need_all(w, lanes);
    const uint32_t adds = w.bits(i.c);
    if (adds != 0 && adds != ALL) fail(w, -1, "the lanes of a warp do not agree whether a product is added");
    Product product = {&i, w.at, i.a == NONE ? 0 : uniform(w, i.a, "A"), uniform(w, i.b, "B"), adds != 0, false};
    if (i.a != NONE) check(w, Operand(product.a, 'A', i.immediate & A_MN_MAJOR));
    check(w, Operand(product.b, 'B', i.immediate & B_MN_MAJOR));
    check_registers(w, i);
    compare_with_group(w, product);
    if (w.block->launch->seed % 2) carry_out(w, product);
    mark_registers(*w.products, product);
    w.products->open.push_back(product);
    w.block->counters.async_product_flops += 2ull * ROWS * i.size * K;
}

static void fence(Warp& w, const Instruction&, uint32_t lanes) {
    need_all(w, lanes);
    Products& products = *w.products;
    products.rows.resize(w.block->kernel->register_bytes / 64 + 1);
    for (uint8_t& state : products.rows) state &= uint8_t(~UNFENCED);
    products.fenced = w.watched = true;
}

static void commit(Warp& w, const Instruction&, uint32_t lanes) {
    need_all(w, lanes);
    w.products->groups.push_back(std::move(w.products->open));
    w.products->open.clear();
}

// Until at most `immediate` of the groups committed last are under way.
static void wait_group(Warp& w, const Instruction& i, uint32_t lanes) {
    need_all(w, lanes);
    Products& products = *w.products;
    bool any = false;
    while (products.groups.size() > size_t(i.immediate)) {
        for (Product& product : products.groups.front()) {
            carry_out(w, product);
            for (const uint32_t row : product.instruction->rows) products.rows[row / 64] &= uint8_t(~(SUMS | FRAGMENT));
            any = true;
        }
        products.groups.pop_front();
    }
    if (!any) return;
    for (const auto& group : products.groups) {
        for (const Product& product : group) mark_registers(products, product);
    }
    for (const Product& product : products.open) mark_registers(products, product);
}

void watch(Warp& w, const Instruction& i, uint32_t) {
    if (i.run == multiply_async) return;
    uint8_t* rows = w.products->rows.data();
    const auto touch = [&](uint32_t row, const char* how) {
        uint8_t& state = rows[row / 64];
        if (state & (SUMS | FRAGMENT))
            fail(w, -1, format("%s %s, which is a %s of a product under way; wgmma.wait_group must come first", how, name_of(w, row).c_str(),
                               state & SUMS ? "sum" : "fragment"));
        state |= UNFENCED;
    };
    for (const uint32_t row : i.reads) touch(row, "read of");
    for (const uint32_t row : i.writes) touch(row, "write to");
}

// ---- the beginning and the end -------------------------------------------------------------------------------------------------------

void Products::start() {
    groups.clear();
    open.clear();
    rows.clear();
    log.clear();
    fenced = false;
    issued = log_start = 0;
}

void Products::end(Warp& w) {
    const auto line = [](const std::vector<Product>& group) { return group[0].instruction->line; };
    if (!open.empty()) fail(w, -1, format("a product (wgmma, PTX line %d) was not committed when its warp ends", line(open)));
    for (const auto& group : groups) {
        if (!group.empty()) fail(w, -1, format("a product (wgmma, PTX line %d) was not waited for when its warp ends", line(group)));
    }
    const Products& first = first_of_group(w);
    const uint64_t all = first.log_start + first.log.size();
    if (issued < all)
        fail(w, -1, format("a warp ends that issued %llu of its warpgroup's %llu products: the others would wait for ever",
                           (unsigned long long)issued, (unsigned long long)all));
}

// ---- decoding ------------------------------------------------------------------------------------------------------------------------

static bool decode_flag(Decoder& d, int operand, int64_t no, int64_t yes) {
    const int64_t value = d.literal(operand);
    if (value != no && value != yes) d.unknown("an immediate has a value that means nothing");
    return value == yes;
}

static void decode_product(Decoder& d) {
    const Statement& statement = d.statement;
    const auto& parts = statement.parts;
    if (parts.size() != 8 || parts[2] != "sync" || parts[3] != "aligned" || parts[5] != "f32" || parts[6] != parts[7] ||
        (parts[6] != "bf16" && parts[6] != "f16"))
        d.unknown("the machine knows products of bf16 and f16 with float sums");
    const std::string& shape = parts[4];  // m64n128k16
    const size_t end = shape.find('k');
    const uint32_t n = shape.rfind("m64n", 0) == 0 && end != std::string::npos ? uint32_t(atoi(shape.c_str() + 4)) : 0;
    if (!n || n % 8 || n > MOST_COLUMNS || shape != format("m64n%uk16", n)) d.unknown();
    const bool registers = statement.operands.at(1)[0] == '{';
    if (statement.operands.size() != (registers ? 7u : 8u)) d.unknown();
    const Type sum = {'f', 32}, word = {'b', 32}, descriptor = {'b', 64};
    d.out.rows = d.targets(0, sum);
    d.sources(0, sum);
    if (d.out.rows.size() != n / 2) d.unknown("it has as many sums as half its columns");
    if (registers) {
        const std::vector<uint32_t> a = d.sources(1, word);
        if (a.size() != 4) d.unknown("its first operand has four registers");
        d.out.rows.insert(d.out.rows.end(), a.begin(), a.end());
    } else {
        d.out.a = d.source(1, descriptor);
    }
    d.out.b = d.source(2, descriptor);
    d.out.c = d.source(3, {'p', 0});
    if (decode_flag(d, 4, 1, -1) != decode_flag(d, 5, 1, -1)) d.out.immediate |= NEGATED;
    int operand = 6;
    if (!registers && decode_flag(d, operand++, 0, 1)) d.out.immediate |= A_MN_MAJOR;
    if (decode_flag(d, operand, 0, 1)) d.out.immediate |= B_MN_MAJOR;
    if (parts[6] == "f16") d.out.immediate |= HALF;
    d.out.size = n;
    d.out.run = multiply_async;
    d.kernel.async_proxy = true;
}

bool decode_wgmma(Decoder& d) {
    const Statement& statement = d.statement;
    if (statement.parts[0] != "wgmma") return false;
    d.out.kind = Kind::COLLECTIVE;
    if (statement.opcode == "wgmma.fence.sync.aligned") {
        d.out.run = fence;
    } else if (statement.opcode == "wgmma.commit_group.sync.aligned") {
        d.out.run = commit;
    } else if (statement.opcode == "wgmma.wait_group.sync.aligned") {
        d.out.immediate = d.literal(0);
        d.out.run = wait_group;
    } else if (statement.parts.size() > 1 && statement.parts[1] == "mma_async") {
        decode_product(d);
    } else {
        d.unknown();
    }
    return true;
}

}  // namespace ptx
