# Sources and flags of the kernels, for the extension (CMakeLists.txt) and for the program that checks them (check/).
#
# Each instruction set has its own file with its own flags and is selected at run time. The rest is built for the
# baseline processor of the architecture, so a wheel runs everywhere.
set(SHIFTADD_KERNELS_FOLDER "${CMAKE_CURRENT_LIST_DIR}")

function(shiftadd_add_kernels target)
  set(sources block codes engine gather lookups moments pack pool settle stack isa_portable)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    list(APPEND sources isa_avx2 isa_avx512 isa_avx512_bf16)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    list(APPEND sources isa_neon)
  endif()
  foreach(source ${sources})
    target_sources(${target} PRIVATE "${SHIFTADD_KERNELS_FOLDER}/${source}.cpp")
  endforeach()
  target_include_directories(${target} PRIVATE "${SHIFTADD_KERNELS_FOLDER}")

  # No contraction: products and sums are fused only where the file of an instruction set does so explicitly.
  target_compile_options(${target} PRIVATE -ffp-contract=off)
  target_link_libraries(${target} PRIVATE Threads::Threads)

  set(avx512 "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma")
  set(folder "${SHIFTADD_KERNELS_FOLDER}")
  set_source_files_properties("${folder}/isa_avx2.cpp" PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma")
  set_source_files_properties("${folder}/isa_avx512.cpp" PROPERTIES COMPILE_OPTIONS "${avx512}")
  # It throws nothing. Code that gives tiles back while unwinding would share a symbol with other files.
  set_source_files_properties("${folder}/isa_avx512_bf16.cpp" PROPERTIES COMPILE_OPTIONS
                              "${avx512};-mavx512bf16;-mamx-tile;-mamx-bf16;-fno-exceptions")
  # Only a fallback for other processors: at -O3 it takes most of the build time and is no faster.
  set_source_files_properties("${folder}/isa_portable.cpp" PROPERTIES COMPILE_OPTIONS "-O2")
endfunction()
