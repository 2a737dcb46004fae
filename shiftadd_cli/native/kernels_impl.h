// The kernels, written once in terms of the operations of an instruction set `I` (isa_*.h):
//
//     kLanes                     32-bit lanes of a register; 16 rows are kParts = 16 / kLanes registers
//     Word, Float, Half          registers of 32-bit words, of float32, of int16 (2 · kLanes of them)
//     ...                        and the operations on them
//
// One translation unit per instruction set instantiates them, compiled with the flags of that set only.
#pragma once

#include "codes_impl.h"
#include "decoder_impl.h"
#include "kernels.h"
#include "moments_impl.h"
#include "rotate_impl.h"
#include "settle_impl.h"
#include "trellis_masks.h"
#include "viterbi_impl.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

namespace shiftadd {

// Words are prefetched this many bytes ahead of their use: a few hundred nanoseconds of streaming.
constexpr int kPrefetch = 6144;
// In 16 bits, the activations of a chunk become 0 if their absolute values sum to less than this: the inverse of their
// unit would exceed the range of float32.
constexpr float kLeastSize = 1e-30f;

template <class I>
struct Kernel {
    static constexpr int kLanes = I::kLanes;
    static constexpr int kParts = kPairs / kLanes;
    using Word = typename I::Word;
    using Float = typename I::Float;
    using Half = typename I::Half;

    // ---- scales -------------------------------------------------------------------------------------------------

    // Scales of one plane for the 16 even (`half` 0) or odd rows of a block.
    static inline void load_scales(const Matrix& m, int64_t block, int64_t group, int plane, int half, Float* out) {
        const int64_t at = ((block * m.layout.groups() + group) * m.layout.planes + plane) * kBlockRows + half * kPairs;
        for (int part = 0; part < kParts; ++part)
            out[part] = m.scale_codes ? I::decode_scales(m.scale_codes + at + part * kLanes)
                                      : I::load(m.scales + at + part * kLanes);
    }

    static inline const float* offsets_of(const Matrix& m, int64_t block, int64_t group) {
        return m.offsets + (block * m.layout.groups() + group) * kBlockRows;
    }

    // ---- output -------------------------------------------------------------------------------------------------

    // Converts the sums of a block's rows (even rows first), in units of the row scales, to output.
    static inline void finish(const Matrix& m, const float* sums, int64_t block, float* output) {
        const int64_t first = block * kBlockRows;
        const int64_t rows = std::min<int64_t>(kBlockRows, m.layout.rows - first);
        const float* scale = m.row_scale + first;
        float ordered[kBlockRows];
        for (int i = 0; i < kPairs; ++i) ordered[2 * i] = sums[i], ordered[2 * i + 1] = sums[kPairs + i];
        if (m.bias)
            for (int64_t i = 0; i < rows; ++i) output[first + i] = ordered[i] * scale[i] + m.bias[first + i];
        else
            for (int64_t i = 0; i < rows; ++i) output[first + i] = ordered[i] * scale[i];
    }

    // The same for bfloat16 output, and for several rows of activations.
    static inline void finish_pairs(const Matrix& m, const float* sums, int64_t batch, int64_t block,
                                    uint16_t* output) {
        const int64_t first = block * kBlockRows;
        const int64_t rows = std::min<int64_t>(kBlockRows, m.layout.rows - first);
        alignas(64) float scales[kBlockRows] = {}, biases[kBlockRows] = {};  // even rows first
        for (int64_t i = 0; i < rows; ++i) {
            scales[i % 2 * kPairs + i / 2] = m.row_scale[first + i];
            if (m.bias) biases[i % 2 * kPairs + i / 2] = m.bias[first + i];
        }
        alignas(64) uint16_t last[kBlockRows];
        for (int64_t b = 0; b < batch; ++b, sums += kBlockRows) {
            uint16_t* out = output + b * m.layout.rows + first;
            uint16_t* room = rows == kBlockRows ? out : last;
            for (int i = 0; i < kPairs; i += kLanes) {
                const Float even = I::fma(I::load(sums + i), I::load(scales + i), I::load(biases + i));
                const Float odd = I::fma(I::load(sums + kPairs + i), I::load(scales + kPairs + i),
                                         I::load(biases + kPairs + i));
                I::store_pairs(reinterpret_cast<uint32_t*>(room + 2 * i), I::pair(even, odd));
            }
            if (room == last) std::memcpy(out, last, rows * sizeof(uint16_t));
        }
    }

