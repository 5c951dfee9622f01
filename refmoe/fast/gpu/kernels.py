"""CUDA kernels: stored matrices times a few tokens, decoded in registers. Source, and its launches.

    rows_R_T   y[t, r] = Σ_i W[r, i]·x[t, i]         R rows to a warp, at most T tokens
    decode     rows of W as float32                   for cuBLAS: many tokens, a tile at a time
    latent     y[t, h, c] = Σ_n W[h·every + n, c]·x[t, h, n]      queries made latent (model/mla.py)

A *form* reads a chunk of a row: 16 bytes, or one block of Q8_0 and Q4_0. In `rows` a block of 256
threads is 8 warps; a warp has R rows, and lane l of it the chunks l, l + 32, … of each, so that 32
lanes read 512 bytes next to each other, several such in flight. x comes in stages of 4096 numbers
through shared memory, where number 4k … 4k + 3 of chunk j lies at [k][j] with one place of padding:
lanes then read 16 bytes side by side, and the threads that wrote them met no bank twice. Two rows
share what a lane read of x. A grid's second axis is heads, each with rows and an x of its own; one
product is one head.

    sum of a chunk, in order; times its scale; chunks of a lane, in order; 32 lanes, in a tree

so that a product is added to at most `depth(form, I)` = WIDE + ⌈I / (32 WIDE)⌉ + 7 times, and

    |y - W x| ≤ γ(depth) · Σ_i |W[r, i]·x[i]|          γ(n) = n u / (1 - n u), u = 2⁻²⁴

(Higham, Accuracy and Stability, §3.1 and §4.2: γ of the height of the tree of additions). In
`latent` the height is N + 2. Codes to float32: an integer q below 2⁸ is the low bits of 2²³ + q,
which one exact subtraction gives back; e4m3 is moved to a float's place and multiplied by 2¹²⁰,
exact, NaN by hand; bf16 is the upper half of a float32. No header is needed: NVRTC has all of it
built in.

Sources: NVIDIA, CUDA C++ Programming Guide (memory accesses, warp shuffles) and PTX ISA (prmt,
cvt); Q8_0 and Q4_0 as in ggml-org/llama.cpp `ggml-common.h`. Twin: `refmoe.model.matrix.linear`.
"""

from typing import NamedTuple

THREADS = 256
WARPS = THREADS // 32
NUMBERS = 4096  # of x in shared memory, of all tokens together
TOKENS = (1, 2, 4)  # kernels are made for
FEW = 4


class Form(NamedTuple):
    """How a stored format is read in chunks."""

    name: str
    struct: str  # in the source
    wide: int  # columns of a chunk
    aligned: int  # bytes that a row must be a multiple of
    columns: int = 0  # that share a scale, where blocks of another width are no such form


FORMS = {
    form.name: form
    for form in (
        Form("f32", "F32", 4, 16),
        Form("f16", "F16", 8, 16),
        Form("bf16", "Bf16", 8, 16),
        Form("fp8", "Fp8", 16, 16, 128),
        Form("int4", "Int4", 32, 16),
        Form("q8", "Q8", 32, 2),
        Form("q4", "Q4", 32, 2),
    )
}


