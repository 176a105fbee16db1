/* Bits, pools, groups of integers, blocks of MXFP4 and codes of derivatives in one pass each, for float32 on the CPU.
 *
 * The results are those of the operators' own torch code, bit for bit: the same roundings in the same
 * order, so it is to be compiled without contraction, and the same noise of each place.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { MOST = 1 << 16, MX = 32 };

static inline float as_float(uint32_t word) { float x; memcpy(&x, &word, 4); return x; }
static inline uint32_t as_word(float x) { uint32_t word; memcpy(&word, &x, 4); return word; }
static inline float at_least(float x, float y) { return x > y ? x : y; }
static inline float at_most(float x, float y) { return x < y ? x : y; }

/* As fxmem.basics.noise.uniform. */
static inline float uniform(uint32_t place, uint32_t low, uint32_t high) {
    uint32_t h = place ^ low;
    h = (h ^ (h >> 16)) * 0x7FEB352Du ^ high;
    h = (h ^ (h >> 15)) * 0x846CA68Bu;
    h ^= h >> 16;
    return (float)(int32_t)(h >> 8) * 0x1p-24f;
}

/* What places from a multiple of 2^32 on are drawn by; no group crosses one.  Without a seed: the nearest. */
typedef struct { int seeded; uint32_t first, low, high; } Draws;

/* As fxmem.basics.noise.keys. */
static Draws draws_from(const int64_t *seed, int64_t stream, int64_t place) {
    if (!seed) return (Draws){0};
    uint64_t salt = (uint64_t)(stream + 1) * 0x9E3779B97F4A7C15u;
    uint64_t z = (uint64_t)*seed + salt + (uint64_t)(place >> 32) * 0xD1342543DE82EF95u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return (Draws){1, (uint32_t)place, (uint32_t)z, (uint32_t)(z >> 32)};
}

static inline float draw(Draws draws, int64_t i) {
    return draws.seeded ? uniform(draws.first + (uint32_t)i, draws.low, draws.high) : 0.5f;
}

/* Numbers in the order of integers: compilers find the least of integers many at a time. */
static inline int32_t ordered(uint32_t word) { return (int32_t)word ^ (((int32_t)word >> 31) & 0x7FFFFFFF); }
static inline float of_ordered(int32_t n) { return as_float((uint32_t)(n ^ ((n >> 31) & 0x7FFFFFFF))); }

/* Byte j of a row has the codes j, j + bytes, ... */
static void join(uint8_t *restrict words, const uint8_t *restrict codes, int64_t bytes, int bits) {
    for (int64_t j = 0; j < bytes; j++) words[j] = codes[j];
    for (int n = 1; n < 8 / bits; n++)
        for (int64_t j = 0; j < bytes; j++) words[j] |= (uint8_t)(codes[n * bytes + j] << (bits * n));
}

/* -- One bit an element --------------------------------------------------------------------------- */

enum { STRETCH = 64 };

/* Eight bytes of 0 or 1, the first one lowest. */
static inline uint8_t gathered(const uint8_t *flags) {
    uint64_t word;
    memcpy(&word, flags, 8);
    return (uint8_t)(word * 0x0102040810204080u >> 56);
}

void fxmem_pack(const uint8_t *mask, int64_t count, uint8_t *bits) {
    int64_t whole = count / 8;
    for (int64_t j = 0; j < whole; j++) bits[j] = gathered(mask + 8 * j);
    uint8_t rest[8] = {0};
    memcpy(rest, mask + 8 * whole, (size_t)(count % 8));
    if (count % 8) bits[whole] = gathered(rest);
}

/* What is not a number is above, and not positive. */
void fxmem_pack_above(const float *x, int64_t count, float threshold, uint8_t *bits) {
    for (int64_t at = 0; at < count; at += STRETCH) {
        int64_t left = count - at < STRETCH ? count - at : STRETCH;
        uint8_t flags[STRETCH] = {0};
        for (int64_t i = 0; i < left; i++) flags[i] = !(x[at + i] <= threshold);
        fxmem_pack(flags, left, bits + at / 8);
    }
}

