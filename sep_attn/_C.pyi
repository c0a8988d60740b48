"""The C++ kernels. Importing this module registers the native operators of ``sep_attn``."""

def version() -> str:
    """The version of the package this was built for."""

def capability() -> str:
    """The instruction set in use: "baseline", "avx2", "avx512", "avx512_bf16" or "neon"."""

def capabilities() -> list[str]:
    """The instruction sets usable on this machine: worst first, and last "avx512_bf16"."""

def compiled_capabilities() -> list[str]:
    """The instruction sets this build holds, in the same order."""

def set_capability(name: str) -> None:
    """Uses another instruction set from now on; ValueError when it is not among capabilities()."""

def kernel_calls() -> dict[str, int]:
    """How often each kernel ran since the last reset: {"gate_forward/avx512": 2, ...}."""

def reset_kernel_calls() -> None:
    """Sets every count to 0."""

def packed_weights_bytes(dtype: str, channels: int) -> int:
    """How much memory `separable_attention_packed` keeps packed weights in."""

def poison_results(enabled: bool) -> None:
    """For tests: fills results with NaN before a kernel runs, so that a value left out shows."""