    // ---- planes -------------------------------------------------------------------------------------------------

    // The computed planes of a word are the `P::kPlanes` results of `P::load`, for a part of the rows of a block.
    // kPrefetches: also prefetch later words.

    // Planes that are stored as they are.
    template <int Q>
    struct Stored {
        static constexpr int kPlanes = Q;
        static constexpr bool kCoded = false;

        template <bool Prefetches, bool Top>
        static inline void load(const uint32_t* words, int64_t, int part, Word (&index)[Q]) {
            for (int plane = 0; plane < Q; ++plane) {
                const uint32_t* at = words + plane * kPairs + part * kLanes;
                index[plane] = I::load_words(at);
                if constexpr (Prefetches) I::prefetch(reinterpret_cast<const char*>(at) + kPrefetch);
            }
        }
    };

    // Planes that are exclusive-ors of stored bits of a row and of the rows above it, see trellis_masks.h.
    template <class Entry>
    struct Coded {
        static constexpr int Bits = Entry::kBits, Planes = Entry::kPlanes, kPlanes = Planes;
        static constexpr bool kCoded = true;

        // Top: this is the first block of a stripe.
        template <bool Prefetches, bool Top>
        static inline void load(const uint32_t* words, int64_t plane_stride, int part, Word (&index)[Planes]) {
            const uint32_t* from = words + part * kLanes;
            if constexpr (Prefetches)
                for (int bit = 0; bit < Bits; ++bit)
                    I::prefetch(reinterpret_cast<const char*>(from + bit * plane_stride) + kPrefetch);
            combine<Top>(from, plane_stride, part, index, std::make_integer_sequence<int, Planes>{});
        }

    private:
        template <bool Top, int... Plane>
        static inline void combine(const uint32_t* from, int64_t stride, int part, Word (&index)[Planes],
                                   std::integer_sequence<int, Plane...>) {
            ((index[Plane] = parity<Top, Entry::kMasks[Plane]>(from, stride, part)), ...);
        }

        template <bool Top, unsigned Mask>
        static inline Word parity(const uint32_t* from, int64_t stride, int part) {
            constexpr int kFirst = std::countr_zero(Mask);
            Word result = tap<Top, kFirst>(from, stride, part);
            if constexpr ((Mask & (Mask - 1)) != 0)
                result = I::exclusive_or(result, parity<Top, (Mask & (Mask - 1))>(from, stride, part));
            return result;
        }

        // A stored bit of the rows that are `kDistance` above.
        template <bool Top, int Tap>
        static inline Word tap(const uint32_t* from, int64_t stride, int part) {
            constexpr int kDistance = Tap / Bits;
            const auto* rows = reinterpret_cast<const char*>(from + Tap % Bits * stride) - 2 * kDistance;
            const Word word = I::load_words(reinterpret_cast<const uint32_t*>(rows));
            if constexpr (Top && kDistance > 0) return part == 0 ? I::template without<kDistance>(word) : word;
            return word;
        }
    };

    // ---- look-up ------------------------------------------------------------------------------------------------

    static void build_exact(const float* row, int64_t columns, float* tables) {
        for (int64_t at = 0; at < columns; at += kLookupColumns, tables += kTable) I::build_table(row + at, tables);
    }

    static void sum_chunks(const Layout& layout, const float* row, float* sums) {
        for_each_chunk(layout, [&](int64_t, int64_t word, int words) {
            float sum = 0;
            for (int64_t i = word * kWordColumns; i < (word + words) * kWordColumns; ++i) sum += row[i];
            *sums++ = sum;
        });
    }

