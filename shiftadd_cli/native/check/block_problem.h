// A random decoder block, and its output for few tokens by the plainest formulas in double precision.
#pragma once

#include <string>
#include <vector>

#include "../block.h"
#include "problem.h"

namespace shiftadd::check {

// The activation of a gate, in double precision.
double activated(Activation activation, double x);

struct BlockProblem {
    int64_t columns, heads, key_heads, size, inner, tokens;
    int rows;
    Number type, position_type;
    bool consecutive, inner_norms, head_norms, joint, outer_norms, one_position, turned;
    float residual;
    Activation activation;
    std::vector<Problem> parts;  // query, key, value, output, gate, up, down
    std::vector<Buffer<float>> norms;
    Numbers hidden, cosines, sines, keys, values;  // keys, values: of the earlier tokens

    explicit BlockProblem(Random& random);
    std::string name() const;

    // The block's output, with a plain tensor [sequences][heads][tokens][size] as the cache of keys and values.
    Numbers output(const Kernels& kernels, bool fast, int threads) const;
    // The output of `depth` such blocks in sequence, each with its own cache: in one call, and with one call per block.
    Numbers stacked(const Kernels& kernels, bool fast, int threads, int depth) const;
    Numbers repeated(const Kernels& kernels, bool fast, int threads, int depth) const;
    // The exact output. Replaces the activations of the parts.
    std::vector<double> expected();

private:
    int sequences() const { return consecutive ? 1 : rows; }
    int tokens_of_each() const { return consecutive ? rows : 1; }
    DecoderBlock block() const;
    Positions positions() const;
    Numbers output_of(const Kernels& kernels, bool fast, int threads, const Numbers& input) const;
    std::vector<double> product(int part, const std::vector<double>& input);
};

}  // namespace shiftadd::check
