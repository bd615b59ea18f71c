"""The library beside PEFT: `python -m benchmarks` measures every row in interleaved pairs and prints one table."""