def depth(form: Form, columns: int) -> int:
    """Return how often, at most, one product of `rows` is rounded or added to."""
    return form.wide + -(-columns // (32 * form.wide)) + 7


def shared_bytes(form: Form) -> int:
    """Return the bytes of shared memory that x takes with its padding, for any number of tokens."""
    return 4 * (NUMBERS + form.wide * TOKENS[-1])


COMMON = r"""
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define NUMBERS 4096
#define WARPS 8

static __device__ __forceinline__ float widen(u16 half) {
    // float16: the exponent is 112 less than in a float32; subnormal numbers come out right as well
    const u32 sign = (u32)(half & 0x8000) << 16, rest = (u32)(half & 0x7fff) << 13;
    if (rest >= 0x0f800000u) return __uint_as_float(sign | 0x70000000u | rest);  // infinity, NaN
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * 5.192296858534828e33f));
}

static __device__ __forceinline__ float integer(u32 q, float offset) {
    // q - offset: these are the bits of 2^23 + q
    return __uint_as_float(0x4b000000u | q) - (8388608.0f + offset);
}

static __device__ __forceinline__ uint4 sixteen(const u8* p) {
    return __ldg((const uint4*)p);
}

// Each form: WIDE columns a chunk, CHUNKS in flight for each row, a chunk's bytes, its numbers
// without the scale, the scale, and one element with everything, for `decode` and `latent`.

struct F32 {
    static const int WIDE = 4, CHUNKS = 4;
    uint4 v;
    __device__ void load(const u8* w, const u8* s, int j) { v = sixteen(w + 16 * j); }
    __device__ void numbers(float* out) const {
        out[0] = __uint_as_float(v.x), out[1] = __uint_as_float(v.y);
        out[2] = __uint_as_float(v.z), out[3] = __uint_as_float(v.w);
    }
    __device__ float scale() const { return 1.0f; }
    static __device__ float element(const u8* w, const u8* s, int c) {
        return __ldg((const float*)w + c);
    }
};

struct F16 {
    static const int WIDE = 8, CHUNKS = 4;
    uint4 v;
    __device__ void load(const u8* w, const u8* s, int j) { v = sixteen(w + 16 * j); }
    __device__ void numbers(float* out) const {
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            out[2 * k] = widen((u16)(words[k] & 0xffff));
            out[2 * k + 1] = widen((u16)(words[k] >> 16));
        }
    }
    __device__ float scale() const { return 1.0f; }
    static __device__ float element(const u8* w, const u8* s, int c) {
        return widen(__ldg((const u16*)w + c));
    }
};

struct Bf16 {
    static const int WIDE = 8, CHUNKS = 4;
    uint4 v;
    __device__ void load(const u8* w, const u8* s, int j) { v = sixteen(w + 16 * j); }
    __device__ void numbers(float* out) const {
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            out[2 * k] = __uint_as_float(words[k] << 16);
            out[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
        }
    }
    __device__ float scale() const { return 1.0f; }
    static __device__ float element(const u8* w, const u8* s, int c) {
        return __uint_as_float((u32)__ldg((const u16*)w + c) << 16);
    }
};

struct Fp8 {  // 128 columns to a scale
    static const int WIDE = 16, CHUNKS = 2;
    uint4 v;
    float per;
    static __device__ __forceinline__ float e4m3(u32 code) {
        const u32 bits = (code & 0x80) << 24 | (code & 0x7f) << 20;
        const float x = __uint_as_float(bits) * 1.329227995784916e36f;  // 2^120
        return (code & 0x7f) == 0x7f ? __uint_as_float(0x7fc00000u) : x;
    }
    __device__ void load(const u8* w, const u8* s, int j) {
        v = sixteen(w + 16 * j);
        per = __ldg((const float*)s + (j >> 3));
    }
    __device__ void numbers(float* out) const {
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        #pragma unroll
        for (int k = 0; k < 16; k++) out[k] = e4m3(words[k / 4] >> (8 * (k % 4)) & 0xff);
    }
    __device__ float scale() const { return per; }
    static __device__ float element(const u8* w, const u8* s, int c) {
        return e4m3(__ldg(w + c)) * __ldg((const float*)s + (c >> 7));
    }
};

struct Int4 {  // 16 bytes are a group of 32: eight nibbles a word, lowest first
    static const int WIDE = 32, CHUNKS = 2;
    uint4 v;
    u16 per;
    __device__ void load(const u8* w, const u8* s, int j) {
        v = sixteen(w + 16 * j);
        per = __ldg((const u16*)s + j);
    }
    __device__ void numbers(float* out) const {
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        #pragma unroll
        for (int k = 0; k < 32; k++)
            out[k] = integer(words[k / 8] >> (4 * (k % 8)) & 15, 8.0f);
    }
    __device__ float scale() const { return __uint_as_float((u32)per << 16); }
    static __device__ float element(const u8* w, const u8* s, int c) {
        const u32 code = __ldg(w + c / 2) >> (4 * (c & 1)) & 15;
        return integer(code, 8.0f) * __uint_as_float((u32)__ldg((const u16*)s + c / 32) << 16);
    }
};

// A block of Q8_0 or Q4_0 begins at an even address: the scale, then 4 N bytes of codes. Its whole
// words, N of them, are read as such, and the two bytes before or behind them by themselves; which
// of these it is, every second lane sees differently, so it is a shift and no branch.
template <int N>
static __device__ __forceinline__ u32 block_of(const u8* p, u32* codes) {
    const u32 before = (u32)(size_t)p & 2;  // the two bytes are the scale
    const u32 two = __ldg((const u16*)(before ? p : p + 4 * N));
    u32 words[N + 1];
    #pragma unroll
    for (int k = 0; k < N; k++) words[k] = __ldg((const u32*)(p + before) + k);
    words[N] = two;
    #pragma unroll
    for (int k = 0; k < N; k++)
        codes[k] = __funnelshift_r(words[k], words[k + 1], before ? 0 : 16);
    return before ? two : words[0] & 0xffff;
}

struct Q8 {
    static const int WIDE = 32, CHUNKS = 2;
    u32 codes[8], per;
    __device__ void load(const u8* w, const u8* s, int j) { per = block_of<8>(w + 34 * j, codes); }
    __device__ void numbers(float* out) const {
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            const u32 raised = codes[k] ^ 0x80808080u;  // code + 128
            #pragma unroll
            for (int n = 0; n < 4; n++)
                out[4 * k + n] =
                    __uint_as_float(__byte_perm(raised, 0x4b000000u, 0x7540 | n)) - 8388736.0f;
        }
    }
    __device__ float scale() const { return widen((u16)per); }
    static __device__ float element(const u8* w, const u8* s, int c) {
        const u8* p = w + 34 * (c / 32);
        return (float)(signed char)__ldg(p + 2 + c % 32) * widen(__ldg((const u16*)p));
    }
};

struct Q4 {  // byte j: number j low, number j + 16 high
    static const int WIDE = 32, CHUNKS = 2;
    u32 codes[4], per;
    __device__ void load(const u8* w, const u8* s, int j) { per = block_of<4>(w + 18 * j, codes); }
    __device__ void numbers(float* out) const {
        #pragma unroll
        for (int k = 0; k < 32; k++) {
            const u32 code = codes[k % 16 / 4] >> (8 * (k % 4) + 4 * (k / 16)) & 15;
            out[k] = integer(code, 8.0f);
        }
    }
    __device__ float scale() const { return widen((u16)per); }
    static __device__ float element(const u8* w, const u8* s, int c) {
        const u8* p = w + 18 * (c / 32);
        const u32 code = __ldg(p + 2 + c % 16) >> (4 * (c % 32 / 16)) & 15;
        return integer(code, 8.0f) * widen(__ldg((const u16*)p));
    }
};

static __device__ __forceinline__ float sum_of_lanes(float x) {
    #pragma unroll
    for (int n = 16; n; n /= 2) x += __shfl_xor_sync(0xffffffffu, x, n);
    return x;
}

template <class F, int R, int T>
static __device__ __forceinline__ void rows(
    const u8* __restrict__ w, i64 w_row, const u8* __restrict__ s, i64 s_row, int share,
    const float* __restrict__ x, i64 x_row, i64 x_head, float* __restrict__ y, i64 y_row,
    i64 y_head, int chunks, int tokens, int first, int count, int every
) {
    const int FOURS = F::WIDE / 4, STAGE = NUMBERS / T / F::WIDE;  // float4s, chunks
    extern __shared__ float4 stage[];  // [T][FOURS][STAGE + 1]
    const int lane = threadIdx.x % 32;
    const int r0 = (blockIdx.x * WARPS + threadIdx.x / 32) * R;
    x += blockIdx.y * x_head;
    y += blockIdx.y * y_head;
    const u8 *row[R], *scale[R];
    float sums[R][T];
    #pragma unroll
    for (int r = 0; r < R; r++) {
        // the last rows are read again by warps that have none left, and not written
        const int n = blockIdx.y * every + first + (r0 + r < count ? r0 + r : count - 1);
        row[r] = w + n * w_row;
        scale[r] = s + n / share * s_row;
        #pragma unroll
        for (int t = 0; t < T; t++) sums[r][t] = 0.0f;
    }
    for (int begin = 0; begin < chunks; begin += STAGE) {
        const int here = min(STAGE, chunks - begin);
        __syncthreads();
        for (int t = 0; t < T; t++) {
            const float4* from = (const float4*)(x + (t < tokens ? t : 0) * x_row) + begin * FOURS;
            float4* to = stage + t * FOURS * (STAGE + 1);
            for (int f = threadIdx.x; f < here * FOURS; f += 32 * WARPS)
                to[f % FOURS * (STAGE + 1) + f / FOURS] = __ldg(from + f);
        }
        __syncthreads();
        for (int j = lane; j < here; j += 32 * F::CHUNKS) {
            F chunk[F::CHUNKS][R];
            #pragma unroll
            for (int u = 0; u < F::CHUNKS; u++)
                #pragma unroll
                for (int r = 0; r < R; r++)
                    if (j + 32 * u < here) chunk[u][r].load(row[r], scale[r], begin + j + 32 * u);
            #pragma unroll
            for (int u = 0; u < F::CHUNKS; u++) {
                if (j + 32 * u >= here) break;
                #pragma unroll
                for (int r = 0; r < R; r++) {
                    float number[F::WIDE];
                    chunk[u][r].numbers(number);
                    #pragma unroll
                    for (int t = 0; t < T; t++) {
                        const float4* of = stage + t * FOURS * (STAGE + 1) + j + 32 * u;
                        float sum = 0.0f;
                        #pragma unroll
                        for (int k = 0; k < FOURS; k++) {
                            const float4 v = of[k * (STAGE + 1)];
                            sum = fmaf(number[4 * k], v.x, sum);
                            sum = fmaf(number[4 * k + 1], v.y, sum);
                            sum = fmaf(number[4 * k + 2], v.z, sum);
                            sum = fmaf(number[4 * k + 3], v.w, sum);
                        }
                        sums[r][t] = fmaf(chunk[u][r].scale(), sum, sums[r][t]);
                    }
                }
            }
        }
    }
    #pragma unroll
    for (int r = 0; r < R; r++)
        #pragma unroll
        for (int t = 0; t < T; t++) {
            const float sum = sum_of_lanes(sums[r][t]);
            if (lane == 0 && t < tokens && r0 + r < count) y[t * y_row + r0 + r] = sum;
        }
}

// A thread has one column after another of one row, as far apart as the grid is wide.
template <class F>
static __device__ __forceinline__ void decode_rows(
    const u8* __restrict__ w, i64 w_row, const u8* __restrict__ s, i64 s_row, int share,
    float* __restrict__ out, int columns, int begin
) {
    const i64 n = begin + blockIdx.y;
    for (int c = blockIdx.x * blockDim.x + threadIdx.x; c < columns; c += gridDim.x * blockDim.x)
        out[(i64)blockIdx.y * columns + c] = F::element(w + n * w_row, s + n / share * s_row, c);
}

// A thread has a column of a head and a token; neighbours read neighbouring columns.
template <class F>
static __device__ __forceinline__ void latent_of(
    const u8* __restrict__ w, i64 w_row, const u8* __restrict__ s, i64 s_row, int share,
    const float* __restrict__ x, i64 x_row, i64 x_head, float* __restrict__ y, int columns, int N,
    int every
) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, h = blockIdx.y, t = blockIdx.z;
    if (c >= columns) return;
    float sum = 0.0f;
    for (int n = 0; n < N; n++) {
        const i64 r = (i64)h * every + n;
        const float weight = F::element(w + r * w_row, s + r / share * s_row, c);
        sum = fmaf(weight, __ldg(x + t * x_row + h * x_head + n), sum);
    }
    y[((i64)t * gridDim.y + h) * columns + c] = sum;
}
"""

ROWS = r"""
extern "C" __global__ void __launch_bounds__(256) rows_@R@_@T@(
    const u8* w, i64 w_row, const u8* s, i64 s_row, int share,
    const float* x, i64 x_row, i64 x_head, float* y, i64 y_row, i64 y_head,
    int chunks, int tokens, int first, int count, int every
) {
    rows<@F@, @R@, @T@>(w, w_row, s, s_row, share, x, x_row, x_head, y, y_row, y_head,
                        chunks, tokens, first, count, every);
}
"""

OTHERS = r"""
extern "C" __global__ void __launch_bounds__(256) decode(
    const u8* w, i64 w_row, const u8* s, i64 s_row, int share, float* out, int columns, int begin
) {
    decode_rows<@F@>(w, w_row, s, s_row, share, out, columns, begin);
}

extern "C" __global__ void __launch_bounds__(256) latent(
    const u8* w, i64 w_row, const u8* s, i64 s_row, int share,
    const float* x, i64 x_row, i64 x_head, float* y, int columns, int N, int every
) {
    latent_of<@F@>(w, w_row, s, s_row, share, x, x_row, x_head, y, columns, N, every);
}
"""


def source(form: Form) -> str:
    """Return the source of one form's kernels: a module, so that only what is used is compiled."""
    each = [ROWS.replace("@R@", str(r)).replace("@T@", str(t)) for r in (1, 2) for t in TOKENS]
    return COMMON + (OTHERS + "".join(each)).replace("@F@", form.struct)