    // The order of additions is the same on all instruction sets, and one that a compiler can vectorize.
    static inline float sum_of_sizes(const float* values, int columns) {
        float parts[kWordColumns] = {};
        for (int i = 0; i < columns; i += kWordColumns)
            for (int j = 0; j < kWordColumns; ++j) parts[j] += std::fabs(values[i + j]);
        for (int half = kWordColumns / 2; half > 0; half /= 2)
            for (int j = 0; j < half; ++j) parts[j] += parts[j + half];
        return parts[0];
    }

    static void build_fast(const Layout& layout, const float* row, int16_t* tables, float* units) {
        for_each_chunk(layout, [&](int64_t, int64_t word, int words) {
            const float* values = row + word * kWordColumns;
            const int columns = words * kWordColumns;
            const float size = sum_of_sizes(values, columns);
            // Rounding adds at most half a unit per column.
            constexpr float kRange = 32767 - kChunkColumns / 2;
            *units++ = size / kRange;
            int16_t rounded[kChunkColumns] = {};
            // The integers stay 0 if the size is tiny or not finite. If it is not finite, neither is the unit, and 0
            // times the unit is NaN.
            if (size >= kLeastSize && size <= std::numeric_limits<float>::max()) {
                const float inverse = kRange / size;
                // The last bit of the sum is worth 1, so the sum is rounded to an integer, which its low half holds.
                constexpr float kShift = 3 << 22;
                for (int i = 0; i < columns; ++i)
                    rounded[i] = static_cast<int16_t>(std::bit_cast<uint32_t>(values[i] * inverse + kShift));
            }
            int16_t* entries = tables + word * I::kHalfTables.entries();
            for (int i = 0; i < columns; i += kWordColumns, entries += I::kHalfTables.entries())
                for_each_half_table([&](auto table) {
                    build_half<I::kHalfTables.columns[table]>(rounded + i + I::kHalfTables.first_column(table),
                                                              entries + I::kHalfTables.start(table));
                });
        });
    }

    // In 16 bits throughout, which compilers vectorize.
    template <int N>
    static inline void build_half(const int16_t* values, int16_t* table) {
        for (int entry = 0; entry < 1 << N; ++entry) {
            int16_t sum = 0;
            for (int c = 0; c < N; ++c)
                sum = static_cast<int16_t>(sum + (entry >> c & 1 ? values[c] : -values[c]));
            table[entry] = sum;
        }
    }

    // Calls `use` with the number of each 16-bit table of a word, as a constant.
    template <class Use>
    static inline void for_each_half_table(Use use) {
        [&]<int... Table>(std::integer_sequence<int, Table...>) {
            (use(std::integral_constant<int, Table>{}), ...);
        }(std::make_integer_sequence<int, I::kHalfTables.count>{});
    }

    // Adds `sum · scale` of every plane, and the offset term, to the sums of a block.
    template <int B, int Q>
    static inline void accumulate(const Matrix& m, const Lookups& in, int64_t block, int64_t group, int64_t chunk,
                                  const Float (&plane_sums)[B][Q][2][kParts], float (*sums)[B][kBlockRows]) {
        for (int half = 0; half < 2; ++half) {
            Float total[B][kParts];
            for (int b = 0; b < B; ++b)
                for (int part = 0; part < kParts; ++part)
                    total[b][part] = I::load((*sums)[b] + half * kPairs + part * kLanes);
            for (int plane = 0; plane < Q; ++plane) {
                Float scale[kParts];
                load_scales(m, block, group, plane, half, scale);
                for (int b = 0; b < B; ++b)
                    for (int part = 0; part < kParts; ++part)
                        total[b][part] = I::fma(plane_sums[b][plane][half][part], scale[part], total[b][part]);
            }
            for (int b = 0; b < B; ++b)
                for (int part = 0; part < kParts; ++part) {
                    if (m.offsets) {
                        const Float offset = I::load(offsets_of(m, block, group) + half * kPairs + part * kLanes);
                        const Float sum = I::set(in.sums[b * m.layout.chunks() + chunk]);
                        total[b][part] = I::fma(offset, sum, total[b][part]);
                    }
                    I::store((*sums)[b] + half * kPairs + part * kLanes, total[b][part]);
                }
        }
    }

