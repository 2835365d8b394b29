"""Operations on vectors of the processor's own width, which the matrix product and the maximum need and Numba lacks.

Each is written in LLVM's intermediate code, which the compiler turns into instructions of the processor it runs on. Addresses are int64;
sizes and strides count floats.
"""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import config
from numba.extending import intrinsic

FLOAT, BYTE, INT32, INT64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
FUSED = ["contract"]  # x * y + z in one instruction, if the processor has it


def has(feature: str) -> bool:
    """True if the processor that Numba compiles for has this feature. Names are LLVM's."""
    if config.CPU_FEATURES is not None:
        return f"+{feature}" in config.CPU_FEATURES.split(",")
    return config.CPU_NAME is None and bool(binding.get_host_cpu_features().get(feature))


WIDE = has("avx512f")
FITS = WIDE or (has("avx2") and has("fma"))  # the tiles below were measured on these
WIDTH = 16 if WIDE else 8 if FITS else 4  # floats per vector
VECTORS = 2  # per row of a tile
COLUMNS = VECTORS * WIDTH
STEPS = tuple(step for step in (1, 2, 4, 8) if step < WIDTH)
AHEAD = 64  # how many floats ahead a row of B is prefetched when it is not packed
ROWS = (12, 8, 4, 2, 1) if WIDE else (6, 4, 2, 1)  # heights of tiles; sums of the highest fill 24 of 32 registers, or 12 of 16
VECTOR = ir.VectorType(FLOAT, WIDTH)


def number(value: int) -> Any:
    return ir.Constant(INT64, value)


def lanes(chosen: list[int]) -> Any:
    """The mask of a shuffle: the lanes that it takes from two vectors."""
    return ir.Constant(ir.VectorType(INT32, WIDTH), chosen)


def vector_at(builder: Any, start: Any, offset: Any) -> Any:
    """Return a pointer to the vector `offset` floats after `start`."""
    return builder.bitcast(builder.gep(start, [offset]), VECTOR.as_pointer())


def prefetch_at(builder: Any, target: Any, for_writing: int) -> None:
    """Prefetch the cache line of a pointer."""
    kinds, name, near, data = [BYTE.as_pointer(), INT32, INT32, INT32], "llvm.prefetch.p0i8", 3, 1
    known = builder.module.globals.get(name)
    function = known if known is not None else ir.Function(builder.module, ir.FunctionType(ir.VoidType(), kinds), name)
    builder.call(function, [builder.bitcast(target, kinds[0]), *(ir.Constant(INT32, x) for x in (for_writing, near, data))])


