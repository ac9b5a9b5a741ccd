#pragma once

namespace autoq {

// Registers the gradient of autoq::linear on the CPU, once.
void register_gradient();

}  // namespace autoq