void fxmem_pack_positive(const float *x, int64_t count, uint8_t *bits) {
    for (int64_t at = 0; at < count; at += STRETCH) {
        int64_t left = count - at < STRETCH ? count - at : STRETCH;
        uint8_t flags[STRETCH] = {0};
        for (int64_t i = 0; i < left; i++) flags[i] = x[at + i] > 0;
        fxmem_pack(flags, left, bits + at / 8);
    }
}

/* Each bit in a byte of its own, as 0 or 1. */
static inline uint64_t spread(uint8_t bits) {
    uint64_t word = bits * 0x0101010101010101u & 0x8040201008040201u;
    return (word + 0x7F7F7F7F7F7F7F7Fu) >> 7 & 0x0101010101010101u;
}

void fxmem_unpack(const uint8_t *bits, int64_t count, uint8_t *mask) {
    int64_t whole = count / 8;
    for (int64_t j = 0; j < whole; j++) {
        uint64_t word = spread(bits[j]);
        memcpy(mask + 8 * j, &word, 8);
    }
    uint64_t rest = count % 8 ? spread(bits[whole]) : 0;
    memcpy(mask + 8 * whole, &rest, (size_t)(count % 8));
}

/* Without a branch, so that compilers take many at a time. */
static inline float chosen(uint32_t bit, float where, float otherwise) {
    return as_float(as_word(otherwise) ^ ((as_word(where) ^ as_word(otherwise)) & -bit));
}

/* found: may be the gradient itself.  Where a bit is 0 comes the gradient times ``otherwise``. */
static inline void multiply(const float *grad, int64_t count, const uint8_t *bits, float where, float otherwise,
                            float *found) {
    for (int64_t j = 0; j < count / 8; j++)
        for (int k = 0; k < 8; k++) found[8 * j + k] = grad[8 * j + k] * chosen(bits[j] >> k & 1, where, otherwise);
    for (int64_t i = count / 8 * 8; i < count; i++)
        found[i] = grad[i] * chosen(bits[i / 8] >> i % 8 & 1, where, otherwise);
}

void fxmem_dropout_backward(const float *grad, int64_t count, const uint8_t *bits, float scale, float *found) {
    multiply(grad, count, bits, scale, 0.0f * scale, found);
}

void fxmem_leaky_relu_backward(const float *grad, int64_t count, const uint8_t *bits, float slope, float *found) {
    multiply(grad, count, bits, 1.0f, slope, found);
}

/* A zero where a bit is 0, whatever the gradient. */
void fxmem_threshold_backward(const float *grad, int64_t count, const uint8_t *bits, float *found) {
    for (int64_t j = 0; j < count / 8; j++)
        for (int k = 0; k < 8; k++) found[8 * j + k] = chosen(bits[j] >> k & 1, grad[8 * j + k], 0.0f);
    for (int64_t i = count / 8 * 8; i < count; i++) found[i] = chosen(bits[i / 8] >> i % 8 & 1, grad[i], 0.0f);
}

/* -- Max pools --------------------------------------------------------------------------------------- */

enum { KERNEL_WIDTH, STRIDE_Y, STRIDE_X, PADDING_Y, PADDING_X, DILATION_Y, DILATION_X };

/* Indices into planes of this width -> indices into windows, in the same layout. */
void fxmem_pool_offsets(const int64_t *indices, const int64_t *size, const int64_t *strides, int64_t width,
                        const int64_t *how, uint8_t *offsets) {
    uint32_t wide = (uint32_t)width, tall = (uint32_t)how[DILATION_Y], broad = (uint32_t)how[DILATION_X];
    for (int64_t n = 0; n < size[0]; n++) for (int64_t c = 0; c < size[1]; c++) for (int64_t y = 0; y < size[2]; y++) {
        int64_t row = n * strides[0] + c * strides[1] + y * strides[2], top = y * how[STRIDE_Y] - how[PADDING_Y];
        int64_t left = -how[PADDING_X];
        for (int64_t x = 0; x < size[3]; x++, row += strides[3], left += how[STRIDE_X]) {
            uint32_t index = (uint32_t)indices[row], line = index / wide;
            uint32_t down = line - (uint32_t)top, right = index - line * wide - (uint32_t)left;
            if (tall > 1) down /= tall;
            if (broad > 1) right /= broad;
            offsets[row] = (uint8_t)(down * (uint32_t)how[KERNEL_WIDTH] + right);
        }
    }
}

