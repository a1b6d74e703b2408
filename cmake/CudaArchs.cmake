# The architectures that are built where no GPU is visible, as far as the compiler knows them: before 12.8 it does not know
# 100 and 120, whose GPUs then run code that is translated from the PTX for 90.
function(lkv_default_archs nvcc out)
  execute_process(COMMAND ${nvcc} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET RESULT_VARIABLE failed)
  set(archs "")
  foreach(arch 80 90 100 120)
    if(failed OR known MATCHES "sm_${arch}[^0-9a-z]")
      list(APPEND archs ${arch}-real)
    endif()
  endforeach()
  set(${out} ${archs} 90-virtual PARENT_SCOPE)
endfunction()

# The oldest driver that the static runtime of a toolkit talks to.
function(lkv_needed_driver version out)
  if(version VERSION_GREATER_EQUAL 13)
    set(${out} 580 PARENT_SCOPE)
  else()
    set(${out} 525 PARENT_SCOPE)
  endif()
endfunction()