    // Sums over a chunk of one block, by look-up in 32-bit tables.
    template <class P, bool Top, int B, int Q>
    static inline void chunk_exact(const uint32_t* words, const Strides& strides, int count, const float* tables,
                                   int64_t stride, Float (&plane_sums)[B][Q][2][kParts]) {
        for (auto& row : plane_sums)
            for (auto& plane : row)
                for (auto& half : plane)
                    for (auto& sum : half) sum = I::zero();
        for (int word = 0; word < count; ++word, words += strides.word, tables += kWordTables * kTable) {
            Word index[kParts][Q];
            for (int part = 0; part < kParts; ++part)
                P::template load<true, Top>(words, strides.plane, part, index[part]);
#pragma GCC unroll 4
            for (int step = 0; step < kWordTables; ++step)
                for (int b = 0; b < B; ++b) {
                    const auto table = I::load_table(tables + b * stride + step * kTable);
                    for (int plane = 0; plane < Q; ++plane)
                        for (int part = 0; part < kParts; ++part) {
                            auto& low = plane_sums[b][plane][0][part];
                            auto& high = plane_sums[b][plane][1][part];
                            low = I::add(low, I::look_up(table, I::shift_right(index[part][plane], 4 * step)));
                            high = I::add(high, I::look_up(table, I::shift_right(index[part][plane], 16 + 4 * step)));
                        }
                }
        }
    }

    // The same in 16-bit tables; sums stay in range, see `build_fast`.
    template <class P, bool Top, int B, int Q>
    static inline void chunk_fast(const uint32_t* words, const Strides& strides, int count, const int16_t* tables,
                                  int64_t stride, const float* units, int64_t unit_stride,
                                  Float (&plane_sums)[B][Q][2][kParts]) {
        Half sums[B][Q][kParts];
        for (auto& row : sums)
            for (auto& plane : row)
                for (auto& sum : plane) sum = I::zero_half();
        for (int word = 0; word < count; ++word, words += strides.word, tables += I::kHalfTables.entries()) {
            Word index[kParts][Q];
            for (int part = 0; part < kParts; ++part)
                P::template load<true, Top>(words, strides.plane, part, index[part]);
            for_each_half_table([&](auto number) {
                constexpr int kFirst = I::kHalfTables.first_column(number), kStart = I::kHalfTables.start(number);
                for (int b = 0; b < B; ++b) {
                    const auto table =
                        I::template load_half_table<I::kHalfTables.columns[number]>(tables + b * stride + kStart);
                    for (int plane = 0; plane < Q; ++plane)
                        for (int part = 0; part < kParts; ++part)
                            sums[b][plane][part] =
                                I::add_half(sums[b][plane][part],
                                            I::look_up_half(table, I::shift_right_half(index[part][plane], kFirst)));
                }
            });
        }
        for (int b = 0; b < B; ++b) {
            const Float unit = I::set(units[b * unit_stride]);
            for (int plane = 0; plane < Q; ++plane)
                for (int part = 0; part < kParts; ++part) {
                    plane_sums[b][plane][0][part] = I::mul(I::low_halves(sums[b][plane][part]), unit);
                    plane_sums[b][plane][1][part] = I::mul(I::high_halves(sums[b][plane][part]), unit);
                }
        }
    }

    template <class P, bool Fast, bool Top, int B, int Q>
    static inline void chunk(const Lookups& in, const uint32_t* words, const Strides& strides, int count, int64_t table,
                             int64_t stride, const float* units, int64_t unit_stride,
                             Float (&plane_sums)[B][Q][2][kParts]) {
        if constexpr (Fast)
            chunk_fast<P, Top>(words, strides, count, in.fast + table, stride, units, unit_stride, plane_sums);
        else
            chunk_exact<P, Top>(words, strides, count, in.exact + table, stride, plane_sums);
    }

