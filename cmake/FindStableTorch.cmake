# Finds the torch of this Python without importing it. Sets LKV_WITH_TORCH and the target stable_torch.
#
# Only headers and the umbrella libtorch.so are used: the op library is built on the stable ABI and runs on every torch
# from the target version on, with or without CUDA.
set(LKV_TORCH_ABI 2.10)

set(LKV_WITH_TORCH FALSE)
if(NOT LKV_TORCH STREQUAL "OFF")
  # -I: an isolated build environment hides the user's packages by environment variables.
  execute_process(
    COMMAND ${Python_EXECUTABLE} -I -c
            "import importlib.metadata as m, pathlib, importlib.util as u; \
print(pathlib.Path(u.find_spec('torch').origin).parent, m.version('torch'), sep=';')"
    OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed)
    list(GET found 0 torch_dir)
    list(GET found 1 LKV_TORCH_VERSION)
    if(LKV_TORCH_VERSION VERSION_LESS ${LKV_TORCH_ABI})
      message(FATAL_ERROR "lkv_ext: torch ${LKV_TORCH_VERSION} is too old: the op library needs torch >= "
                          "${LKV_TORCH_ABI}. Upgrade torch, or build without it: LKV_TORCH=OFF.")
    endif()
    set(LKV_WITH_TORCH TRUE)
  elseif(LKV_TORCH STREQUAL "ON")
    message(FATAL_ERROR "lkv_ext: LKV_TORCH=ON, but ${Python_EXECUTABLE} finds no torch. Install torch first.")
  else()
    message(WARNING "lkv_ext: ${Python_EXECUTABLE} finds no torch: building the NumPy front end only. "
                    "For lkv_ext.evict on tensors install torch, then lkv-ext again with --no-build-isolation.")
  endif()
endif()

if(LKV_WITH_TORCH)
  message(STATUS "lkv_ext: torch ${LKV_TORCH_VERSION} in ${torch_dir}, ABI target ${LKV_TORCH_ABI}")
  add_library(stable_torch INTERFACE)
  target_include_directories(stable_torch SYSTEM INTERFACE ${torch_dir}/include)
  target_compile_definitions(stable_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
  # libtorch.so pulls in the CUDA half of torch where there is one; nothing references it by name, so keep it.
  target_link_options(stable_torch INTERFACE LINKER:--no-as-needed)
  target_link_libraries(stable_torch INTERFACE ${torch_dir}/lib/libtorch.so ${torch_dir}/lib/libtorch_cpu.so)
endif()
