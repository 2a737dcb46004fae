// ggml's matrix product on quantized weights as plain functions, for scripts/ggml_layers.py.
//
// One graph multiplies `copies` weights, each equal to the first, by the same activations, as the layers of a model
// would follow one another, on a pool of threads that stays. With `repack` the weights lie in the buffer type that
// llama.cpp itself chooses for them on a CPU where it has a faster layout of the type.

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Problem {
    ggml_backend_t backend = nullptr;
    ggml_threadpool *pool = nullptr;
    ggml_context *weights = nullptr, *rest = nullptr;
    ggml_backend_buffer_t weight_buffer = nullptr, rest_buffer = nullptr;
    ggml_cgraph *graph = nullptr;
    ggml_tensor *activations = nullptr;
    std::vector<ggml_tensor *> matrices, products;

    ~Problem() {
        ggml_backend_buffer_free(rest_buffer);
        ggml_backend_buffer_free(weight_buffer);
        ggml_free(rest);
        ggml_free(weights);
        ggml_backend_free(backend);
        if (pool) ggml_threadpool_free(pool);
    }
};

bool find_type(const char *name, ggml_type &found) {
    for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
        const char *known = ggml_type_name(static_cast<ggml_type>(type));
        if (known && std::strcmp(known, name) == 0) {
            found = static_cast<ggml_type>(type);
            return true;
        }
    }
    return false;
}

// The buffer type with a layout of its own for this product, or null.
ggml_backend_buffer_type_t repacking(ggml_backend_dev_t device, ggml_tensor *product) {
    auto find = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    auto types = find ? find(device) : nullptr;
    for (; types && *types; ++types) {
        // The device is asked with the weight in such a buffer, which as in llama.cpp need not hold anything.
        ggml_backend_buffer_t empty = ggml_backend_buft_alloc_buffer(*types, 0);
        product->src[0]->buffer = empty;
        const bool able = ggml_backend_dev_supports_op(device, product);
        product->src[0]->buffer = nullptr;
        ggml_backend_buffer_free(empty);
        if (able) return *types;
    }
    return nullptr;
}

}  // namespace

extern "C" {

// values float32 [rows, columns], inputs float32 [batch, columns]. Null where ggml has no such type, cannot divide the
// columns into its blocks, or has no layout of its own for it.
void *matmul_create(const char *type_name, int64_t rows, int64_t columns, int64_t batch, int64_t copies, int threads,
                    bool repack, const float *values, const float *inputs) {
    // It tells of every weight that it repacks.
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_type type;
    if (!find_type(type_name, type) || columns % ggml_blck_size(type)) return nullptr;
    auto problem = std::make_unique<Problem>();
    problem->backend = ggml_backend_cpu_init();
    ggml_threadpool_params parameters = ggml_threadpool_params_default(threads);
    problem->pool = ggml_threadpool_new(&parameters);
    ggml_backend_cpu_set_n_threads(problem->backend, threads);
    ggml_backend_cpu_set_threadpool(problem->backend, problem->pool);

    const size_t nodes = static_cast<size_t>(copies) + 8;
    const size_t size = 2 * nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false);
    problem->weights = ggml_init({size, nullptr, true});
    problem->rest = ggml_init({size, nullptr, true});
    problem->activations = ggml_new_tensor_2d(problem->rest, GGML_TYPE_F32, columns, batch);
    problem->graph = ggml_new_graph_custom(problem->rest, nodes, false);
    for (int64_t copy = 0; copy < copies; ++copy) {
        problem->matrices.push_back(ggml_new_tensor_2d(problem->weights, type, columns, rows));
        problem->products.push_back(ggml_mul_mat(problem->rest, problem->matrices.back(), problem->activations));
        ggml_build_forward_expand(problem->graph, problem->products.back());
    }
    ggml_backend_buffer_type_t buffers = ggml_backend_get_default_buffer_type(problem->backend);
    if (repack) {
        buffers = repacking(ggml_backend_get_device(problem->backend), problem->products[0]);
        if (!buffers) return nullptr;
    }
    problem->weight_buffer = ggml_backend_alloc_ctx_tensors_from_buft(problem->weights, buffers);
    problem->rest_buffer = ggml_backend_alloc_ctx_tensors(problem->rest, problem->backend);
    if (!problem->weight_buffer || !problem->rest_buffer) return nullptr;

    std::vector<uint8_t> quantized(ggml_row_size(type, columns) * rows);
    const std::vector<float> importance(columns, 1.0f);
    ggml_quantize_chunk(type, values, quantized.data(), 0, rows, columns, importance.data());
    for (ggml_tensor *matrix : problem->matrices)
        ggml_backend_tensor_set(matrix, quantized.data(), 0, quantized.size());
    ggml_backend_tensor_set(problem->activations, inputs, 0, ggml_nbytes(problem->activations));
    return problem.release();
}

// Bytes of one weight as ggml's file formats store it; its layouts of its own pad no more than rows to a block.
int64_t matmul_bytes(const void *problem) {
    const ggml_tensor *matrix = static_cast<const Problem *>(problem)->matrices[0];
    return static_cast<int64_t>(ggml_row_size(matrix->type, matrix->ne[0]) * matrix->ne[1]);
}

bool matmul_run(void *problem) {
    auto *mine = static_cast<Problem *>(problem);
    return ggml_backend_graph_compute(mine->backend, mine->graph) == GGML_STATUS_SUCCESS;
}

// outputs float32 [batch, rows], of the last weight.
void matmul_result(const void *problem, float *outputs) {
    const ggml_tensor *product = static_cast<const Problem *>(problem)->products.back();
    ggml_backend_tensor_get(product, outputs, 0, ggml_nbytes(product));
}

void matmul_free(void *problem) { delete static_cast<Problem *>(problem); }

}  // extern "C"