    template <class P, int B, bool Fast>
    static void stripe(const Matrix& m, const Lookups& in, int first_row, int64_t number) {
        const Layout& layout = m.layout;
        const int blocks = layout.stripe_blocks(number);
        constexpr int kEntries = Fast ? I::kHalfTables.entries() : kWordTables * kTable;
        const int64_t stride = layout.padded_words() * kEntries;
        const uint32_t* words = m.words + layout.stripe_start(number);
        // Row 0 is now the first of these B rows.
        Lookups rows = in;
        rows.sums = in.sums ? in.sums + first_row * layout.chunks() : nullptr;
        constexpr int kMostBlocks = P::kCoded ? kTrellisStripeBlocks : kStripeBlocks;
        alignas(64) float sums[kMostBlocks][B][kBlockRows] = {};
        int64_t number_of_chunk = 0;
        for_each_chunk(layout, [&](int64_t group, int64_t word, int count) {
            const Strides strides = layout.strides(count, blocks);
            const int64_t table = first_row * stride + word * kEntries;
            const float* units = Fast ? in.units + first_row * layout.chunks() + number_of_chunk : nullptr;
            for (int block = 0; block < blocks; ++block) {
                Float plane_sums[B][P::kPlanes][2][kParts];
                const uint32_t* from = words + block * strides.block;
                if (P::kCoded && block == 0)
                    chunk<P, Fast, true>(in, from, strides, count, table, stride, units, layout.chunks(), plane_sums);
                else
                    chunk<P, Fast, false>(in, from, strides, count, table, stride, units, layout.chunks(), plane_sums);
                accumulate(m, rows, number * layout.most_stripe_blocks() + block, group, number_of_chunk, plane_sums,
                           &sums[block]);
            }
            words += blocks * count * layout.word_entries();
            ++number_of_chunk;
        });
        for (int b = 0; b < B; ++b)
            for (int block = 0; block < blocks; ++block)
                finish(m, sums[block][b], number * layout.most_stripe_blocks() + block,
                       in.output + (first_row + b) * layout.rows);
    }

    // The number of rows whose accumulators fit in registers.
    template <int Q>
    static constexpr int rows_at_once() {
        constexpr int registers = I::kRegisters * 3 / 4;
        constexpr int fit = registers / (2 * Q * kParts);
        return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
    }

    template <class P, bool Fast>
    static void all_rows(const Matrix& m, const Lookups& in, int64_t number) {
        int row = 0;
        constexpr int max_rows = rows_at_once<P::kPlanes>();
        for (; row + max_rows <= in.batch; row += max_rows) stripe<P, max_rows, Fast>(m, in, row, number);
        if constexpr (max_rows > 2)
            for (; row + 2 <= in.batch; row += 2) stripe<P, 2, Fast>(m, in, row, number);
        for (; row < in.batch; ++row) stripe<P, 1, Fast>(m, in, row, number);
    }

    // Calls `run` with the planes of a layout as a type.
    template <class Run>
    static inline void with_planes(const Layout& layout, Run run) {
        if (layout.coded()) return with_code(layout, run, TrellisCodes{});
        switch (layout.bits) {
            case 1: return run(Stored<1>{});
            case 2: return run(Stored<2>{});
            case 3: return run(Stored<3>{});
            case 4: return run(Stored<4>{});
            case 5: return run(Stored<5>{});
            case 6: return run(Stored<6>{});
            case 7: return run(Stored<7>{});
            case 8: return run(Stored<8>{});
        }
    }

    template <class Run, class... Entries>
    static inline void with_code(const Layout& layout, Run run, std::tuple<Entries...>) {
        ((layout.bits == Entries::kBits && layout.planes == Entries::kPlanes ? run(Coded<Entries>{}) : void()), ...);
    }

    template <bool Fast>
    static void look_up(const Matrix& m, const Lookups& in, int64_t number) {
        with_planes(m.layout, [&](auto planes) { all_rows<decltype(planes), Fast>(m, in, number); });
    }

    // ---- multiplication -----------------------------------------------------------------------------------------

