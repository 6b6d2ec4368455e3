// expect: KVLean tensors hold float, kvlean::f16 or kvlean::bf16
#include <kvlean/kvlean.hpp>

double keys[64];
auto tensor = kvlean::strided(keys, {.kv_heads = 1, .tokens = 8, .dim = 8});
