"""Looking at models and runs: inspection, comparison, benchmarks and conversion."""