    // Decodes a chunk of one block, in units of the row scales: `decoded` [columns of the chunk][32 rows, even first].
    template <class P, bool Top>
    static inline void decode(const Matrix& m, const uint32_t* words, const Strides& strides, int count, int64_t block,
                              int64_t group, float* decoded) {
        constexpr int Q = P::kPlanes;
        Float negative[Q][2][kParts], start[2][kParts];
        for (int half = 0; half < 2; ++half) {
            for (int part = 0; part < kParts; ++part)
                start[half][part] =
                    m.offsets ? I::load(offsets_of(m, block, group) + half * kPairs + part * kLanes) : I::zero();
            for (int plane = 0; plane < Q; ++plane) {
                load_scales(m, block, group, plane, half, negative[plane][half]);
                for (auto& scale : negative[plane][half]) scale = I::negate(scale);
            }
        }
        for (int word = 0; word < count; ++word, words += strides.word)
            for (int part = 0; part < kParts; ++part) {
                Word index[Q];
                P::template load<false, Top>(words, strides.plane, part, index);
                float* out = decoded + word * kWordColumns * kBlockRows + part * kLanes;
#pragma GCC unroll 16
                for (int column = 0; column < kWordColumns; ++column, out += kBlockRows) {
                    Float low = start[0][part], high = start[1][part];
                    for (int plane = 0; plane < Q; ++plane) {
                        low = I::add(low, I::flip(negative[plane][0][part], I::shift_left(index[plane], 31 - column)));
                        high =
                            I::add(high, I::flip(negative[plane][1][part], I::shift_left(index[plane], 15 - column)));
                    }
                    I::store(out, low);
                    I::store(out + kPairs, high);
                }
            }
    }

    // Weights of one block, decoded chunk by chunk, and their products with activations. `add` takes a chunk that is
    // decoded and the activations of its columns; `flush` makes `sums` [batch][32 rows] complete.
    struct Plain {
        using Value = float;
        static constexpr int kColumns = 1;  // per step
        // Batches are processed in slices whose sums stay in the L1 or L2 cache.
        static constexpr int64_t kSlice = 256;
        alignas(64) float decoded[kChunkColumns * kBlockRows];

        static const Value* values(const Panel& in) { return in.values; }
        void add(const Value* values, int columns, int64_t batch, float* sums) {
            multiply_tiles(*this, values, columns, batch, sums);
        }
        void flush(int64_t, float*) {}
        Float load(int at) const { return I::load(decoded + at); }
        static Float add_product(const Value* value, Float weight, Float sum) {
            return I::fma(I::set(*value), weight, sum);
        }
    };

    // Writes decoded columns in pairs, rounded to bfloat16: [columns / 2][32 rows].
    static inline void round_pairs(const float* decoded, int columns, uint32_t* pairs) {
        for (int column = 0; column < columns; column += 2)
            for (int row = 0; row < kBlockRows; row += kLanes) {
                const float* from = decoded + column * kBlockRows + row;
                I::store_pairs(pairs + column / 2 * kBlockRows + row,
                               I::pair(I::load(from), I::load(from + kBlockRows)));
            }
    }

    struct Paired {
        using Value = uint16_t;
        static constexpr int kColumns = 2;
        static constexpr int64_t kSlice = 256;
        alignas(64) float decoded[kChunkColumns * kBlockRows];
        alignas(64) uint32_t pairs[kChunkColumns / 2 * kBlockRows];

        static const Value* values(const Panel& in) { return in.halves; }
        void add(const Value* values, int columns, int64_t batch, float* sums) {
            round_pairs(decoded, columns, pairs);
            multiply_tiles(*this, values, columns, batch, sums);
        }
        void flush(int64_t, float*) {}
        auto load(int at) const { return I::load_pairs(pairs + at); }
        template <class Pairs>
        static Float add_product(const Value* value, Pairs weight, Float sum) {
            uint32_t both;
            std::memcpy(&both, value, sizeof(both));
            return I::dot(I::set_pairs(both), weight, sum);
        }
    };

    // sums[batch][32] += values[batch][columns] · weights[columns][32]
    template <class Weights>
    static inline void multiply_tiles(const Weights& weights, const typename Weights::Value* values, int columns,
                                      int64_t batch, float* sums) {
        constexpr int kTile = I::kTile;
        int64_t b = 0;
        for (; b + kTile <= batch; b += kTile)
            multiply_tile<kTile>(weights, values + b * columns, columns, sums + b * kBlockRows);
        for (; b < batch; ++b) multiply_tile<1>(weights, values + b * columns, columns, sums + b * kBlockRows);
    }

