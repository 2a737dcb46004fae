#!/usr/bin/env bash
# Checks the CPU kernels without Python: builds shiftadd_cli/native/check and runs it
#
#     plain     built as for the package, with every instruction set of this processor
#     address   with the address and undefined-behaviour sanitizers of GCC or Clang
#     thread    with the thread sanitizer
#     aarch64   built for 64-bit ARM and run in an emulator, for the NEON kernels
#
# A part whose tools are missing is skipped with a message. The exit code is 1 if any part fails.
#
# usage: scripts/check_native.sh [--quick] [--seed N] [--build FOLDER] [PART ...]
#   --quick    fewer and smaller matrices, and plain and aarch64 with less optimisation: a minute each
#   --seed     seed of the random matrices (default 1)
#   --build    build folder, with a subfolder for each part (default build/check); reused next time
#   PART       part to run (default: all). CXX and CMAKE_BUILD_PARALLEL_LEVEL work as with any CMake.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
native=$root/shiftadd_cli/native
build=$root/build/check
arguments=()
optimisation=()
parts=()

usage() {
    sed -n '/^# usage:/,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --quick) arguments+=(--quick); optimisation=(-DCMAKE_CXX_FLAGS_RELEASE=-O1) ;;
        --seed) [ $# -ge 2 ] || usage; arguments+=(--seed "$2"); shift ;;
        --build) [ $# -ge 2 ] || usage; build=$(realpath -m "$2"); shift ;;
        plain | address | thread | aarch64) parts+=("$1") ;;
        *) usage ;;
    esac
    shift
done
[ ${#parts[@]} -gt 0 ] || parts=(plain address thread aarch64)

# Builds the program of a part with additional CMake options; prints the log on failure.
make_check() {
    local folder=$build/$1 log=$build/$1.log
    shift
    mkdir -p "$build"
    if ! { cmake -S "$native/check" -B "$folder" "$@" && cmake --build "$folder" --parallel; } >"$log" 2>&1; then
        cat "$log" >&2
        return 1
    fi
}

skipped() {
    echo "$1: SKIPPED, $2"
}

# Whether the compiler can build and link with the sanitizers.
can_sanitize() {
    local program=$build/sanitize
    mkdir -p "$build"
    echo 'int main() { return 0; }' | ${CXX:-c++} -x c++ "-fsanitize=$1" - -o "$program" 2>/dev/null
}

# The linker may merge functions of several files; it must not keep one that is compiled for a newer processor.
check_symbols() {
    local shared
    shared=$(find "$build/plain" -name 'isa_avx*.o' -exec nm -C {} + | grep -E ' [WVu] ' || true)
    if [ -n "$shared" ]; then
        echo "These functions of the instruction sets' files may replace those of other files:" >&2
        echo "$shared" >&2
        return 1
    fi
}

run_plain() {
    make_check plain "${optimisation[@]}" && check_symbols && "$build/plain/check" "${arguments[@]}"
}

run_address() {
    if ! can_sanitize address,undefined; then
        skipped address "the compiler has no libasan or libubsan"
        return
    fi
    make_check address -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 \
        -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g1 -fno-omit-frame-pointer" &&
        UBSAN_OPTIONS=print_stacktrace=1 "$build/address/check" "${arguments[@]}"
}

run_thread() {
    if ! can_sanitize thread; then
        skipped thread "the compiler has no libtsan"
        return
    fi
    # Some versions of libtsan fail with the address randomisation of newer Linux kernels.
    local fixed=()
    if setarch "$(uname -m)" -R true 2>/dev/null; then fixed=(setarch "$(uname -m)" -R); fi
    make_check thread -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 \
        -DCMAKE_CXX_FLAGS="-fsanitize=thread -g1 -fno-omit-frame-pointer" &&
        TSAN_OPTIONS=halt_on_error=1 "${fixed[@]}" "$build/thread/check" "${arguments[@]}"
}

run_aarch64() {
    local machine emulator=() options=()
    machine=$(uname -m)
    if [ "$machine" != aarch64 ] && [ "$machine" != arm64 ]; then
        local missing=() qemu
        if ! command -v aarch64-linux-gnu-g++ >/dev/null; then
            missing+=("aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
        fi
        qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)
        [ -n "$qemu" ] || missing+=("qemu-aarch64 (Debian: qemu-user-static)")
        if [ ${#missing[@]} -gt 0 ]; then
            skipped aarch64 "not installed: $(printf '%s; ' "${missing[@]}" | sed 's/; $//')"
            return
        fi
        emulator=("$qemu")
        # Static linking: the emulator then needs no libraries of the other architecture.
        options=(-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64
            -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static)
    fi
    # CXX names the host compiler, if any.
    (unset CXX && make_check aarch64 "${options[@]}" "${optimisation[@]}") &&
        "${emulator[@]}" "$build/aarch64/check" "${arguments[@]}"
}

if ! command -v cmake >/dev/null || ! command -v "${CXX:-c++}" >/dev/null; then
    skipped "all parts" "CMake and a C++ compiler are needed"
    exit 0
fi
failed=()
for part in "${parts[@]}"; do
    echo "== $part"
    "run_$part" || failed+=("$part")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
