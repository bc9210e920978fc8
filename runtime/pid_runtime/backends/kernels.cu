// What decoders do on a GPU by themselves: noise, and the state of decodes in tiles or with
// guidance. The noise is what noise.py and "Noise" of docs/bundle-format.md define; the rest is
// what HostTiles of tiles.py (backends) does, to the bit.
//
// Philox 4x32-10 is from Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2,
// 3", SC'11. The source includes nothing, so that NVRTC compiles it as it is, and so that a test
// compiles it for the host. After a change run tools/compile_kernels.py, which writes kernels.ptx.

// Of the value that this thread is for.
static __device__ unsigned long long thread_index() {
    return (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
}

// Turns a counter into four random words, in place.
static __device__ void philox_4x32_10(unsigned int counter[4], unsigned int key0,
                                      unsigned int key1) {
    for (int round = 0; round < 10; ++round) {
        const unsigned long long product0 = 0xD2511F53ull * counter[0];
        const unsigned long long product1 = 0xCD9E8D57ull * counter[2];
        counter[0] = (unsigned int)(product1 >> 32) ^ counter[1] ^ key0;
        counter[1] = (unsigned int)product1;
        counter[2] = (unsigned int)(product0 >> 32) ^ counter[3] ^ key1;
        counter[3] = (unsigned int)product0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// A word as a number between 0 and 1, never either.
static __device__ double uniform(unsigned int word) {
    return (word + 0.5) * (1.0 / 4294967296.0);
}

// Two standard normals (Box and Muller) of two random words.
static __device__ void box_muller(unsigned int word0, unsigned int word1, float normals[2]) {
    const double radius = sqrt(-2.0 * log(uniform(word0)));
    const double angle = 6.283185307179586477 * uniform(word1);
    normals[0] = (float)(radius * cos(angle));
    normals[1] = (float)(radius * sin(angle));
}

// Values start to start + count - 1 of one draw of one image; start is a multiple of 4. A thread
// makes four of them: one counter's.
extern "C" __global__ void pid_standard_normal(float* out, unsigned long long count,
                                               unsigned long long seed, unsigned int draw,
                                               unsigned long long start) {
    const unsigned long long first = 4 * thread_index();
    if (first >= count) {
        return;
    }
    const unsigned long long block = (start + first) / 4;
    unsigned int words[4] = {(unsigned int)block, (unsigned int)(block >> 32), draw, 0};
    philox_4x32_10(words, (unsigned int)seed, (unsigned int)(seed >> 32));
    float normals[4];
    box_muller(words[0], words[1], normals);
    box_muller(words[2], words[3], normals + 2);
    for (int lane = 0; lane < 4 && first + lane < count; ++lane) {
        out[first + lane] = normals[lane];
    }
}

// The state of one image is rows of tokens, rows of `row_values` floats; a tile's are shorter, of
// `tile_row_values`. It begins at `row` and at value `left` of a row.

// Copies a tile of `count` values out of a state.
extern "C" __global__ void pid_take_tile(const float* state, float* tile, unsigned long long count,
                                         unsigned long long row_values,
                                         unsigned long long tile_row_values, unsigned long long row,
                                         unsigned long long left) {
    const unsigned long long i = thread_index();
    if (i >= count) {
        return;
    }
    const unsigned long long down = i / tile_row_values;
    tile[i] = state[(row + down) * row_values + left + (i - down * tile_row_values)];
}

// Adds a tile of `count` values, weighted, to a ring of rows: row n lies at n modulo `rows`.
// down, across: weights of the tile's pixels along each axis; a token has patch x patch of them.
extern "C" __global__ void pid_add_tile(float* ring, const float* tile, const float* down,
                                        const float* across, unsigned long long count,
                                        unsigned long long row_values,
                                        unsigned long long tile_row_values, unsigned long long row,
                                        unsigned long long left, unsigned int rows,
                                        unsigned int patch) {
    const unsigned long long i = thread_index();
    if (i >= count) {
        return;
    }
    const unsigned long long token_row = i / tile_row_values;
    const unsigned long long at = i - token_row * tile_row_values;
    const unsigned long long token = at / (3 * patch * patch);
    const unsigned int pixel = (unsigned int)(at - token * (3 * patch * patch)) / 3;
    const float weighted = __fmul_rn(tile[i], down[token_row * patch + pixel / patch]);
    const unsigned long long to = (row + token_row) % rows * row_values + left + at;
    ring[to] = __fadd_rn(ring[to], __fmul_rn(weighted, across[token * patch + pixel % patch]));
}

// The next state of `count` values, of the last one and the clean image; the ring's values become
// zero. before: clean images of the step before, which these replace; null where no step looks
// back. noise: null where there is none.
extern "C" __global__ void pid_mix(float* state, float* clean, float* before, const float* noise,
                                   unsigned long long count, float of_state, float of_clean,
                                   float of_before, float of_noise) {
    const unsigned long long i = thread_index();
    if (i >= count) {
        return;
    }
    const float seen = clean[i];
    float mixed = __fadd_rn(__fmul_rn(of_state, state[i]), __fmul_rn(of_clean, seen));
    if (before) {
        if (of_before != 0.0f) {
            mixed = __fadd_rn(mixed, __fmul_rn(of_before, before[i]));
        }
        before[i] = seen;
    }
    if (noise) {
        mixed = __fadd_rn(mixed, __fmul_rn(of_noise, noise[i]));
    }
    state[i] = mixed;
    clean[i] = 0.0f;
}