    template <int B, class Weights>
    static inline void multiply_tile(const Weights& weights, const typename Weights::Value* values, int columns,
                                     float* sums) {
        constexpr int kParts32 = kBlockRows / kLanes;
        Float total[B][kParts32];
        for (int b = 0; b < B; ++b)
            for (int r = 0; r < kParts32; ++r) total[b][r] = I::load(sums + b * kBlockRows + r * kLanes);
        for (int column = 0; column < columns; column += Weights::kColumns) {
            const int at = column / Weights::kColumns * kBlockRows;
            decltype(weights.load(0)) weight[kParts32];
            for (int r = 0; r < kParts32; ++r) weight[r] = weights.load(at + r * kLanes);
            for (int b = 0; b < B; ++b)
                for (int r = 0; r < kParts32; ++r)
                    total[b][r] = Weights::add_product(values + b * columns + column, weight[r], total[b][r]);
        }
        for (int b = 0; b < B; ++b)
            for (int r = 0; r < kParts32; ++r) I::store(sums + b * kBlockRows + r * kLanes, total[b][r]);
    }

    template <class P, class Weights>
    static void multiply_block(const Matrix& m, const Panel& in, int64_t block) {
        const Layout& layout = m.layout;
        const int64_t number = block / layout.most_stripe_blocks();
        const int blocks = layout.stripe_blocks(number);
        const int position = static_cast<int>(block % layout.most_stripe_blocks());
        constexpr int64_t kSlice = Weights::kSlice;
        Weights weights;
        alignas(64) float sums[kSlice * kBlockRows];
        for (int64_t first = 0; first < in.batch; first += kSlice) {
            const int64_t batch = std::min<int64_t>(kSlice, in.batch - first);
            std::memset(sums, 0, batch * kBlockRows * sizeof(float));
            const uint32_t* words = m.words + layout.stripe_start(number);
            for_each_chunk(layout, [&](int64_t group, int64_t word, int count) {
                const int columns = count * kWordColumns;
                const Strides strides = layout.strides(count, blocks);
                const uint32_t* from = words + position * strides.block;
                if (P::kCoded && position == 0)
                    decode<P, true>(m, from, strides, count, block, group, weights.decoded);
                else
                    decode<P, false>(m, from, strides, count, block, group, weights.decoded);
                const auto* values = Weights::values(in) + word * kWordColumns * in.batch + first * columns;
                weights.add(values, columns, batch, sums);
                words += blocks * count * layout.word_entries();
            });
            weights.flush(batch, sums);
            if constexpr (std::is_same_v<typename Weights::Value, uint16_t>)
                finish_pairs(m, sums, batch, block, in.half_output + first * layout.rows);
            else
                for (int64_t b = 0; b < batch; ++b)
                    finish(m, sums + b * kBlockRows, block, in.output + (first + b) * layout.rows);
        }
    }

    template <class Weights>
    static void multiply(const Matrix& m, const Panel& in, int64_t block) {
        with_planes(m.layout, [&](auto planes) { multiply_block<decltype(planes), Weights>(m, in, block); });
    }

    static const Kernels* table() {
        static const Kernels kernels = [] {
            Kernels result{};
            result.name = I::kName;
            result.most_lookups = I::most_lookups;
            result.rotate = RotateKernel<I>::rotate;
            result.build_exact = build_exact;
            result.half_tables = I::kHalfTables;
            result.build_fast = build_fast;
            result.sum_chunks = sum_chunks;
            result.look_up = look_up<false>;
            result.look_up_fast = look_up<true>;
            result.multiply = multiply<Plain>;
            result.dot_codes = CodesKernel<I>::dot;
            result.attend = DecoderKernel<I>::attend;
            result.gate = DecoderKernel<I>::gate;
            result.settle_rows = SettleKernel<I>::kRows;
            result.settle = SettleKernel<I>::strip;
            result.settle_path = ViterbiKernel<I>::stripe;
            using Moments = MomentsKernel<I>;
            result.moments = Moments::template form<typename Moments::Plain>();
            return result;
        }();
        return &kernels;
    }
};

}  // namespace shiftadd
