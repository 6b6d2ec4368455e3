// expect: Tensor
#include <kvlean/kvlean.hpp>

kvlean::KVCache<int> cache;
