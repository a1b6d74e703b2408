"""lkv: learned KV-cache eviction on top of `lkv_ext`."""
