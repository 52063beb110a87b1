"""How the hardware is used: precision, memory layout, CUDA graphs, compiled blocks; not what is computed."""
