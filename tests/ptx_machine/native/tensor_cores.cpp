// Matrices of a warp: ldmatrix, stmatrix and mma.sync. The layouts are the PTX ISA's; the arithmetic is in matrix.h.
#include "tensor_cores.h"

#include <algorithm>

#include "decode.h"
#include "matrix.h"
#include "memory.h"
#include "copies.h"

namespace ptx {

static void need_all(Warp& w, uint32_t lanes) {
    if (lanes != ALL) fail(w, -1, format("an instruction of a whole warp, executed by %d of its 32 lanes", __builtin_popcount(lanes)));
}

// ---- ldmatrix, stmatrix --------------------------------------------------------------------------------------------------------------

constexpr uint32_t ROW = 16;  // bytes of a row of 8 elements

// Rows of one matrix are read together; those in the same banks, at different addresses, one after another.
static void count_waves(Warp& w, const uint32_t (&address)[LANES], int matrices) {
    w.block->counters.matrix_loads += uint64_t(matrices);
    for (int first = 0; first < 8 * matrices; first += 8) {
        int most = 0;
        for (int i = first; i < first + 8; i++) {
            int same = 0;
            for (int j = first; j < first + 8; j++) {
                const bool earlier = std::find(address + first, address + j, address[j]) != address + j;
                same += !earlier && (address[j] / ROW) % 8 == (address[i] / ROW) % 8;
            }
            most = std::max(most, same);
        }
        w.block->counters.matrix_load_waves += uint64_t(most);
    }
}

// The places of the 8 rows of each matrix, which lanes 8i .. 8i + 7 give for the i-th.
template <int MATRICES>
static void find_rows(Warp& w, const Instruction& i, Access access, uint8_t* (&rows)[LANES]) {
    uint32_t address[LANES] = {};
    for (int lane = 0; lane < 8 * MATRICES; lane++) {
        address[lane] = shared_address(w, i, lane);
        if (address[lane] % ROW)
            fail(w, lane, format("misaligned row of a matrix: offset %u of shared memory is no multiple of 16", address[lane] - SHARED_BASE));
    }
    const uint32_t lanes = MATRICES == 4 ? ALL : (1u << 8 * MATRICES) - 1;
    uint8_t* run = w.block->shared->at_lanes(w, lanes, address, ROW, access, rows);
    for (uint32_t lane = 0; run && lane < LANES; lane++) rows[lane] = run + lane * ROW;
    if (w.block->launch->counts) count_waves(w, address, MATRICES);
}

template <int MATRICES, bool TRANSPOSED>
static void load(Warp& w, const Instruction& i, uint32_t lanes) {
    need_all(w, lanes);
    uint8_t* from[LANES];
    find_rows<MATRICES>(w, i, Access::READ, from);
    uint16_t elements[MATRICES][8][8];
    for (int row = 0; row < 8 * MATRICES; row++) memcpy(elements[row / 8][row % 8], from[row], ROW);
    for (int matrix = 0; matrix < MATRICES; matrix++) {
        uint16_t* to = w.row<uint16_t>(i.rows[size_t(matrix)]);
        if (TRANSPOSED) {
            for (int n = 0; n < 64; n++) to[n] = elements[matrix][n % 8][n / 8];
        } else {
            memcpy(to, elements[matrix], sizeof elements[matrix]);
        }
    }
}

template <int MATRICES, bool TRANSPOSED>
static void store(Warp& w, const Instruction& i, uint32_t lanes) {
    need_all(w, lanes);
    uint8_t* to[LANES];
    find_rows<MATRICES>(w, i, Access::WRITE, to);
    for (int row = 0; row < 8 * MATRICES; row++) {
        const uint16_t* from = w.row<uint16_t>(i.rows[size_t(row / 8)]);
        uint16_t elements[8];
        for (int n = 0; n < 8; n++) elements[n] = TRANSPOSED ? from[8 * n + row % 8] : from[8 * (row % 8) + n];
        memcpy(to[row], elements, ROW);
    }
}

static void decode_matrices(Decoder& d) {
    const Statement& statement = d.statement;
    const bool loads = statement.parts[0] == "ldmatrix", transposed = statement.has("trans");
    const std::string start = statement.parts[0] + ".sync.aligned.m8n8.x";
    const size_t n = statement.opcode.size() > start.size() && statement.opcode.rfind(start, 0) == 0 ? size_t(statement.opcode[start.size()] - '0') : 0;
    std::string rest = n ? statement.opcode.substr(start.size() + 1) : "";
    if (transposed && rest.rfind(".trans", 0) == 0) rest = rest.substr(6);
    if ((n != 1 && n != 2 && n != 4) || (rest != ".shared.b16" && rest != ".shared::cta.b16" && rest != ".b16")) d.unknown();
    decode_shared_address(d, loads ? 1 : 0);
    d.out.rows = loads ? d.targets(0, {'b', 32}) : d.sources(1, {'b', 32});
    if (d.out.rows.size() != n) d.unknown("it has one register for each matrix");
    static const Instruction::Run RUN[2][3][2] = {
        {{store<1, false>, store<1, true>}, {store<2, false>, store<2, true>}, {store<4, false>, store<4, true>}},
        {{load<1, false>, load<1, true>}, {load<2, false>, load<2, true>}, {load<4, false>, load<4, true>}},
    };
    d.out.run = RUN[loads][n / 2][transposed];
    d.out.kind = Kind::COLLECTIVE;
}

// ---- mma.sync ------------------------------------------------------------------------------------------------------------------------

// rows: d [4], a, b, c [4]. d [16, 8] = a [16, K] b [K, 8] + c, in the fragments of matrix.h. For K = 16 the first two fragments of a are its
// first 8 columns; b is transposed, 8 columns of 8 elements, and so are its next 8.
template <Element E, int K>
static void product(Warp& w, const Instruction& i, uint32_t lanes) {
    need_all(w, lanes);
    w.block->counters.products++;
    constexpr int EIGHTS = K / 8;
    const uint32_t* rows = i.rows.data();
    Column a[K], sum[8];
    float b[8 * K];
    for (int eight = 0; eight < EIGHTS; eight++) {
        columns<E>(a + 8 * eight, w.row<uint32_t>(rows[4 + 2 * eight]), w.row<uint32_t>(rows[5 + 2 * eight]));
        const uint16_t* from = w.row<uint16_t>(rows[4 + 2 * EIGHTS + eight]);
        for (int n = 0; n < 8; n++) widen<E>(b + K * n + 8 * eight, from + 8 * n, 8);
    }
    multiply<K>(sum, a, b, 1, K);
    const uint32_t* c = rows + 4 + 3 * EIGHTS;
    scatter(sum, {w.row<float>(rows[0]), w.row<float>(rows[1]), w.row<float>(rows[2]), w.row<float>(rows[3])},
            {w.row<float>(c[0]), w.row<float>(c[1]), w.row<float>(c[2]), w.row<float>(c[3])});
}

// A fragment of tf32 is 8 rows of 4. Its lowest 13 bits are ignored.
template <int K>
static void product_tf32(Warp& w, const Instruction& i, uint32_t lanes) {
    need_all(w, lanes);
    w.block->counters.products++;
    constexpr int FOURS = K / 4;
    const uint32_t* rows = i.rows.data();
    Column a[K], sum[8];
    float b[8 * K];
    for (int four = 0; four < FOURS; four++) {
        Words words[4], across[4];
        memcpy(&words[0], w.row<uint32_t>(rows[4 + 2 * four]), 128);
        memcpy(&words[2], w.row<uint32_t>(rows[5 + 2 * four]), 128);
        separate(words, across);
        for (int k = 0; k < 4; k++) {
            across[k] &= 0xffffe000u;
            memcpy(&a[4 * four + k], &across[k], 64);
        }
        const uint32_t* from = w.row<uint32_t>(rows[4 + 2 * FOURS + four]);
        for (int n = 0; n < 32; n++) {
            const uint32_t bits = from[n] & 0xffffe000u;
            memcpy(&b[K * (n / 4) + 4 * four + n % 4], &bits, 4);
        }
    }
    multiply<K>(sum, a, b, 1, K);
    const uint32_t* c = rows + 4 + 3 * FOURS;
    scatter(sum, {w.row<float>(rows[0]), w.row<float>(rows[1]), w.row<float>(rows[2]), w.row<float>(rows[3])},
            {w.row<float>(c[0]), w.row<float>(c[1]), w.row<float>(c[2]), w.row<float>(c[3])});
}

static void decode_mma(Decoder& d) {
    struct Shape {
        const char* opcode;
        size_t fragments;  // of b; a has twice as many
        Instruction::Run run;
    };
    static const Shape SHAPES[] = {
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 2, product<Element::BF16, 16>},
        {"mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", 1, product<Element::BF16, 8>},
        {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", 2, product<Element::F16, 16>},
        {"mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", 1, product<Element::F16, 8>},
        {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", 2, product_tf32<8>},
        {"mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32", 1, product_tf32<4>},
    };
    for (const Shape& shape : SHAPES) {
        if (d.statement.opcode != shape.opcode) continue;
        const Type sum = {'f', 32}, word = {'b', 32};
        const std::vector<uint32_t> to = d.targets(0, sum), a = d.sources(1, word), b = d.sources(2, word), c = d.sources(3, sum);
        if (to.size() != 4 || a.size() != 2 * shape.fragments || b.size() != shape.fragments || c.size() != 4)
            d.unknown("its fragments have another number of registers");
        for (const auto& part : {to, a, b, c}) d.out.rows.insert(d.out.rows.end(), part.begin(), part.end());
        d.out.run = shape.run;
        d.out.kind = Kind::COLLECTIVE;
        return;
    }
    d.unknown();
}

bool decode_tensor_cores(Decoder& d) {
    const std::string& name = d.statement.parts[0];
    if (name == "ldmatrix" || name == "stmatrix") decode_matrices(d);
    else if (name == "mma") decode_mma(d);
    else return decode_wgmma(d);
    return true;
}

}  // namespace ptx
