"""The torch side of lkv_ext: the public functions, thin over the ops of the library."""
