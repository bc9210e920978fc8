// The decoder's noise on a GPU: what noise.py and "Noise" of docs/bundle-format.md define.
//
// Philox 4x32-10 is from Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2,
// 3", SC'11. The source includes nothing, so that NVRTC compiles it as it is, and so that a test
// compiles it for the host.

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

// Values 0 to count - 1 of one draw of one image. A thread makes four of them: one counter's.
extern "C" __global__ void pid_standard_normal(float* out, unsigned long long count,
                                               unsigned long long seed, unsigned int draw) {
    const unsigned long long block = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned long long first = 4 * block;
    if (first >= count) {
        return;
    }
    unsigned int words[4] = {(unsigned int)block, (unsigned int)(block >> 32), draw, 0};
    philox_4x32_10(words, (unsigned int)seed, (unsigned int)(seed >> 32));
    float normals[4];
    box_muller(words[0], words[1], normals);
    box_muller(words[2], words[3], normals + 2);
    for (int lane = 0; lane < 4 && first + lane < count; ++lane) {
        out[first + lane] = normals[lane];
    }
}