static inline int64_t within(int64_t at, int64_t size) { return at < 0 ? 0 : at < size ? at : size - 1; }

/* found: zeros.  Windows come in the order in which torch's kernel adds them up. */
void fxmem_pool_backward(const float *grad, const int64_t *size, const int64_t *strides, const uint8_t *offsets,
                         const int64_t *of_offsets, const int64_t *how, float *found, const int64_t *whole,
                         const int64_t *of_found) {
    int64_t down[256], right[256];
    for (int n = 0; n < 256; n++) {
        down[n] = n / how[KERNEL_WIDTH] * how[DILATION_Y];
        right[n] = n % how[KERNEL_WIDTH] * how[DILATION_X];
    }
    for (int64_t n = 0; n < size[0]; n++) for (int64_t c = 0; c < size[1]; c++) {
        float *plane = found + n * of_found[0] + c * of_found[1];
        for (int64_t y = 0; y < size[2]; y++) {
            const float *from = grad + n * strides[0] + c * strides[1] + y * strides[2];
            const uint8_t *code = offsets + n * of_offsets[0] + c * of_offsets[1] + y * of_offsets[2];
            int64_t top = y * how[STRIDE_Y] - how[PADDING_Y], left = -how[PADDING_X];
            for (int64_t x = 0; x < size[3]; x++, from += strides[3], code += of_offsets[3], left += how[STRIDE_X]) {
                int64_t row = within(top + down[*code], whole[2]), column = within(left + right[*code], whole[3]);
                plane[row * of_found[2] + column * of_found[3]] += *from;
            }
        }
    }
}

/* -- Groups of integers ------------------------------------------------------------------------- */

typedef struct { float step, first, constant; } Grid;

static float round_down(float first) {
    uint32_t word = as_word(first);
    if (fabsf(first) < 0x1p-14f) return floorf(first * 0x1p24f) * 0x1p-24f;
    return as_float((word + (first < 0 ? 0x1FFF : 0)) & ~0x1FFFu);
}

static Grid fit(const float *x, int64_t group, int bits) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    uint32_t wild = 0;
    for (int64_t i = 0; i < group; i++) {
        uint32_t word = as_word(x[i]);
        int32_t n = ordered(word);
        least = n < least ? n : least;
        most = n > most ? n : most;
        wild |= (word & 0x7F800000u) == 0x7F800000u;
    }
    float low = of_ordered(least), high = of_ordered(most);
    if (low == high) return (Grid){0.0f, 0.0f, low + 0.0f};
    if (wild) return (Grid){NAN, 0.0f, 0.0f};
    double levels = (double)((1 << bits) - 1);
    float share = (float)(1 / levels);
    float step = (high * share - low * share) * (float)(1 + 0x1p-20);
    step += fabsf(low) * (float)(0x1p-10 / levels);
    step = at_least(at_least(step, fabsf(low) * (float)(1 / 65000.0)), 0x1p-126f);
    step = as_float((as_word(step) + 0x7FFF) & ~0x7FFFu);
    float first = round_down(low / step);
    if (!isfinite(first * step) || !isfinite((first + (float)levels) * step)) return (Grid){NAN, 0.0f, 0.0f};
    return (Grid){step, first, 0.0f};
}

static uint16_t half(float first) {
    uint32_t word = as_word(first), sign = word >> 16 & 0x8000;
    float size = fabsf(first);
    if (size < 0x1p-14f) return (uint16_t)(sign | (uint32_t)(size * 0x1p24f));
    return (uint16_t)(sign | ((word & 0x7FFFFFFFu) - (112u << 23)) >> 13);
}

static float of_half(uint16_t word) {
    uint32_t size = word & 0x7FFF, sign = (uint32_t)(word & 0x8000) << 16;
    if (size < 0x400) return as_float(as_word((float)size * 0x1p-24f) | sign);
    return as_float(((size << 13) + (112u << 23)) | sign);
}

