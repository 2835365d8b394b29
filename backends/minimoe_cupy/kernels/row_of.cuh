// Returns the row of a table of `rows` that an id names: ids below zero count from the end, as indices of arrays do; `rows` means none.
#pragma once

__device__ inline int row_of(int id, int rows) {
    const int row = id < 0 ? id + rows : id;
    return row >= 0 && row < rows ? row : rows;
}
