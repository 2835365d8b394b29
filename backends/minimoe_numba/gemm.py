"""The float32 matrix product: C = op(A) op(B) + beta C, on one thread, called by its address with the arguments of cblas_sgemm.

It follows Goto and van de Geijn 2008 and the BLIS project: op(B) is packed, DEPTH rows and WIDE_BLOCK columns at a time, into panels of
COLUMNS, each of which stays in the first cache while tiles of C (`vector.py`) are summed in registers over all rows of op(A). op(A) is not
packed, except for a transposed A if many columns repay that. A product of few rows, as in decoding, takes the time of reading B once.

    for columns j of C, WIDE_BLOCK at a time
        for depth k, DEPTH at a time              pack op(B)[k, j] into panels
            for rows i of C, TALL_BLOCK at a time   perhaps pack A^T[i, k]; it stays in the second cache
                for each panel, for each tile         sum in registers

Every element is the same sum in the same order wherever it is, so results do not depend on how threads share out rows or columns.
"""

from typing import Any

import numpy as np
from numba.core import types

from minimoe_numba.codegen import for_kernels, optimised_names
from minimoe_numba.compiling import Functions, callback_of, inlined, stamp
from minimoe_numba.native import PLAIN, floats_at
from minimoe_numba.vector import COLUMNS, ROWS, WIDTH, copy_of, prefetch, tile_of, transpose_square, turning_tile_of

DEPTH, WIDE_BLOCK, TALL_BLOCK = 256, 512, 128
FEW = 8  # rows of C up to which B is not packed: packing would cost more than the product
NARROW = 128  # the same limit on columns, for a B that is not transposed: they are read a strip at a time
REPAYS = 48  # columns above which packing a transposed A repays its cost
LINE = 16  # floats per cache line: panels begin on one, one line more than a power of two apart, so that they do not share cache sets
TALL = ROWS[0]
COPIED = 16 if TALL > 8 else 8  # floats that copy_column moves: no fewer than TALL
copy_row, copy_column = copy_of(COLUMNS), copy_of(COPIED)


def strip_of(sizes: tuple[int, ...], row_major: bool) -> Any:
    """Make strip(a, stride, next_tile, panel, panel_stride, c, c_stride, rows, depth, add): tiles one below another, the tallest first.

    `next_tile`: the bytes in A from one of the tallest tiles to the next. Smaller tiles follow in consecutive rows.
    """
    rows_here, tile = sizes[0], tile_of(sizes[0], row_major)
    rest: Any = strip_of(sizes[1:], row_major) if len(sizes) > 1 else None

    @inlined
    def last(a, stride, next_tile, panel, panel_stride, c, c_stride, rows, depth, add):  # type: ignore[no-untyped-def]
        if rows:
            tile(a, stride, panel, panel_stride, c, c_stride, depth, add)

    @inlined
    def strip(a, stride, next_tile, panel, panel_stride, c, c_stride, rows, depth, add):  # type: ignore[no-untyped-def]
        while rows >= rows_here:
            tile(a, stride, panel, panel_stride, c, c_stride, depth, add)
            a += next_tile
            c += 4 * rows_here * c_stride
            rows -= rows_here
        rest(a, stride, step_of_rest * (stride if row_major else 1), panel, panel_stride, c, c_stride, rows, depth, add)

    step_of_rest = 4 * sizes[1] if len(sizes) > 1 else 0
    return last if rest is None else strip


strip_row_major, strip_column_major = strip_of(ROWS, True), strip_of(ROWS, False)


def turning_strip_of(sizes: tuple[int, ...]) -> Any:
    """Make the same for a B that is not packed, and WIDTH columns of C."""
    rows_here, tile = sizes[0], turning_tile_of(sizes[0])
    rest: Any = turning_strip_of(sizes[1:]) if len(sizes) > 1 else None

    @inlined
    def last(a, a_stride, b, b_stride, c, c_stride, rows, depth, add):  # type: ignore[no-untyped-def]
        if rows:
            tile(a, a_stride, b, b_stride, c, c_stride, depth, add)

    @inlined
    def strip(a, a_stride, b, b_stride, c, c_stride, rows, depth, add):  # type: ignore[no-untyped-def]
        while rows >= rows_here:
            tile(a, a_stride, b, b_stride, c, c_stride, depth, add)
            a += 4 * rows_here * a_stride
            c += 4 * rows_here * c_stride
            rows -= rows_here
        rest(a, a_stride, b, b_stride, c, c_stride, rows, depth, add)

    return last if rest is None else strip


