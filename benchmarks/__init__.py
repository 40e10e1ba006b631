"""Operations measured against their peers, side by side: `python -m benchmarks`."""
