"""How the hardware is used; the profiles in `conf/performance` are values of this."""

from dataclasses import dataclass


@dataclass
class PerformanceSettings:
    """No key changes the mathematics; precisions below 32 bits round it."""

    name: str = "default"  # of the profile; auto: max_speed where the machine and the other keys allow it
    matmul_precision: str = "high"  # of float32 products on a GPU: highest | high | medium
    threads: int | None = None  # of the processor; None: as many as torch chooses
    learning_precision: str = "auto"  # of products under autocast; weights that learn stay in float32
    autocast: bool = True  # false: learning steps wholly in learning_precision, on rounded weights
    synthesis_precision: str = "auto"  # of denoiser and VAE; auto: bfloat16 on a GPU with it, or float32
    channels_last: bool = False  # layout of the U-Net's and the VAE's convolutions
    cuda_graphs: bool = False  # the learning step and the passes of synthesis, replayed without Python
    compile: bool = False  # residual and feed-forward blocks, Qwen3's layers; worth its minutes on long runs
    gradient_checkpointing: bool = False  # activations computed twice instead of kept
    # in learning, weights that do not learn are kept in 8 bits; needs gradient_checkpointing
    float8: bool = False
    deterministic: bool = False  # the same result bit for bit on a GPU too, for slower attention there