static void quantize_group(uint8_t *codes, const float *x, Draws draws, Grid grid, int64_t group, int bits) {
    float top = (float)((1 << bits) - 2), step = grid.step, first = grid.first;
    if (!(step > 0)) { /* what is not a number has codes of 0, and one value the places of its signs */
        for (int64_t i = 0; i < group; i++) codes[i] = step == 0 && x[i] > 0 ? (1 << bits) - 1 : 0;
        return;
    }
    float inverse = 1 / step;
    for (int64_t i = 0; i < group; i++) {
        float below = at_most(at_least(floorf(x[i] * inverse - first), 0.0f), top);
        float a = (below + first) * step, b = (below + 1 + first) * step;
        codes[i] = (uint8_t)((int)below + (x[i] - a > (b - a) * draw(draws, i)));
    }
}

void fxmem_quantize_groups(const float *x, int64_t count, uint8_t *code, int64_t group, int bits, const int64_t *seed, int64_t stream) {
    int64_t groups = (count + group - 1) / group, bytes = group * bits / 8;
    uint16_t *steps = (uint16_t *)code, *firsts = steps + groups;
    uint8_t *words = code + 4 * groups;
    float last[MOST];
    uint8_t codes[MOST];
    for (int64_t g = 0; g < groups; g++, words += bytes) {
        int64_t at = g * group;
        const float *part = x + at;
        if (count - at < group) { /* filled up with its last element */
            for (int64_t i = 0; i < group; i++) last[i] = x[i < count - at ? at + i : count - 1];
            part = last;
        }
        Grid grid = fit(part, group, bits);
        quantize_group(codes, part, draws_from(seed, stream, at), grid, group, bits);
        join(words, codes, bytes, bits);
        if (grid.step == 0) memcpy(words, &grid.constant, 4);
        steps[g] = isnan(grid.step) ? 0xFFFF : (uint16_t)(as_word(grid.step) >> 15);
        firsts[g] = half(grid.first);
    }
}

void fxmem_dequantize_groups(float *x, int64_t count, const uint8_t *code, int64_t group, int bits) {
    int64_t groups = (count + group - 1) / group, bytes = group * bits / 8;
    const uint16_t *steps = (const uint16_t *)code, *firsts = steps + groups;
    const uint8_t *words = code + 4 * groups;
    int mask = (1 << bits) - 1;
    for (int64_t g = 0; g < groups; g++, words += bytes) {
        float step = as_float((uint32_t)steps[g] << 15), first = of_half(firsts[g]), constant = 0.0f;
        if (step == 0) memcpy(&constant, words, 4);
        int64_t at = g * group, left = count - at < group ? count - at : group;
        for (int n = 0; n < 8 / bits; n++) {
            float *row = x + at + n * bytes;
            int64_t here = left - n * bytes < bytes ? left - n * bytes : bytes;
            for (int64_t j = 0; j < here; j++)
                row[j] = ((float)(words[j] >> (bits * n) & mask) + first) * step + constant;
        }
    }
}

/* -- Blocks of MXFP4 ---------------------------------------------------------------------------- */

static const float VALUES[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0f, -0.5, -1, -1.5, -2, -3, -4, -6};

