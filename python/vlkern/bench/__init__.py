"""The benchmark: this library and its rivals, checked first, then timed side by side (docs/benchmarks.md)."""