turning_strip = turning_strip_of((8, 7, 6, 5, 4, 3, 2, 1))


@inlined
def few_rows_turned(m, n, k, a, lda, b, ldb, add, c, ldc):  # type: ignore[no-untyped-def]
    """C = A B^T (+ C) without packing, for the columns of C that fill vectors.   -> the number of these columns"""
    whole = n // WIDTH * WIDTH
    for j in range(0, whole, WIDTH):
        for first in range(0, k, DEPTH):
            depth = min(DEPTH, k - first)
            turning_strip(a + 4 * first, lda, b + 4 * (j * ldb + first), ldb, c + 4 * j, ldc, m, depth, 1 if first else add)
    return whole


@inlined
def few_rows_plain(m, n, k, a, lda, b, ldb, add, c, ldc):  # type: ignore[no-untyped-def]
    """C = A B (+ C), in the same way."""
    whole = n // COLUMNS * COLUMNS
    for first in range(0, k, DEPTH):
        depth, sums = min(DEPTH, k - first), 1 if first else add
        for j in range(0, whole, COLUMNS):
            strip_row_major(a + 4 * first, lda, 4 * TALL * lda, b + 4 * (first * ldb + j), ldb, c + 4 * j, ldc, m, depth, sums)
    return whole


@inlined
def panel_bytes(depth, width):  # type: ignore[no-untyped-def]
    """Return the bytes from one panel to the next, for panels of `width` floats per row."""
    return 4 * (depth * width + LINE)