void fxmem_quantize_mxfp4(const float *x, int64_t count, uint8_t *code, const int64_t *seed, int64_t stream) {
    int64_t blocks = (count + MX - 1) / MX;
    uint8_t *words = code + blocks, codes[MX];
    float last[MX];
    for (int64_t g = 0; g < blocks; g++, words += MX / 2) {
        int64_t at = g * MX;
        const float *part = x + at;
        if (count - at < MX) {
            for (int64_t i = 0; i < MX; i++) last[i] = x[i < count - at ? at + i : count - 1];
            part = last;
        }
        int32_t most = 0;
        for (int64_t i = 0; i < MX; i++) {
            int32_t size = (int32_t)(as_word(part[i]) & 0x7FFFFFFFu);
            most = size > most ? size : most;
        }
        float largest = as_float((uint32_t)most);
        float scale = as_float((as_word(at_least(largest / 6.0f, 0x1p-126f)) + 0x7FFFFF) & 0x7F800000u);
        if (!isfinite(largest) || !isfinite(6.0f * scale)) {
            /* what `top` of the torch code is: the number above the largest element, as it comes back */
            float units = at_most(largest / scale, 6.0f);
            float step = at_least(as_float(as_word(units) & 0x7F800000u) * 0.5f, 0.5f);
            float high = at_most(step + floorf(units / step) * step, 6.0f);
            if (!isfinite(largest) || !isfinite(high * scale)) {
                code[g] = 255;
                memset(words, 0, MX / 2);
                continue;
            }
        }
        Draws draws = draws_from(seed, stream, at);
        for (int64_t i = 0; i < MX; i++) {
            float size = fabsf(part[i]), units = at_most(size / scale, 6.0f);
            float step = at_least(as_float(as_word(units) & 0x7F800000u) * 0.5f, 0.5f);
            float low = floorf(units / step) * step, high = at_most(step + low, 6.0f);
            float a = low * scale, b = high * scale;
            float value = size - a > (b - a) * draw(draws, i) ? high : low;
            float index = at_most(at_most(value * 2, value + 2), value * 0.5f + 4);
            codes[i] = (uint8_t)((int)index | (int)(as_word(part[i]) >> 31 << 3));
        }
        join(words, codes, MX / 2, 4);
        code[g] = (uint8_t)(as_word(scale) >> 23);
    }
}

void fxmem_dequantize_mxfp4(float *x, int64_t count, const uint8_t *code) {
    int64_t blocks = (count + MX - 1) / MX;
    const uint8_t *words = code + blocks;
    for (int64_t g = 0; g < blocks; g++, words += MX / 2) {
        float scale = code[g] == 255 ? NAN : as_float((uint32_t)code[g] << 23), all[MX];
        for (int j = 0; j < MX / 2; j++) {
            all[j] = VALUES[words[j] & 15] * scale;
            all[j + MX / 2] = VALUES[words[j] >> 4] * scale;
        }
        int64_t left = count - g * MX;
        memcpy(x + g * MX, all, (left < MX ? left : MX) * sizeof(float));
    }
}

/* -- Derivatives of activations -------------------------------------------------------------------- */

enum { GROUP = 64 };

/* Of whole groups of derivatives, the first of which is at this place. */
void fxmem_round_derivatives(const float *derivatives, int64_t groups, uint8_t *words, float first, float inside,
                             int bits, const int64_t *seed, int64_t stream, int64_t place) {
    float top = (float)((1 << bits) - 2);
    uint8_t codes[GROUP];
    int64_t bytes = GROUP * bits / 8;
    for (int64_t g = 0; g < groups; g++, derivatives += GROUP, words += bytes) {
        Draws draws = draws_from(seed, stream, place + g * GROUP);
        for (int64_t i = 0; i < GROUP; i++) {
            float steps = derivatives[i] * inside - first;
            float below = at_most(at_least(floorf(steps), 0.0f), top);
            codes[i] = (uint8_t)((int)below + (steps - below > draw(draws, i)));
        }
        join(words, codes, bytes, bits);
    }
}

/* What has a derivative for each code of the words; it may be the gradient itself. */
void fxmem_multiply_derivatives(const float *grad, int64_t count, const uint8_t *words, float first, float inside,
                                float added, int bits, float *found) {
    float values[256];
    int64_t bytes = GROUP * bits / 8;
    int mask = (1 << bits) - 1;
    for (int n = 0; n <= mask; n++) values[n] = ((float)n + first) / inside + added;
    for (int64_t at = 0; at < count; at += GROUP, words += bytes) {
        int64_t left = count - at < GROUP ? count - at : GROUP;
        for (int n = 0; n < 8 / bits; n++) {
            int64_t row = at + n * bytes, here = left - n * bytes < bytes ? left - n * bytes : bytes;
            for (int64_t j = 0; j < here; j++) found[row + j] = values[words[j] >> (bits * n) & mask] * grad[row + j];
        }
    }
}
