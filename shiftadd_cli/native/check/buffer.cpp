#include "buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace shiftadd::check {

#if defined(__SANITIZE_ADDRESS__)

void* exact_allocate(size_t bytes) { return std::malloc(bytes); }
void exact_free(void* memory, size_t) { std::free(memory); }

#else

namespace {

constexpr unsigned char kBefore = 0x5a;

size_t page() {
    static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return size;
}

size_t whole_pages(size_t bytes) { return (bytes + page() - 1) / page() * page(); }

}  // namespace

void* exact_allocate(size_t bytes) {
    const size_t inside = whole_pages(bytes);
    void* all = mmap(nullptr, inside + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) std::abort();
    unsigned char* first = static_cast<unsigned char*>(all) + page();
    if (inside && mprotect(first, inside, PROT_READ | PROT_WRITE) != 0) std::abort();
    std::memset(first, kBefore, inside - bytes);
    return first + (inside - bytes);
}

void exact_free(void* memory, size_t bytes) {
    const size_t inside = whole_pages(bytes);
    unsigned char* first = static_cast<unsigned char*>(memory) - (inside - bytes);
    for (size_t i = 0; i < inside - bytes; ++i)
        if (first[i] != kBefore) {
            std::fprintf(stderr, "Something wrote before a buffer of %zu bytes.\n", bytes);
            std::abort();
        }
    munmap(first - page(), inside + 2 * page());
}

#endif

}  // namespace shiftadd::check