@inlined
def pack_rows(b, stride, depth, columns, panels):  # type: ignore[no-untyped-def]
    """Pack B [depth,columns] into panels, row by row as it is in memory. The last panel is padded with zeros."""
    step, rest = panel_bytes(depth, COLUMNS), columns % COLUMNS
    for k in range(depth):
        source, to = b + 4 * k * stride, panels + 4 * k * COLUMNS
        for _ in range(columns // COLUMNS):
            copy_row(source, to)
            source += 4 * COLUMNS
            to += step
        if rest:
            row, few = floats_at(to, COLUMNS), floats_at(source, rest)
            for j in range(rest):
                row[j] = few[j]
            for j in range(rest, COLUMNS):
                row[j] = np.float32(0.0)


@inlined
def pack_transposed(b, stride, depth, columns, panels):  # type: ignore[no-untyped-def]
    """Pack B^T into panels, for B [columns,depth]. Squares are transposed in registers while the next are prefetched."""
    step = panel_bytes(depth, COLUMNS)
    squares = depth // WIDTH * WIDTH
    for first in range(0, columns, COLUMNS):
        count = min(COLUMNS, columns - first)
        whole = count // WIDTH * WIDTH
        source = b + 4 * first * stride
        for k in range(0, squares, WIDTH):
            for j in range(0, whole, WIDTH):
                square = source + 4 * (j * stride + k)
                for i in range(WIDTH):
                    prefetch(square + 4 * (i * stride + WIDTH))
                transpose_square(square, stride, panels + 4 * (k * COLUMNS + j), COLUMNS)
        for k in range(depth):
            row = floats_at(panels + 4 * k * COLUMNS, COLUMNS)
            for j in range(whole if k < squares else 0, count):
                row[j] = floats_at(source + 4 * (j * stride + k), 1)[0]
            for j in range(count, COLUMNS):
                row[j] = np.float32(0.0)
        panels += step


@inlined
def pack_columns(a, stride, depth, rows, panels):  # type: ignore[no-untyped-def]
    """Pack A [depth,rows] into panels of TALL rows, row by row as it is in memory."""
    step = panel_bytes(depth, TALL)
    whole = max(0, (rows - (COPIED - TALL)) // TALL)  # a copy writes beyond the panel: the next copy overwrites that
    for k in range(depth):
        source, to = a + 4 * k * stride, panels + 4 * k * TALL
        for _ in range(whole):
            copy_column(source, to)
            source += 4 * TALL
            to += step
        for first in range(whole * TALL, rows, TALL):
            count = min(TALL, rows - first)
            row, few = floats_at(to, count), floats_at(source, count)
            for i in range(count):
                row[i] = few[i]
            source += 4 * TALL
            to += step


@inlined
def finish_edge(edge, c, c_stride, rows, columns, add):  # type: ignore[no-untyped-def]
    """Copy or add to C those columns of a strip that C has. `edge` holds the whole strip."""
    for i in range(rows):
        row, few = floats_at(c + 4 * i * c_stride, columns), floats_at(edge + 4 * i * COLUMNS, columns)
        for j in range(columns):
            row[j] = few[j] + (row[j] if add else np.float32(0.0))


@inlined
def scale(c, stride, rows, columns, beta):  # type: ignore[no-untyped-def]
    for i in range(rows):
        row = floats_at(c + 4 * i * stride, columns)
        for j in range(columns):
            row[j] = row[j] * beta if beta != np.float32(0.0) else np.float32(0.0)


def sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):  # type: ignore[no-untyped-def]
    """cblas_sgemm for row-major matrices and alpha = 1; `order` and `alpha` are ignored."""
    turned_a, turned_b = trans_a != PLAIN, trans_b != PLAIN
    if k == 0 or (beta != np.float32(0.0) and beta != np.float32(1.0)):
        scale(c, ldc, m, n, beta)
    if m <= FEW and not turned_a and (turned_b or n <= NARROW):
        add_to_c = 1 if beta != np.float32(0.0) else 0
        if turned_b:
            done = few_rows_turned(m, n, k, a, lda, b, ldb, add_to_c, c, ldc)
        else:
            done = few_rows_plain(m, n, k, a, lda, b, ldb, add_to_c, c, ldc)
        b += 4 * done * (ldb if turned_b else 1)
        c += 4 * done
        n -= done
        if n == 0:
            return
    deep, packs_a = min(k, DEPTH), turned_a and n > REPAYS
    b_floats = (min(n, WIDE_BLOCK) + COLUMNS - 1) // COLUMNS * (deep * COLUMNS + LINE)
    a_floats = (min(m, TALL_BLOCK) // TALL + 1) * (deep * TALL + LINE) if packs_a else 0
    space = np.empty(LINE + b_floats + a_floats + (TALL_BLOCK * COLUMNS if n % COLUMNS else 0), np.float32)
    b_panels = (space.ctypes.data + 63) // 64 * 64  # a cache line begins there
    a_panels = b_panels + 4 * b_floats
    edge = a_panels + 4 * a_floats
    for j in range(0, n, WIDE_BLOCK):
        columns = min(WIDE_BLOCK, n - j)
        for first in range(0, k, DEPTH):
            depth = min(DEPTH, k - first)
            add = 1 if first or beta != np.float32(0.0) else 0
            if turned_b:
                pack_transposed(b + 4 * (j * ldb + first), ldb, depth, columns, b_panels)
            else:
                pack_rows(b + 4 * (first * ldb + j), ldb, depth, columns, b_panels)
            for i in range(0, m, TALL_BLOCK):
                rows = min(TALL_BLOCK, m - i)
                a_here = a + 4 * (first * lda + i if turned_a else i * lda + first)
                if packs_a:
                    pack_columns(a_here, lda, depth, rows, a_panels)
                for strip in range((columns + COLUMNS - 1) // COLUMNS):
                    there = min(COLUMNS, columns - strip * COLUMNS)
                    panel, to = b_panels + strip * panel_bytes(depth, COLUMNS), c + 4 * (i * ldc + j + strip * COLUMNS)
                    whole = there == COLUMNS
                    target, stride, sums = (to, ldc, add) if whole else (edge, COLUMNS, 0)
                    if turned_a:
                        left, step, next_tile = (a_panels, TALL, panel_bytes(depth, TALL)) if packs_a else (a_here, lda, 4 * TALL)
                        strip_column_major(left, step, next_tile, panel, COLUMNS, target, stride, rows, depth, sums)
                    else:
                        strip_row_major(a_here, lda, 4 * TALL * lda, panel, COLUMNS, target, stride, rows, depth, sums)
                    if not whole:
                        finish_edge(edge, to, ldc, rows, there, add)
    space[0] = np.float32(0.0)  # Numba frees an array after its last use, and does not see that its address is used


def compile_sgemm() -> Any:
    """Compile `sgemm` as a C function. Its address is the attribute `address`."""
    with for_kernels():
        return callback_of(sgemm, SIGNATURE, nopython=True, error_model="numpy")


SIGNATURE = types.void(
    types.int32, types.int32, types.int32, types.int64, types.int64, types.int64, types.float32, types.int64, types.int64, types.int64,
    types.int64, types.float32, types.int64, types.int64,
)  # fmt: skip
sgemm.__qualname__ = sgemm.__name__ = f"sgemm_{stamp('codegen', 'compiling', 'native', 'vector')}"
optimised_names.add(sgemm.__qualname__)
machine_code = Functions("gemm", [(sgemm, SIGNATURE)], compile_sgemm)
