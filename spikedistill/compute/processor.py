"""What this machine's processor can do, by the flags that Linux names."""

from pathlib import Path


def processor_flags() -> set[str]:
    """The flags of the first processor in /proc/cpuinfo; empty where there is no such file."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return set()
    for line in information.read_text(encoding="utf-8").splitlines():
        if line.lower().startswith(("flags", "features")):
            return set(line.partition(":")[2].split())
    return set()


def has_long_vectors() -> bool:
    """Whether a vector holds 16 numbers in float32 (AVX-512) instead of 8."""
    return "avx512f" in processor_flags()