def tile_of(rows: int, row_major: bool) -> Any:
    """Make the innermost loop of a product: it keeps `rows` x COLUMNS sums in registers.

    tile(a, stride, panel, panel_stride, c, c_stride, depth, add):  c[i, j] = (c[i, j] if add) + sum over k < depth of a[i, k] panel[k, j]
    a[i, k] is at a + i * stride + k (row major) or a + i + k * stride; panel [depth,COLUMNS].
    """

    @intrinsic
    def tile(typing: Any, a: Any, stride: Any, panel: Any, panel_stride: Any, c: Any, c_stride: Any, depth: Any, add: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, stride, panel, panel_stride, c, c_stride, depth, add = args
            a, panel, c = (builder.inttoptr(x, FLOAT.as_pointer()) for x in (a, panel, c))
            rows_of_c = [builder.mul(c_stride, number(i)) for i in range(rows)]
            to = [[vector_at(builder, c, builder.add(row, number(v * WIDTH))) for v in range(VECTORS)] for row in rows_of_c]
            for target in (target for row in to for target in row):
                prefetch_at(builder, target, for_writing=1)
            entry, loop, after = builder.basic_block, builder.append_basic_block("depth"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            k, a_k, panel_k = builder.phi(INT64), builder.phi(a.type), builder.phi(panel.type)
            sums = [[builder.phi(VECTOR) for _ in range(VECTORS)] for _ in range(rows)]
            right = [builder.load(vector_at(builder, panel_k, number(v * WIDTH)), align=4) for v in range(VECTORS)]
            for i in range(rows):
                one = builder.load(builder.gep(a_k, [builder.mul(stride, number(i)) if row_major else number(i)]), align=4)
                left = spread(builder, one)
                for v in range(VECTORS):
                    total = builder.fadd(builder.fmul(left, right[v], flags=FUSED), sums[i][v], flags=FUSED)
                    sums[i][v].add_incoming(ir.Constant(VECTOR, [0.0] * WIDTH), entry)
                    sums[i][v].add_incoming(total, loop)
                    sums[i][v] = total
            following = builder.add(k, number(1))
            for value, first, then in (
                (k, number(0), following), (a_k, a, builder.gep(a_k, [number(1) if row_major else stride])),
                (panel_k, panel, builder.gep(panel_k, [panel_stride])),
            ):  # fmt: skip
                value.add_incoming(first, entry)
                value.add_incoming(then, loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
            builder.position_at_end(after)
            pairs = [(sums[i][v], to[i][v]) for i in range(rows) for v in range(VECTORS)]
            with builder.if_else(builder.icmp_signed("!=", add, number(0))) as (adding, writing):
                with adding:
                    for total, target in pairs:
                        builder.store(builder.fadd(total, builder.load(target, align=4)), target, align=4)
                with writing:
                    for total, target in pairs:
                        builder.store(total, target, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return tile


def exchanged(builder: Any, rows: list[Any], steps: tuple[int, ...]) -> list[Any]:
    """Exchange blocks of `step` lanes between vectors, for each step. With all steps 1, 2, 4 .. below its side, a square is transposed."""
    rows = list(rows)
    for step in steps:
        low = lanes([WIDTH + (lane ^ step) if lane & step else lane for lane in range(WIDTH)])
        high = lanes([WIDTH + lane if lane & step else lane ^ step for lane in range(WIDTH)])
        for i in (i for i in range(len(rows)) if not i & step):
            pair = rows[i], rows[i | step]
            rows[i], rows[i | step] = builder.shuffle_vector(*pair, low), builder.shuffle_vector(*pair, high)
    return rows


@intrinsic
def transpose_square(typing: Any, source: Any, stride: Any, to: Any, to_stride: Any) -> Any:
    """to[j, i] = source[i, j] for WIDTH rows and columns."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, stride, to, to_stride = args
        source, to = builder.inttoptr(source, FLOAT.as_pointer()), builder.inttoptr(to, FLOAT.as_pointer())
        rows = [builder.load(vector_at(builder, source, builder.mul(stride, number(i))), align=4) for i in range(WIDTH)]
        for i, row in enumerate(exchanged(builder, rows, STEPS)):
            builder.store(row, vector_at(builder, to, builder.mul(to_stride, number(i))), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def four_columns(builder: Any, rows: list[Any], k: Any) -> list[Any]:
    """Load columns k .. k + 3 of WIDTH rows (pointers) as four vectors.

    Four floats of each of several rows are loaded into one vector, so that only neighbours need be exchanged, and few vectors are alive.
    """
    kind = ir.VectorType(FLOAT, 4)
    vectors = []
    for i in range(4):
        parts = [builder.load(builder.bitcast(builder.gep(row, [k]), kind.as_pointer()), align=4) for row in rows[i::4]]
        while len(parts) > 1:
            all_lanes = ir.Constant(ir.VectorType(INT32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
            parts = [builder.shuffle_vector(*pair, all_lanes) for pair in zip(parts[::2], parts[1::2], strict=True)]
        vectors.append(parts[0])
    return exchanged(builder, vectors, (1, 2))


def turning_tile_of(rows: int) -> Any:
    """Make the same loop for `rows` x WIDTH sums with B not packed, for so few rows that packing would cost more than the product.

    tile(a, a_stride, b, b_stride, c, c_stride, depth, add):  c[i, j] = (c[i, j] if add) + sum over k < depth of a[i, k] b[j, k]
    The sums are those of `tile_of`, in the same order.
    """

    @intrinsic
    def tile(typing: Any, a: Any, a_stride: Any, b: Any, b_stride: Any, c: Any, c_stride: Any, depth: Any, add: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, a_stride, b, b_stride, c, c_stride, depth, add = args
            a, b, c = (builder.inttoptr(x, FLOAT.as_pointer()) for x in (a, b, c))
            rows_of_a = [builder.gep(a, [builder.mul(a_stride, number(i))]) for i in range(rows)]
            rows_of_b = [builder.gep(b, [builder.mul(b_stride, number(j))]) for j in range(WIDTH)]
            squares = builder.mul(builder.udiv(depth, number(WIDTH)), number(WIDTH))

            def add_products(sums: list[Any], column: Any, k: Any) -> list[Any]:
                left = [builder.load(builder.gep(row, [k]), align=4) for row in rows_of_a]
                return [
                    builder.fadd(builder.fmul(spread(builder, one), column, flags=FUSED), total, flags=FUSED)
                    for one, total in zip(left, sums, strict=True)
                ]

            def squares_at(k: Any, sums: list[Any]) -> list[Any]:
                for row in rows_of_b:
                    prefetch_at(builder, builder.gep(row, [builder.add(k, number(AHEAD))]), for_writing=0)
                for first in range(0, WIDTH, 4):
                    for step, column in enumerate(four_columns(builder, rows_of_b, builder.add(k, number(first)))):
                        sums = add_products(sums, column, builder.add(k, number(first + step)))
                return sums

            def single_at(k: Any, sums: list[Any]) -> list[Any]:
                column = ir.Constant(VECTOR, ir.Undefined)
                for j, row in enumerate(rows_of_b):
                    column = builder.insert_element(column, builder.load(builder.gep(row, [k]), align=4), ir.Constant(INT32, j))
                return add_products(sums, column, k)

            sums = [ir.Constant(VECTOR, [0.0] * WIDTH)] * rows
            sums = loop(builder, number(0), squares, WIDTH, sums, squares_at)
            sums = loop(builder, squares, depth, 1, sums, single_at)
            targets = [vector_at(builder, c, builder.mul(c_stride, number(i))) for i in range(rows)]
            with builder.if_else(builder.icmp_signed("!=", add, number(0))) as (adding, writing):
                with adding:
                    for total, target in zip(sums, targets, strict=True):
                        builder.store(builder.fadd(total, builder.load(target, align=4)), target, align=4)
                with writing:
                    for total, target in zip(sums, targets, strict=True):
                        builder.store(total, target, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return tile


def spread(builder: Any, one: Any) -> Any:
    """Return a vector with a float in every lane."""
    nothing = ir.Constant(VECTOR, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(nothing, one, ir.Constant(INT32, 0)), nothing, lanes([0] * WIDTH))


def loop(builder: Any, start: Any, stop: Any, step: int, values: list[Any], body: Any) -> list[Any]:
    """Emit a loop: values = body(k, values) for k from start to stop."""
    entry = builder.basic_block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    k, carried = builder.phi(INT64), [builder.phi(value.type) for value in values]
    builder.cbranch(builder.icmp_signed("<", k, stop), inside, after)
    builder.position_at_end(inside)
    results = body(k, list(carried))
    end, following = builder.basic_block, builder.add(k, number(step))
    builder.branch(head)
    for phi, first, then in ((k, start, following), *zip(carried, values, results, strict=True)):
        phi.add_incoming(first, entry)
        phi.add_incoming(then, end)
    builder.position_at_end(after)
    return carried


def copy_of(count: int) -> Any:
    """Make copy(source, to), which copies `count` floats at once."""

    @intrinsic
    def copy(typing: Any, source: Any, to: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.VectorType(FLOAT, count).as_pointer()
            builder.store(builder.load(builder.inttoptr(args[0], kind), align=4), builder.inttoptr(args[1], kind), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return copy


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Prefetch the cache line at an address, which need not be readable."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        prefetch_at(builder, builder.inttoptr(args[0], FLOAT.as_pointer()), for_writing=0)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def largest_of_vectors(typing: Any, address: Any, count: Any) -> Any:
    """Return the largest of at least WIDTH floats; it may miss a NaN. The last two vectors may overlap."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        start, count = builder.inttoptr(args[0], FLOAT.as_pointer()), args[1]
        entry, loop, after = builder.basic_block, builder.append_basic_block("vectors"), builder.append_basic_block("last")
        rest = builder.sub(count, number(WIDTH))
        last = builder.load(vector_at(builder, start, rest), align=4)
        builder.branch(loop)
        builder.position_at_end(loop)
        i, best = builder.phi(INT64), builder.phi(VECTOR)
        better = larger(builder.load(vector_at(builder, start, i), align=4), best)
        following = builder.add(i, number(WIDTH))
        for value, first, then in ((i, number(0), following), (best, last, better)):
            value.add_incoming(first, entry)
            value.add_incoming(then, loop)
        builder.cbranch(builder.icmp_signed("<", following, rest), loop, after)
        builder.position_at_end(after)
        step = WIDTH // 2
        while step:
            better = larger(better, builder.shuffle_vector(better, better, lanes([lane ^ step for lane in range(WIDTH)])))
            step //= 2
        return builder.extract_element(better, ir.Constant(INT32, 0))

    return types.float32(types.int64, types.int64), generate
