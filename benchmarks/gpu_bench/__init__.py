"""The parts of benchmarks/gpu.py and benchmarks/gpu_proof.py."""
